"""Every job's tokens equal mlx-lm's for that job alone: in any batch, in any order, cached or not."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.nn.layers.quantized import quantize

from tests.engines import Bench, alone, bench, family, fastest, logprobs, prompt
from tests.models import tiny
from worker.forms import FORMS
from worker.sequence import Finished, Prompt


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
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("group_size", [32, 64])
def test_4_bit_weights_are_bit_identical_too(group_size: int, dtype: mx.Dtype) -> None:
    ours, twin = tiny(), tiny()
    for model in (ours, twin):
        quantize(model, group_size=group_size, bits=4)
    for seed in range(2):
        engine = bench(ours, alone=twin, exact=True, dtype=dtype)
        prompts = family(np.random.default_rng([seed, group_size]))
        engine.run(prompts, seed=seed)
        assert compare(engine, prompts, dtype=dtype) > 0


def changing(bench: Bench, prompts: dict[str, Prompt]) -> list[int]:
    """Run jobs so that the batch shrinks to one row and grows again; return how many ran at each step."""
    waiting, sizes = list(prompts.items()), [0]
    while waiting or bench.engine.busy:
        if len(bench.engine.running) <= 1 and waiting:
            for job_id, job in waiting[:4]:
                bench.engine.add(job_id, job)
            del waiting[:4]
        for event in bench.engine.step():
            assert isinstance(event, Finished)
            bench.ended[event.id] = event
        bench.engine.check()
        sizes.append(len(bench.engine.running))
    return sizes


def uneven(seed: int) -> dict[str, Prompt]:
    """Return jobs of one cohort: own parts of 1 to 90 tokens, answers of 2 to 40, the longest in every fourth."""
    rng = np.random.default_rng(seed)
    root, prompts = rng.integers(0, 290, 150), {}
    for number in range(12):
        own = rng.integers(0, 290, rng.integers(60, 90) if number % 4 == 0 else rng.integers(1, 9))
        prompts[str(number)] = prompt([*root, *own], 40 if number % 4 == 0 else int(rng.integers(2, 8)), [150])
    return prompts


@pytest.mark.stock_blas
def test_a_cohort_of_very_different_lengths_that_shrinks_to_one_row_and_grows_again_gives_the_same_bits() -> None:
    for seed in range(2):
        engine, prompts = bench(exact=True), uneven(seed)
        sizes = changing(engine, prompts)
        assert [size for size in sizes if size in (1, 4)].count(4) >= 2
        compare(engine, prompts)


@pytest.mark.parametrize("form", [name for name, form in FORMS.items() if form.decodes])
def test_a_cohort_that_shrinks_to_one_row_and_grows_again_gives_the_same_tokens_in_every_form(form: str) -> None:
    engine, prompts = bench(crossover=fastest(form)), uneven(7)
    changing(engine, prompts)
    for job_id, job in prompts.items():
        tokens, rows = alone(engine.alone, job.tokens, job.max_tokens)
        assert not first_difference_is_a_tie(job_id, engine.tokens(job_id), tokens, rows)


def test_a_seed_gives_the_same_answer_alone_and_in_a_batch_that_others_join_and_leave() -> None:
    sampled = {
        job_id: prompt(job.tokens, job.max_tokens, job.branches, temperature=0.8, seed=int(job_id))
        for job_id, job in uneven(3).items()
    }
    together = bench()
    changing(together, sampled)
    for job_id in ("0", "3", "8"):
        only = bench().run({job_id: sampled[job_id]})[job_id]
        event = together.ended[job_id]
        assert isinstance(event, Finished)
        assert event.tokens == only.tokens


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
