"""Slices that own their memory, and a batch whose rows join, leave and grow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from worker.kv import KV, Batch, LayerCache, Path
from worker.tails import detached

N, D, LAYERS = 2, 4, 3


def kv(tokens: int, seed: int) -> KV:
    rng = np.random.default_rng(seed)
    return KV([tuple(mx.array(rng.standard_normal((1, N, tokens, D))) for _ in range(2)) for _ in range(LAYERS)])  # type: ignore[misc]


def new_tokens(rows: int, columns: int, value: float) -> mx.array:
    return mx.full((rows, N, columns, D), value) + mx.arange(columns)[None, None, :, None]


def feed(batch: Batch, columns: int, value: float) -> None:
    """Run a pass in which every layer writes its new tokens."""

    def model(tokens: mx.array, cache: list[Any]) -> mx.array:
        for layer in cache:
            layer.update_and_fetch(new_tokens(len(batch), columns, value), new_tokens(len(batch), columns, -value))
        return mx.zeros((*tokens.shape, 5))

    batch.forward(model, np.zeros((len(batch), columns), np.int32), [columns] * len(batch))
    batch.evaluate()


def tails(batch: Batch) -> list[list[float]]:
    """Return each row's tail as the first layer's keys hold it."""
    rows = [batch.tail(i, 0, n).layers[0][0][0, 0, :, 0] for i, n in enumerate(batch.lengths)]
    return [np.array(row).round(3).tolist() for row in rows]


def opened(count: int) -> Batch:
    batch = Batch(LAYERS)
    batch.open([Path() for _ in range(count)])
    return batch


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("span", [(0, 10), (990, 1000), (0, 999), (3, 700)])
def test_a_detached_slice_keeps_nothing_else_alive(
    held_bytes: Callable[[], int], span: tuple[int, int], heads: int
) -> None:
    whole = mx.random.normal((1, heads, 1000, 64))
    mx.eval(whole)
    before = held_bytes()
    part = detached(whole, *span)
    mx.eval(part)
    assert mx.array_equal(part, whole[:, :, span[0] : span[1]])
    del whole
    assert held_bytes() - before == pytest.approx(part.nbytes - 1000 * heads * 64 * 4, abs=4096)


def test_split_gives_both_halves_in_buffers_of_their_own() -> None:
    whole = kv(10, 0)
    upper, lower = whole.split(3)
    assert upper.nbytes + lower.nbytes == whole.nbytes
    for (k, v), (ku, vu), (kl, vl) in zip(whole.layers, upper.layers, lower.layers, strict=True):
        assert mx.array_equal(mx.concatenate([ku, kl], axis=2), k)
        assert mx.array_equal(mx.concatenate([vu, vl], axis=2), v)


def test_rows_with_tails_of_different_lengths_each_write_behind_their_own() -> None:
    batch, other = opened(2), opened(1)
    feed(batch, 3, 10)
    feed(other, 1, 50)
    batch.join(other)
    feed(batch, 1, 90)
    assert tails(batch) == [[10, 11, 12, 90], [10, 11, 12, 90], [50, 90]]


def test_the_last_row_takes_the_place_of_one_that_leaves() -> None:
    batch = opened(1)
    feed(batch, 2, 1)
    for value in (20, 30):
        more = opened(1)
        feed(more, value // 10, value)
        batch.join(more)
    batch.leave(0)
    assert tails(batch) == [[30, 31, 32], [20, 21]]
    batch.leave(1)
    batch.leave(0)
    assert len(batch) == 0
    assert batch.nbytes == 0


def test_a_batch_grows_for_new_rows_and_columns_and_shrinks_again() -> None:
    batch = opened(1)
    for step in range(100):
        feed(batch, 1, step)
    assert tails(batch) == [list(map(float, range(100)))]
    wide = batch.nbytes
    short = opened(1)
    feed(short, 1, 7)
    batch.join(short)
    batch.leave(0)
    feed(batch, 1, 8)
    assert tails(batch) == [[7, 8]]
    assert batch.nbytes < wide / 2


def test_the_mask_shows_each_row_its_own_tail_up_to_the_new_token() -> None:
    batch, other = opened(1), opened(1)
    feed(batch, 3, 1)
    cache = LayerCache(batch, 0)
    assert cache.make_mask(1) is None
    assert cache.make_mask(2) == "causal"
    shown = cache.make_mask(2, return_array=True)
    assert np.array(shown).astype(int).tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    feed(other, 2, 2)
    batch.join(other)
    feed(batch, 1, 3)
    (tail,) = batch.read(0)
    assert np.array(tail.mask)[:, 0, 0].astype(int).tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]


def test_a_model_is_given_back_the_new_tokens_alone_wherever_tails_lie() -> None:
    batch = opened(1)
    feed(batch, 3, 1)
    batch._begin(1)
    keys, values = new_tokens(1, 1, 4), new_tokens(1, 1, 5)
    assert LayerCache(batch, 0).update_and_fetch(keys, values) == (keys, values)


def test_what_is_dropped_from_the_front_leaves_the_rest_in_place() -> None:
    batch = opened(2)
    feed(batch, 5, 1)
    batch.drop_front(0, 2)
    batch.set_path(0, Path([(kv(2, 0), 2)]))
    assert tails(batch) == [[3, 4, 5], [1, 2, 3, 4, 5]]
    feed(batch, 1, 9)
    assert batch.offset.tolist() == [5, 5]


def test_a_row_whose_tail_has_gone_to_the_tree_in_part_comes_to_fewer_columns() -> None:
    batch, other = opened(0), opened(1)
    feed(other, 5, 1)
    batch.join(other, [8])
    batch.drop_front(0, 3)
    batch.shrink()
    assert batch.nbytes == 5 * 2 * LAYERS * N * D * 4


def test_a_segment_that_several_rows_read_is_planned_once_and_the_saving_counted() -> None:
    shared, own = kv(200, 0), kv(30, 1)
    batch = Batch(LAYERS)
    batch.open([Path([(shared, 200)]), Path([(shared, 200), (own, 10)]), Path()])
    assert [(s.num_tokens, s.rows) for s in batch.division.parts[0].plan.segments] == [(200, (0, 1)), (10, (1,))]
    assert batch.num_cohorts == 2
    assert batch.copied_tokens == 200


def test_a_node_that_rows_use_up_to_different_depths_is_held_once() -> None:
    node = kv(200, 0)
    batch = Batch(LAYERS)
    batch.open([Path([(node, used)]) for used in (200, 190, 180)])
    assert batch.copied_tokens == 190 + 180


def test_wiping_a_row_leaves_no_nan_behind_a_mask() -> None:
    batch = opened(2)
    feed(batch, 2, float("nan"))
    batch.wipe(0)
    assert batch.tail(0, 0, 2).layers[0][0].sum().item() == 0
    assert np.isnan(batch.tail(1, 0, 2).layers[0][0].sum().item())
