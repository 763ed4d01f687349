"""What a running batch holds and copies: each prefix once, at any number of levels, whoever joins or leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import BatchKVCache, KVCache

from tests.engines import Bench, bench, prompt
from tests.models import endless
from worker.kv import KV, Batch, Path
from worker.sequence import Prompt

N, D, LAYERS = 2, 16, 3
PER_TOKEN = 2 * LAYERS * N * D * 4


def kv(tokens: int) -> KV:
    held = KV([(mx.zeros((1, N, tokens, D)) + 1, mx.zeros((1, N, tokens, D)) + 2) for _ in range(LAYERS)])
    assert held.nbytes == tokens * PER_TOKEN
    return held


def model(tokens: mx.array, cache: list[Any]) -> mx.array:
    """Write new tokens in every layer, as a model does, and compute nothing else."""
    new = mx.ones((tokens.shape[0], N, tokens.shape[1], D))
    for layer in cache:
        layer.update_and_fetch(new, new)
    return mx.zeros((*tokens.shape, 1))


def filled(paths: list[Path], tail: int) -> Batch:
    batch = Batch(LAYERS, prefill_columns=tail)
    batch.open(paths)
    batch.forward(model, np.zeros((len(paths), tail), np.int32), [tail] * len(paths))
    batch.evaluate()
    return batch


def decode(batch: Batch, steps: int = 1) -> None:
    for _ in range(steps):
        batch.forward(model, np.zeros((len(batch), 1), np.int32), [1] * len(batch))
        batch.evaluate()


@pytest.mark.parametrize("tail", [32, 64, 300, 1000])
def test_32_rows_over_8192_tokens_hold_little_more_than_prefix_and_tails(tail: int) -> None:
    shared = kv(8192)
    batch = filled([Path([(shared, 8192)])] * 32, tail)
    for step in range(1, 40):
        decode(batch)
        needed = (8192 + 32 * (tail + step)) * PER_TOKEN
        assert shared.nbytes + batch.nbytes <= 1.02 * needed, step


def test_stock_holds_25_times_as_much() -> None:
    shared = kv(8192)
    batch = filled([Path([(shared, 8192)])] * 32, 64)
    decode(batch)
    row: Any = KVCache()  # type: ignore[no-untyped-call]
    row.update_and_fetch(mx.zeros((1, N, 8192 + 65, D)), mx.zeros((1, N, 8192 + 65, D)))
    merge: Any = BatchKVCache.merge
    stock = LAYERS * merge([row] * 32).nbytes
    assert stock >= 25 * (shared.nbytes + batch.nbytes)


def test_every_node_of_a_tree_is_held_once_whatever_reads_it(held_bytes: Callable[[], int]) -> None:
    """System, two examples, four documents, eight questions: 16 rows."""
    before = held_bytes()
    system, examples = kv(500), [kv(300) for _ in range(2)]
    documents, questions = [kv(700) for _ in range(4)], [kv(90) for _ in range(8)]
    tokens = 500 + 2 * 300 + 4 * 700 + 8 * 90
    nodes = held_bytes()
    assert nodes - before == pytest.approx(tokens * PER_TOKEN, rel=0.01)
    paths = [
        Path([(system, 500), (examples[row // 8], 300), (documents[row // 4], 700), (questions[row // 2], 90)])
        for row in range(16)
    ]
    batch = filled(paths, 20)
    decode(batch, 3)
    assert batch.copied_tokens == 16 * (500 + 300 + 700 + 90) - tokens
    assert held_bytes() - nodes == pytest.approx(batch.nbytes, rel=0.05)
    read = [segment for part in batch.division.parts for segment in part.plan.segments]
    assert sorted(s.num_tokens for s in read) == sorted([500, *[300] * 2, *[700] * 4, *[90] * 8])
    assert sum(len(s.rows) for s in read) == 16 * 4


def test_rows_that_stay_keep_no_buffer_alive_in_which_others_lay(held_bytes: Callable[[], int]) -> None:
    before, shared = held_bytes(), Path([(kv(2000), 2000)])
    batch = filled([shared] * 8, 300)
    batch.trim([20] + [300] * 7)
    for row in reversed(range(1, 8)):
        batch.leave(row)
    batch.shrink()
    batch.evaluate()
    assert held_bytes() - before == pytest.approx(2000 * PER_TOKEN + batch.nbytes, rel=0.01)


def allocated(held_bytes: Callable[[], int], work: Callable[[], None]) -> int:
    """Return the most bytes that work needed beside what was held: what it copied, and what it made anew."""
    before = held_bytes()
    mx.reset_peak_memory()
    work()
    mx.synchronize()
    return max(0, mx.get_peak_memory() - before)  # the peak counts from the first allocation, and there may be none


def test_who_joins_or_leaves_copies_tails_alone_however_long_the_prefix_is(held_bytes: Callable[[], int]) -> None:
    copied: dict[int, tuple[int, int]] = {}
    for prefix in (64, 512, 8192):
        shared = kv(prefix)
        batch = filled([Path([(shared, prefix)])] * 32, 64)
        newcomer = filled([Path([(shared, prefix)])], 64)
        decode(batch)
        rows = batch.nbytes

        def join(batch: Batch = batch, newcomer: Batch = newcomer) -> None:
            batch.join(newcomer)
            batch.evaluate()

        def leave(batch: Batch = batch) -> None:
            batch.leave(0)
            batch.evaluate()

        copied[prefix] = allocated(held_bytes, leave), allocated(held_bytes, join)
        assert all(path.nodes[0][0] is shared for path in batch.paths)
        assert max(copied[prefix]) <= 0.1 * rows, "a tail, not the others'"
    for figures in zip(*copied.values(), strict=True):
        assert max(figures) - min(figures) < 1000, "bookkeeping"
    assert max(copied[8192]) < 8192 * PER_TOKEN / 100


# -- the same through the engine -------------------------------------------------------------------------------------

PREFIX = 8192
SLIGHT: dict[str, Any] = {
    "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 20_000,
}  # fmt: skip


def ready(max_rows: int = 32) -> Bench:
    """Return an engine on a model that is nearly nothing and never ends an answer by itself."""
    model = endless(**SLIGHT)
    run = bench(model, alone=model, max_rows=max_rows, chunk_tokens=PREFIX)
    run.watched.engine = None  # keep no logits
    return run


def question(number: int, own: int, answer: int) -> Prompt:
    rng = np.random.default_rng(number)
    root = np.random.default_rng(0).integers(0, 290, PREFIX)
    return prompt([*root, number, *rng.integers(0, 290, own)], answer, [PREFIX])


def resident(run: Bench) -> tuple[int, int, int]:
    """Return the tokens that there is room for, that the rows have, and that they had if all tails were the longest."""
    engine = run.engine
    lengths = [len(row.prompt.tokens) - 1 + len(row.generated) - PREFIX for row in engine._running.rows]
    cached = engine.cache.tree.nbytes - engine.cache.tree.pinned_bytes  # of rows that have ended
    held = (engine.stats().cache_bytes - cached) // engine._loaded.kv_bytes_per_token
    return held, PREFIX + sum(lengths), PREFIX + len(lengths) * max(lengths, default=0)


def watched(run: Bench, prompts: dict[str, Prompt]) -> list[tuple[int, int, int]]:
    """Run jobs; return `resident` after every step in which the rows decoded and nobody was prefilled."""
    for job_id, job in prompts.items():
        run.engine.add(job_id, job)
    seen = []
    while run.engine.busy:
        run.engine.step()
        if run.engine.running and run.engine._fill is None:
            seen.append(resident(run))
    return seen


@pytest.mark.parametrize("answer", [16, 64, pytest.param(512, marks=pytest.mark.long)])
def test_a_run_holds_little_more_than_prefix_and_tails_at_every_step_however_long_its_answers_may_be(
    answer: int,
) -> None:
    """Half of the rows end on the way: what they leave behind is given up."""
    run = ready()
    prompts = {str(i): question(i, 31, answer if i % 2 else 2 + i * answer // 40) for i in range(32)}
    seen = watched(run, prompts)
    assert len(seen) >= answer - 2
    for step, (held, needed, _) in enumerate(seen):
        assert held <= 1.02 * needed, step


def test_rows_of_very_different_lengths_hold_little_more_than_prefix_and_tails_too() -> None:
    """Those of like length share buffers. Questions differ, answers too, and new rows come as others leave."""
    run = ready()
    seen = watched(run, {str(i): question(i, 7 + (11 * i) % 50, 2 + (17 * i) % 60) for i in range(90)})
    assert len(seen) > 60
    ratios = [held / needed for held, needed, _ in seen]
    assert np.mean(ratios) <= 1.02
    assert max(ratios) <= 1.05, "lines of rows that left are kept for those that wait"
    assert max(ratios[-20:]) <= 1.02, "nobody waits"
    assert np.mean([rectangle / needed for _, needed, rectangle in seen]) > 1.05, "in one buffer it would be more"


def test_rows_that_begin_together_with_questions_of_all_lengths_stay_within_two_percent() -> None:
    run = ready()
    seen = watched(run, {str(i): question(i, 8 + (11 * i) % 57, 40) for i in range(32)})
    for step, (held, needed, _) in enumerate(seen):
        assert held <= 1.02 * needed, step
    assert min(rectangle / needed for _, needed, rectangle in seen) > 1.05, "in one buffer it would be more"


def test_a_cohort_that_shrinks_to_one_row_and_grows_again_holds_what_it_needs() -> None:
    run = ready()
    run.engine.add("long", question(0, 31, 120))
    for wave in range(3):
        for number in range(31):
            run.engine.add(f"{wave} {number}", question(1 + 31 * wave + number, 31, 6 + number % 5))
        sizes = set[int]()
        while len(run.engine.running) != 1 or len(sizes) < 2:
            run.engine.step()
            assert run.engine._fill is None
            held, needed, _ = resident(run)
            assert held <= 1.02 * needed, (wave, sizes)
            sizes.add(len(run.engine.running))
        assert max(sizes) == 32
        held, needed, _ = resident(run)
        assert held <= 1.02 * needed, "one row alone"
