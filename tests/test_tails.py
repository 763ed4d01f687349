"""Random lives of a batch beside a plain list of tokens per row: who is where, what is read, and what it takes."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.engines import examples
from worker.buckets import GROWTH, MOST_BUCKETS, cells, most_cells
from worker.kv import KV, Batch, Path, _shared_tokens

LAYERS = 2
NEVER = 1 << 30
BROKEN = -1
"""A token whose keys and values are not finite."""


def marks(tokens: list[int], layer: int) -> mx.array:
    """Return what a layer keeps of tokens, [1, 1, S, 2]."""
    return mx.array([[[[token, layer] for token in tokens]]], mx.float32).reshape(1, 1, len(tokens), 2)


class Marks:
    """A model that writes every token's own number in every layer, and notes what rows can read then."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.seen: list[list[list[list[float]]]] = []  # per layer, row and column

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        rows, columns = tokens.shape
        for number, layer in enumerate(cache):
            values = mx.where(tokens == BROKEN, mx.nan, tokens.astype(mx.float32))
            new = mx.stack([values, mx.full(tokens.shape, float(number))], axis=-1)[:, None]
            layer.update_and_fetch(new, -new)
            if not mx.any(tokens == BROKEN):
                self.seen.append(self._read(number))
        return mx.zeros((rows, columns, 1))

    def _read(self, layer: int) -> list[list[list[float]]]:
        tails, seen = self.batch.read(layer), dict[int, list[list[float]]]()
        for part in self.batch.division.parts:
            found = list[list[list[float]]]()
            for tail in [lines.of(tails) for lines in part.lines]:
                assert mx.array_equal(tail.keys, -tail.values), "and all are finite, shown or not"
                numbers = range(len(part.rows)) if tail.rows is None else np.array(tail.rows).tolist()
                for line, number in enumerate(numbers):
                    shown = slice(None) if tail.mask is None else np.array(tail.mask[line, 0, 0])
                    found.append(np.array(tail.keys[line, 0])[shown].tolist())
                    seen[part.rows[number]] = found[-1]
            order = range(len(found)) if part.plan.back is None else np.array(part.plan.back).tolist()
            assert [seen[row] for row in part.rows] == [found[place] for place in order]
        assert len(seen) == len(self.batch)
        return [seen[row] for row in range(len(self.batch))]


@dataclass
class Life:
    """A batch and what its rows should hold; `shared` is what they read above their tails."""

    rng: random.Random
    batch: Batch = field(default_factory=lambda: Batch(LAYERS))
    rows: list[list[int]] = field(default_factory=list)
    limits: list[int] = field(default_factory=list)
    nodes: list[KV] = field(default_factory=list)
    last: int = 0
    calls_left: int = NEVER  # of `mx.eval`, before one finds no memory; those that make newcomers do not count

    def __post_init__(self) -> None:
        """Say what can happen, and how often."""
        self.doings = [self.join, self.leave, self.drop_front, self.shrink, self.clear, self.spoil, *[self.decode] * 6]

    def fresh(self, count: int) -> list[int]:
        self.last += count
        return list(range(self.last - count + 1, self.last + 1))

    def path(self) -> Path:
        if self.rng.random() < 0.5:
            return Path()
        if not self.nodes or self.rng.random() < 0.3:
            tokens = self.fresh(self.rng.choice([3, 40, 150]))
            self.nodes.append(KV([(marks(tokens, n), -marks(tokens, n)) for n in range(LAYERS)]))
        kv = self.rng.choice(self.nodes)
        return Path([(kv, self.rng.randint(1, kv.layers[0][0].shape[2]))])

    def newcomers(self) -> tuple[Batch, list[list[int]], list[int]]:
        count, longest = self.rng.randint(1, 6), self.rng.choice([0, 3, 12, 60])
        lengths = [self.rng.randint(0, longest) for _ in range(count)]
        rows = [self.fresh(length) for length in lengths]
        batch = Batch(LAYERS, prefill_columns=max(lengths))
        batch.open([self.path() for _ in rows])
        done, width = 0, max(lengths)
        while done < width:
            step = self.rng.randint(1, width - done)
            block = np.zeros((count, step), np.int32)
            for line, row in zip(block, rows, strict=True):
                piece = row[done : done + step]
                line[: len(piece)] = piece
            batch.forward(Marks(batch), block, [step] * count)
            batch.evaluate()
            done += step
        batch.trim(lengths)
        return batch, rows, [len(row) + self.rng.choice([1, 2, 5, 30]) for row in rows]

    def join(self) -> None:
        left, self.calls_left = self.calls_left, NEVER
        self.end()
        batch, rows, limits = self.newcomers()
        self.calls_left = left
        roomy = self.rng.random() < 0.5
        known = self.rng.random() < 0.8
        self.batch.join(batch, limits if known else [], roomy=roomy)
        self.rows += rows
        self.limits += limits if known else [1 << 20] * len(rows)

    def leave(self, row: int | None = None) -> None:
        if self.rows:
            row = self.rng.randrange(len(self.rows)) if row is None else row
            self.batch.leave(row)
            self.rows[row], self.limits[row] = self.rows[-1], self.limits[-1]
            del self.rows[-1], self.limits[-1]

    def drop_front(self) -> None:
        long = [number for number, row in enumerate(self.rows) if len(row) > 1]
        if long:
            row = self.rng.choice(long)
            count = self.rng.randint(1, len(self.rows[row]))
            moved = self.batch.tail(row, 0, count)
            path = self.batch.paths[row]
            self.batch.drop_front(row, count)
            self.batch.set_path(row, Path([*path.nodes, (moved, count)]))
            self.rows[row] = self.rows[row][count:]
            self.limits[row] -= count

    def end(self) -> None:
        """Let rows leave that have come to their limit."""
        for number in reversed(range(len(self.rows))):
            if len(self.rows[number]) >= self.limits[number]:
                self.leave(number)

    def decode(self) -> None:
        self.end()
        if not self.rows:
            return
        new = self.fresh(len(self.rows))
        model = Marks(self.batch)
        self.batch.forward(model, np.array(new, np.int32)[:, None], [1] * len(new))
        for row, token in zip(self.rows, new, strict=True):
            row.append(token)
        for layer, seen in enumerate(model.seen):
            assert seen == [[[token, layer] for token in row] for row in self.rows]

    def spoil(self) -> None:
        """Decode a row to what is not finite; rows that end in that step leave around it, the last first."""
        self.end()
        if len(self.rows) < 2:
            return
        count = len(self.rows)
        spoiled, leaving = self.rng.randrange(count), self.rng.sample(range(count), count // 2)
        new = self.fresh(count)
        fed = np.array([BROKEN if row == spoiled else token for row, token in enumerate(new)], np.int32)
        self.batch.forward(Marks(self.batch), fed[:, None], [1] * count)
        for row, token in zip(self.rows, fed.tolist(), strict=True):
            row.append(token)
        for number in sorted({spoiled, *leaving}, reverse=True):
            if self.rows[number][-1] == BROKEN:
                self.batch.wipe(number)
            self.leave(number)

    def shrink(self) -> None:
        if self.rows:
            self.batch.shrink()

    def clear(self) -> None:
        if self.rng.random() < 0.1:
            self.batch.clear()
            self.rows, self.limits = [], []

    def step(self) -> None:
        before, planned, doing = cells(self.batch._tails.buckets), self.planned(), self.rng.choice(self.doings)
        doing()
        assert cells(self.batch._tails.buckets) <= max(before, planned, self.planned()), doing

    def planned(self) -> int:
        """Return the cells that are reserved for rows."""
        return most_cells(self.limits, _shared_tokens(self.batch.paths), roomy=self.batch.roomy)

    def check(self) -> None:
        """Compare what is held with what should be."""
        batch = self.batch
        assert batch.lengths == [len(row) for row in self.rows]
        for number, row in enumerate(self.rows):
            for layer, pair in enumerate(batch.tail(number, 0, len(row)).layers):
                for array, sign in zip(pair, (1, -1), strict=True):
                    assert np.array(array[0, 0]).tolist() == [[sign * token, sign * layer] for token in row]
        buckets = batch._tails.buckets
        assert sorted(row for held in buckets for row in held.rows) == list(range(len(self.rows)))
        assert all(len(held.rows) <= held.lines for held in buckets)
        assert len(buckets) <= min(MOST_BUCKETS, len(self.rows))
        for layer_held in filter(None, batch._tails._layers):
            arrays = [x for pair in layer_held.pairs for x in pair]
            assert len({id(x) for x in arrays}) == len(arrays)
            assert all(held.rows for held in layer_held.buckets)
            for held, (k, v) in zip(layer_held.buckets, layer_held.pairs, strict=True):
                assert k.shape == v.shape == (held.lines, 1, held.columns, 2)
        batch.evaluate()


@pytest.mark.parametrize("seed", range(examples(6)))
def test_rows_hold_and_read_their_own_tokens_whoever_joins_leaves_and_moves(seed: int) -> None:
    life = Life(random.Random(seed))
    for _ in range(40):
        life.step()
        life.check()


@pytest.mark.parametrize("seed", range(examples(6)))
def test_memory_that_runs_out_anywhere_leaves_every_row_as_it_was_or_as_it_should_be(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who was joining has not joined, a row that was leaving is there, a step has not been."""
    life, plain = Life(random.Random(seed)), mx.eval

    def evaluate(*arrays: Any) -> None:
        life.calls_left -= 1
        if life.calls_left == 0:
            raise MemoryError
        plain(*arrays)

    monkeypatch.setattr(mx, "eval", evaluate)
    life.doings = [life.join, life.leave, life.drop_front, life.shrink, *[life.decode] * 3]
    failures = 0
    for _ in range(60):
        life.calls_left = life.rng.randint(1, 2 + LAYERS)
        try:
            life.step()
        except MemoryError:
            failures += 1
        life.calls_left = NEVER
        life.check()
    assert failures


def test_a_nan_that_a_row_left_where_it_lay_before_it_moved_reaches_nobody_who_comes_there() -> None:
    life = Life(random.Random(0), Batch(LAYERS))
    kv = KV([(mx.zeros((1, 1, 4000, 2)), mx.zeros((1, 1, 4000, 2))) for _ in range(LAYERS)])

    def join(lengths: list[int]) -> None:
        rows, other = [life.fresh(length) for length in lengths], Batch(LAYERS, prefill_columns=max(lengths))
        other.open([Path([(kv, 4000)])] * len(rows))
        other.forward(Marks(other), np.array(rows, np.int32), lengths)
        life.batch.join(other, [40] * len(rows))
        life.rows += rows
        life.limits += [40] * len(rows)

    join([8, 8, 8])
    life.batch.forward(Marks(life.batch), np.array([[4], [5], [BROKEN]], np.int32), [1, 1, 1])
    life.rows = [[*row, token] for row, token in zip(life.rows, (4, 5, BROKEN), strict=True)]
    life.leave(0)
    assert life.rows[0][-1] == BROKEN, "the last takes its place"
    life.batch.wipe(0)
    life.leave(0)
    buckets = life.batch._tails.buckets
    for _ in range(2):
        join([5])
    assert [(b.lines, b.columns) for b in life.batch._tails.buckets] == [(b.lines, b.columns) for b in buckets]
    life.decode()
    life.check()


def test_buffers_of_rows_too_different_for_eight_buckets_are_not_made_anew_in_every_step() -> None:
    rng, batch, other = random.Random(0), Batch(LAYERS), Batch(LAYERS, prefill_columns=300)
    lengths = [rng.randint(1, 300) for _ in range(32)]
    kv = KV([(mx.zeros((1, 1, 8000, 2)), mx.zeros((1, 1, 8000, 2))) for _ in range(LAYERS)])
    other.open([Path([(kv, 8000)])] * 32)
    other.forward(Marks(other), np.zeros((32, 300), np.int32), lengths)
    other.trim(lengths)
    batch.join(other, [length + 60 for length in lengths])
    made = []
    for _ in range(20):
        batch.forward(Marks(batch), np.zeros((32, 1), np.int32), [1] * 32)
        batch.shrink()
        batch.evaluate()
        made.append(batch._tails.buckets)
    assert len(made[-1]) == MOST_BUCKETS
    assert len(set(made)) <= len(made) // GROWTH + 1
