"""`RADIXQ_*` and `MLX_MODEL_PATH`: read once from the environment, checked, printable. Knows no Redis and no MLX."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, field_validator

from common.errors import SettingsError

DEFAULT_REDIS_URL = "redis://localhost:6379"
_TESTS = "RADIXQ_TEST_"  # belongs to the test suite
_OTHERS = frozenset({"MLX_MODEL_PATH", "RQ_REDIS_URL"})


class Settings(BaseModel):
    """Every setting with its default; the environment name is the alias, the unit is in the name."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, validate_default=True, protected_namespaces=()
    )  # pydantic before 2.10 protects the names model_*

    redis_url: str | None = Field(
        None, alias="RADIXQ_REDIS_URL", description="Redis URL; else RQ_REDIS_URL, else localhost"
    )
    model_path: str | None = Field(None, alias="MLX_MODEL_PATH", description="directory, hub id or .gguf file")
    model_aliases: tuple[str, ...] = Field(
        (), alias="RADIXQ_MODEL_ALIASES", description="other names of the model, comma separated"
    )
    home: Path = Field(
        Path("~/.radixq"), alias="RADIXQ_HOME", description="embedded server; locks and crash reports of workers"
    )
    worker_name: str | None = Field(
        None,
        alias="RADIXQ_WORKER_NAME",
        description="label in metrics; else the host name; the second process of one home gets -2",
    )
    dtype: Literal["stored", "float32", "float16", "bfloat16"] | None = Field(
        None, alias="RADIXQ_DTYPE", description="else float32 on CPU, as stored on Metal"
    )
    fast_blas: bool = Field(True, alias="RADIXQ_FAST_BLAS", description="open mkl or OpenBLAS on Linux")
    exact: bool = Field(False, alias="RADIXQ_EXACT", description="attention that is bit-identical to a job alone")
    max_rows: int = Field(32, alias="RADIXQ_MAX_ROWS", ge=1, le=1024, description="rows decoded together")
    max_tokens: int = Field(1024, alias="RADIXQ_MAX_TOKENS", ge=1, description="answer length where a job names none")
    chat_template_kwargs: dict[str, Any] = Field(
        {}, alias="RADIXQ_CHAT_TEMPLATE_KWARGS", description="JSON object; a job's own win"
    )
    prefill_chunk_tokens: int = Field(
        512, alias="RADIXQ_PREFILL_CHUNK_TOKENS", ge=16, description="prompt tokens between two decode steps"
    )
    window_jobs: int = Field(10_000, alias="RADIXQ_WINDOW_JOBS", ge=1, description="waiting jobs looked at")
    window_bytes: ByteSize = Field(
        ByteSize(512 * 1024**2), alias="RADIXQ_WINDOW_BYTES", gt=0, description="memory for them"
    )
    kv_bytes: ByteSize | None = Field(
        None, alias="RADIXQ_KV_BYTES", gt=0, description="KV budget; else from the device"
    )
    result_ttl_s: int = Field(7 * 86_400, alias="RADIXQ_RESULT_TTL_S", ge=1, description="results are kept")
    prompt_ttl_s: int = Field(
        3_600, alias="RADIXQ_PROMPT_TTL_S", ge=1, description="RQ's hash, with the prompt, is kept"
    )
    drain_s: float = Field(10.0, alias="RADIXQ_DRAIN_S", ge=0, description="a stopping worker finishes jobs this long")
    max_job_bytes: ByteSize = Field(
        ByteSize(32 * 1024**2), alias="RADIXQ_MAX_JOB_BYTES", gt=0, description="one job on the wire"
    )
    max_image_bytes: ByteSize = Field(
        ByteSize(32 * 1024**2), alias="RADIXQ_MAX_IMAGE_BYTES", gt=0, description="one picture's file, as it is given"
    )
    max_image_pixels: int = Field(
        50_000_000, alias="RADIXQ_MAX_IMAGE_PIXELS", ge=1, description="one picture, width times height"
    )
    max_pixels: int | None = Field(
        None,
        alias="RADIXQ_MAX_PIXELS",
        ge=65_536,
        description="of one picture, shown to the model: larger ones are scaled down; else as its files say",
    )
    image_urls: bool = Field(False, alias="RADIXQ_IMAGE_URLS", description="producers fetch pictures by http(s)")
    image_fetch_s: float = Field(
        20.0, alias="RADIXQ_IMAGE_FETCH_S", gt=0, description="such a picture has to be there within"
    )
    callbacks: tuple[str, ...] = Field(
        (), alias="RADIXQ_CALLBACKS", description="RQ callbacks that may run, comma separated"
    )
    log: Literal["text", "json"] = Field("text", alias="RADIXQ_LOG", description="form of the log lines")

    @field_validator("model_aliases", "callbacks", mode="before")
    @classmethod
    def _comma_separated(cls, value: object) -> object:
        return tuple(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else value

    @field_validator("home")
    @classmethod
    def _expand(cls, value: Path) -> Path:
        return value.expanduser()

    @field_validator("chat_template_kwargs", mode="before")
    @classmethod
    def _json_object(cls, value: object) -> object:
        return json.loads(value) if isinstance(value, str) else value

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Settings:
        """Read the environment (`os.environ` by default); an empty value counts as not set.

        Raises:
            SettingsError: an unknown `RADIXQ_*` name (with a suggestion), or a value that does not fit.
        """
        everything = os.environ if env is None else env
        ours = (name for name in everything if name in _OTHERS or name.startswith("RADIXQ_"))
        return _read(tuple((name, everything[name]) for name in ours), os.environ.get("HOME"))

    @property
    def url(self) -> str:
        """The Redis URL to use: explicit, else RQ's, else localhost."""
        return self.redis_url or DEFAULT_REDIS_URL

    def rows(self) -> list[tuple[str, str, str]]:
        """Return (name, value, meaning) for every setting, in order; passwords in URLs are hidden."""
        rows = []
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            shown = "" if value is None or value in ((), {}) else _shown(value)
            rows.append((str(field.alias), shown, field.description or ""))
        return rows


@lru_cache(maxsize=4)  # a service that submits reads the same environment for every job; `~` is where HOME says
def _read(given: tuple[tuple[str, str], ...], _home: str | None) -> Settings:
    values: dict[str, Any] = {name: value for name, value in given if value.strip()}
    known = {str(field.alias) for field in Settings.model_fields.values()}
    for name in sorted(values.keys() - known - _OTHERS):
        if not name.startswith(_TESTS):
            close = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {close[0]}?" if close else f"; known are {', '.join(sorted(known))}"
            raise SettingsError(f"unknown setting {name}{hint}")
    known_values = {name: value for name, value in values.items() if name in known}
    known_values.setdefault("RADIXQ_REDIS_URL", values.get("RQ_REDIS_URL"))
    try:
        return Settings.model_validate(known_values)
    except ValidationError as error:
        first = error.errors()[0]
        raise SettingsError(f"{first['loc'][0]}={first['input']!r}: {first['msg']}") from error


def _shown(value: object) -> str:
    if isinstance(value, ByteSize):
        return value.human_readable(decimal=False)
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, dict):
        return json.dumps(value)
    return hide_password(str(value)) if isinstance(value, str) else str(value)


def hide_password(url: str) -> str:
    """Return the URL with its password, if any, replaced by `***`."""
    scheme, sep, rest = url.partition("://")
    credentials, at, host = rest.rpartition("@")
    if not (sep and at and ":" in credentials):
        return url
    return f"{scheme}://{credentials.partition(':')[0]}:***@{host}"
