"""Rows that run one after another, each on mlx-lm's own cache: for models whose layers keep more than plain KV.

Takes the place of `worker.kv.Batch` behind the same methods. Reuse is a copy: of the prefix's KV (`copied`), or of the
whole state at a depth where it was kept (`snapshot`), which no one can cut.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import CacheList, KVCache

from worker.kv import KV, Path, all_finite
from worker.tails import detached

MakeCache = Callable[[], list[Any]]


class Snapshot:
    """The caches of all layers after some number of tokens, or nothing; the payload of a tree node."""

    __slots__ = ("caches", "nbytes")

    def __init__(self, caches: list[Any] | None) -> None:
        self.caches = None if caches is None else _detached(caches)
        held = arrays(self.caches)
        mx.eval(held)
        self.nbytes = sum(array.nbytes for array in held)

    def finite(self) -> bool:
        """Whether every value is a finite number."""
        return all_finite(arrays(self.caches))

    def split(self, at: int) -> tuple[Snapshot, Snapshot]:
        """Return nothing for the first `at` tokens: a state is whole or useless."""
        return Snapshot(None), self


class Solo:
    """Rows with a cache each. See `worker.kv.Batch` for what the methods promise.

    Attributes:
        lengths: tokens each row has computed beyond its path.
        isolates: always; no row reads what another wrote.
    """

    isolates = True

    def __init__(self, make_cache: MakeCache, *, snapshots: bool) -> None:
        self.lengths: list[int] = []
        self._make_cache, self._snapshots = make_cache, snapshots
        self._caches: list[list[Any]] = []
        self._starts: list[int] = []

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows' caches."""
        return sum(array.nbytes for array in arrays(self._caches))

    @property
    def num_cohorts(self) -> int:
        """None: no two rows share anything while they run."""
        return 0

    @property
    def copied_tokens(self) -> int:
        """None saved."""
        return 0

    def open(self, paths: Sequence[Path]) -> None:
        """Add one row per path, beginning with a copy of what the path holds."""
        for path in paths:
            self._caches.append(self._restored(path))
            self._starts.append(path.num_tokens)
            self.lengths.append(0)

    def set_path(self, row: int, path: Path) -> None:
        """Do nothing: a row has its own copy."""

    def forward(self, model: Any, tokens: np.ndarray[Any, np.dtype[np.int32]], counts: Sequence[int]) -> mx.array:
        """Run each row's tokens; return the logits after its last, [B, V]. Rows without tokens give zeros."""
        self.evaluate()  # what no logits depend on yet would keep the graph of all steps alive
        logits = [
            model(mx.array(line[:count])[None], cache=caches)[:, -1] if count else None
            for line, count, caches in zip(tokens, counts, self._caches, strict=True)
        ]
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        shown = next(row for row in logits if row is not None)
        return mx.concatenate([mx.zeros_like(shown) if row is None else row for row in logits])

    def evaluate(self) -> None:
        """Compute the caches and nothing else."""
        mx.eval(arrays(self._caches))

    def trim(self, lengths: Sequence[int]) -> None:
        """Do nothing: there was no padding."""

    def join(self, other: Solo) -> None:
        """Take over the rows of `other`."""
        self._caches += other._caches
        self._starts += other._starts
        self.lengths += other.lengths

    def leave(self, row: int) -> None:
        """Remove one row; the last row takes its place."""
        last = len(self) - 1
        self._caches[row], self._starts[row] = self._caches[last], self._starts[last]
        self.lengths[row] = self.lengths[last]
        del self._caches[last], self._starts[last], self.lengths[last]

    def clear(self) -> None:
        """Remove all rows."""
        self._caches, self._starts, self.lengths = [], [], []

    def tail(self, row: int, start: int, stop: int, *, last_use: bool = False) -> KV | Snapshot:
        """Copy out tokens [start, stop) of a row's own part, or its whole state, which ends at `stop`."""
        if self._snapshots:
            return Snapshot(self._caches[row])
        span = self._starts[row] + start, self._starts[row] + stop
        return KV([(detached(c.keys, *span), detached(c.values, *span)) for c in self._caches[row]])

    def wipe(self, row: int) -> None:
        """Do nothing: no other row reads this one's memory."""

    def _restored(self, path: Path) -> list[Any]:
        if not path.nodes:
            return self._make_cache()
        if self._snapshots:
            last, _ = path.nodes[-1]
            return copy.deepcopy(last.caches)
        caches = self._make_cache()
        for i, cache in enumerate(caches):
            parts = [kv.first(used)[i] for kv, used in path.nodes]
            cache.keys, cache.values = (mx.concatenate(list(x), axis=2) for x in zip(*parts, strict=True))
            cache.offset = path.num_tokens
        return caches


def leaves(caches: Iterable[Any]) -> Iterator[Any]:
    """Yield the caches that lists of caches consist of."""
    for cache in caches:
        if isinstance(cache, CacheList):
            yield from leaves(cache.caches)
        else:
            yield cache


def arrays(held: Any) -> list[mx.array]:
    """Return every array in caches of any kind, as allocated, free columns included."""
    if isinstance(held, mx.array):
        return [held]
    if isinstance(held, list | tuple):
        return [array for part in held for array in arrays(part)]
    return arrays(list(vars(held).values())) if hasattr(held, "__dict__") else []


def _detached(caches: list[Any]) -> list[Any]:
    """Copy caches with all their arrays: many are slices, each of which would keep a larger buffer alive."""
    copies = {id(array): _gathered(array) for array in arrays(caches)}
    for cache in leaves(caches):
        if type(cache) is KVCache:  # it has room for up to 255 more tokens
            copies |= {id(x): detached(x, 0, cache.offset) for x in (cache.keys, cache.values) if x is not None}
    return copy.deepcopy(caches, copies)


def _gathered(x: mx.array) -> mx.array:
    return mx.take(x, mx.arange(x.shape[0]), axis=0) if x.ndim else x + 0
