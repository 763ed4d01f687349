"""How close logits are to those of a job alone on the same text, by the measure of the benchmark."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.models import smollm2_path, tiny
from worker import model, platform

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def precision(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "ops"))
    return importlib.import_module("bench_precision")


def random_prompts(seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    shared = rng.integers(0, 290, 300).tolist()
    return [[*shared, *rng.integers(0, 290, count).tolist()] for count in (1, 5, 30, 90)]


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_in_float32_every_form_gives_the_same_top_token_and_logits_within_1e_4(
    precision: ModuleType, arch: str
) -> None:
    found = precision.compared(tiny(arch), random_prompts(1), [40, 300], 8)
    assert {name for name in found if name.startswith("radixq")} == {
        "radixq merged", "radixq virtual", "radixq RADIXQ_EXACT=1",
    }  # fmt: skip
    for name, figures in found.items():
        assert figures["top1"] == 1.0, name
        assert figures["max_abs"] < 1e-4, name


@pytest.mark.stock_blas
def test_exact_forms_are_not_off_at_all_on_the_same_text(precision: ModuleType) -> None:
    found = precision.compared(tiny(), random_prompts(2), [40, 300], 8)
    assert found["radixq RADIXQ_EXACT=1"] == {"top1": 1.0, "kl": 0.0, "max_abs": 0.0}


def test_the_measure_is_right_about_logits_that_differ(precision: ModuleType) -> None:
    right = np.log(np.array([[[0.5, 0.25, 0.25]]]))
    got = np.log(np.array([[[0.25, 0.5, 0.25]]]))
    figures = precision.difference(got, right)
    assert figures["top1"] == 0.0
    assert figures["kl"] == pytest.approx(0.25 * np.log(2))
    assert figures["max_abs"] == pytest.approx(np.log(2))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(600)
def test_in_float32_smollm2_gives_the_same_top_token_and_logits_within_1e_4(precision: ModuleType) -> None:
    loaded = model.load(str(smollm2_path()), dtype="float32", device=platform.device())
    prompts, ends = precision.smollm2_prompts(loaded.tokenizer, 5, 3)
    for name, figures in precision.compared(loaded.model, prompts, ends, 6).items():
        assert figures["top1"] == 1.0, name
        assert figures["max_abs"] < 1e-4, name
