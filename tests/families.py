"""Tiny random models of the families in families.toml, and their engines. The same name gives the same weights."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_lm.utils import _get_classes

from tests.models import tiny, tiny_config

TABLE: dict[str, Any] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
WINDOW: int = TABLE["sizes"]["sliding_window"]
"""Tokens that a sliding window sees in these models."""


@dataclass(frozen=True, slots=True)
class Family:
    """One row of the table; the fields are explained there."""

    name: str
    way: str
    config: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    arch: str = ""
    why: str = ""


FAMILIES = {name: Family(name, **row) for name, row in TABLE["families"].items()}
RUNNING = [name for name, family in FAMILIES.items() if family.way != "refused"]


def build(name: str) -> Any:
    """Build a family's model."""
    family = FAMILIES[name]
    arch = family.arch or name
    config = {"rope_scaling": None, **TABLE["sizes"], **family.config}
    if family.text:
        return tiny(arch, text_config=tiny_config(family.text, **config))
    _, args_class = _get_classes({"model_type": arch})
    known = args_class.__dataclass_fields__
    return tiny(arch, **{key: value for key, value in config.items() if key in known})  # mlx-lm is slow to skip others
