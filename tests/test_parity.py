"""Every job's tokens equal mlx-lm's for that job alone: in any batch, in any order, cached or not."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from tests.engines import Bench, alone, bench, family, logprobs
from tests.models import tiny
from worker.sequence import Prompt


def compare(bench: Bench, prompts: dict[str, Prompt], *, dtype: mx.Dtype = mx.float32) -> int:
    """Assert that tokens and log-probabilities are bit-identical to mlx-lm's; return how many steps were compared."""
    steps = 0
    for job_id, job in prompts.items():
        tokens, rows = alone(bench.alone, job.tokens, job.sampling.max_tokens or 0)
        ours = [logprobs(row, dtype) for row in bench.watched.logits[job_id]]
        assert [int(np.argmax(row)) for row in ours] == tokens, f"job {job_id}: other tokens"
        for step, (a, b) in enumerate(zip(ours, rows, strict=True)):
            assert np.array_equal(a, b), f"job {job_id}, step {step}: off by {np.abs(a - b).max()}"
        steps += len(tokens)
    return steps


@pytest.mark.stock_blas
@pytest.mark.parametrize("chunk", [16, 4096])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_logits_of_random_families_are_bit_identical_to_mlx_lm_alone(rows: int, chunk: int) -> None:
    ours, twin = tiny(), tiny()
    compared = 0
    for seed in range(35):  # 6 x 35 = 210 families
        engine = bench(ours, alone=twin, exact=True, max_rows=rows, chunk_tokens=chunk)
        prompts = family(np.random.default_rng([seed, rows, chunk]))
        engine.run(prompts, seed=seed if seed % 2 else None)
        compared += compare(engine, prompts)
    assert compared > 1000


@pytest.mark.stock_blas
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_is_bit_identical_too(dtype: mx.Dtype) -> None:
    ours, twin = tiny(), tiny()
    for seed in range(5):
        engine = bench(ours, alone=twin, exact=True, dtype=dtype)
        prompts = family(np.random.default_rng(seed))
        engine.run(prompts)
        assert compare(engine, prompts, dtype=dtype) > 0


@pytest.mark.stock_blas
def test_a_cache_under_pressure_gives_the_same_bits() -> None:
    ours, twin = tiny(), tiny()
    evicted = 0
    for seed in range(10):
        engine = bench(ours, alone=twin, exact=True, kv_bytes=130_000)  # two longest jobs
        prompts = family(np.random.default_rng(seed), jobs=12)
        engine.run(prompts, seed=seed)
        compare(engine, prompts)
        evicted += engine.engine.stats().evicted_nodes
    assert evicted > 0


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_the_default_form_gives_the_same_tokens(arch: str) -> None:
    """Rounding may differ, so a step counts as a tie, and ends the comparison, if both candidates lie within 1e-4."""
    ours, twin = tiny(arch), tiny(arch)
    ties = 0
    for seed in range(15):
        engine = bench(ours, alone=twin)
        prompts = family(np.random.default_rng(seed))
        engine.run(prompts, seed=seed)
        for job_id, job in prompts.items():
            tokens, rows = alone(twin, job.tokens, job.sampling.max_tokens or 0)
            ties += first_difference_is_a_tie(job_id, engine.tokens(job_id), tokens, rows)
    print(f"{ties} ties")
    assert ties <= 2


def first_difference_is_a_tie(job_id: str, ours: list[int], theirs: list[int], rows: list[np.ndarray]) -> bool:
    """Return whether the answers differ, asserting that they do so first at a tie."""
    for step, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            gap = float(rows[step][b] - rows[step][a])
            print(f"job {job_id}, step {step}: {a} for {b}, {gap:.1e} apart")
            assert gap <= 1e-4
            return True
    assert len(ours) == len(theirs)
    return False
