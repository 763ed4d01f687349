"""What a running batch holds and copies: each prefix once, at any number of levels, whoever joins or leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import BatchKVCache, KVCache

from worker.kv import KV, Batch, Path

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
    batch = Batch(LAYERS, columns=tail)
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
