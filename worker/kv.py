"""What a node of the tree holds (`KV`) and what a running batch reads (`Batch`): slice, detach, join, count bytes.

Knows MLX, but no model and no tree. Shape letters as in `worker.attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from worker.attention import Plan, merged, packed

GROWTH = 4  # a tail buffer grows by this many columns, or by a sixteenth of itself


class KV:
    """K and V of a run of tokens for every layer, in buffers of their own; the payload of a tree node.

    Attributes:
        layers: per layer, keys [1, N, P, D] and values [1, N, P, Dv], evaluated.
    """

    __slots__ = ("layers", "nbytes")

    def __init__(self, layers: Sequence[tuple[mx.array, mx.array]]) -> None:
        self.layers = tuple(layers)
        mx.eval(self.layers)
        self.nbytes = sum(k.nbytes + v.nbytes for k, v in self.layers)

    def split(self, at: int) -> tuple[KV, KV]:
        """Return the first `at` tokens and the rest, copied: neither keeps this one's buffers alive."""
        return self.copy(0, at), self.copy(at, self.layers[0][0].shape[2])

    def first(self, count: int) -> Sequence[tuple[mx.array, mx.array]]:
        """Return views of the first `count` tokens, per layer."""
        return [(k[:, :, :count], v[:, :, :count]) for k, v in self.layers]

    def finite(self) -> bool:
        """Whether every value is a finite number."""
        return all_finite([x for pair in self.layers for x in pair])

    def copy(self, start: int, stop: int) -> KV:
        """Return tokens [start, stop) in buffers of their own."""
        return KV([(detached(k, start, stop), detached(v, start, stop)) for k, v in self.layers])


def all_finite(arrays: Sequence[mx.array]) -> bool:
    """Return whether no array holds NaN or infinity."""
    return bool(mx.all(mx.stack([mx.all(mx.isfinite(x)) for x in arrays]))) if arrays else True


def detached(x: mx.array, start: int, stop: int) -> mx.array:
    """Copy tokens [start, stop) of [..., S, D]. A slice would keep the whole of `x` alive; a gather never does."""
    return mx.take(x, mx.arange(start, stop), axis=-2)


class Path:
    """The nodes above one row: payload and how many of its tokens the row uses, from the root down."""

    __slots__ = ("nodes", "num_tokens")

    def __init__(self, nodes: Sequence[tuple[Any, int]] = ()) -> None:
        self.nodes = tuple(nodes)
        self.num_tokens = sum(used for _, used in self.nodes)


class Batch:
    """Rows that run together. A row is a `Path` of shared KV and a tail of its own.

    Tails lie left-aligned in one buffer per layer, [rows, N, columns, D]; row b's new tokens go to the columns after
    its last. Rows join and leave by copying their own tail, never a prefix and never another row's.

        row 0   path 700 tokens    tail  a b c . . .
        row 1   path 512 tokens    tail  d e f g h .        . = free column, masked

    Attributes:
        lengths: tail tokens per row.
    """

    def __init__(self, num_layers: int, *, exact: bool, columns: int = 0) -> None:
        """Make an empty batch whose buffers begin with `columns` columns, for a prefill that knows its length."""
        self.exact = exact
        self._columns = columns
        self.lengths: list[int] = []
        self.paths: list[Path] = []
        self.offset = mx.array([], mx.int32)
        self._tails: list[tuple[mx.array, mx.array] | None] = [None] * num_layers
        self._plan: Plan | None = None
        self._new_tokens = 0

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of the tail buffers, free columns included."""
        return sum(k.nbytes + v.nbytes for k, v in filter(None, self._tails))

    @property
    def num_cohorts(self) -> int:
        """How many different paths the rows have, the empty one not counted."""
        return len({tuple(id(kv) for kv, _ in p.nodes) for p in self.paths if p.nodes})

    @property
    def copied_tokens(self) -> int:
        """Prefix tokens that per-row copies would hold, less those that are held."""
        held = {(id(kv), used) for p in self.paths for kv, used in p.nodes}
        return sum(p.num_tokens for p in self.paths) - sum(used for _, used in held)

    def open(self, paths: Sequence[Path]) -> None:
        """Add one row with an empty tail per path."""
        self.paths.extend(paths)
        self.lengths.extend(0 for _ in paths)
        self._plan = None

    def set_path(self, row: int, path: Path) -> None:
        """Give a row another path with the same tokens (a node was split), or one that took over part of its tail."""
        self.paths[row] = path
        self._plan = None

    def forward(
        self, model: Any, tokens: np.ndarray[Any, np.dtype[np.int32]], counts: Sequence[int], **fed: mx.array
    ) -> mx.array:
        """Run the next tokens [B, L] of all rows, of which row b has `counts[b]`; return the last logits, [B, V].

        What lies behind a row's count is padding: `trim` cuts it off before the row decodes. `fed` is what the model
        takes beside tokens.
        """
        self._begin(tokens.shape[1])
        logits = model(mx.array(tokens), cache=[LayerCache(self, i) for i in range(len(self._tails))], **fed)
        self.lengths = [n + self._new_tokens for n in self.lengths]
        return logits[:, -1]  # type: ignore[no-any-return]

    def _begin(self, new_tokens: int) -> None:
        """Make room for `new_tokens` more per row and fix positions."""
        if new_tokens > 1 and not self._aligned:
            raise RuntimeError("rows with tails of different lengths can only decode, one token at a time")
        self._new_tokens = new_tokens
        starts = [p.num_tokens + n for p, n in zip(self.paths, self.lengths, strict=True)]
        self.offset = mx.array(starts, mx.int32)
        self._reserve(len(self), max(self._columns, max(self.lengths) + new_tokens))

    def trim(self, lengths: Sequence[int]) -> None:
        """Cut each row's tail to its real length: what lies behind it was padding."""
        self.lengths = list(lengths)

    def evaluate(self) -> None:
        """Compute the tails and nothing else: the logits of a prefill chunk are never needed."""
        mx.eval(self._tails)

    def join(self, other: Batch, columns: int = 0) -> None:
        """Append all rows of `other`, copying their tails; `columns` is how many the rows will need, where known.

        Buffers that have to grow for it are copied, and the old ones dropped, layer by layer. If it raises, this
        batch still has its rows and no others.
        """
        first, widest, rows = len(self), max(other.lengths), len(self) + len(other)
        self._columns = columns
        columns = max(columns, widest, *self.lengths)
        grows = not self.holds(rows, columns)
        for i, theirs in enumerate(other._tails):
            if theirs is None:
                continue
            self._reserve_layer(i, rows, columns, like=theirs)
            mine = self._tails[i]
            assert mine is not None
            for target, source in zip(mine, theirs, strict=True):
                target[first:rows, :, :widest] = source[: len(other), :, :widest]
            if grows:
                mx.eval(mine)
                other._tails[i] = None
        self.open(other.paths)
        self.lengths[first:] = other.lengths

    @property
    def columns(self) -> int:
        """Columns of the buffers."""
        held = self._tails[0]
        return self._columns if held is None else held[0].shape[2]

    def holds(self, rows: int, columns: int) -> bool:
        """Whether the buffers have room for so many rows and columns."""
        held = self._tails[0]
        return held is not None and held[0].shape[0] >= rows and held[0].shape[2] >= columns

    def leave(self, row: int) -> None:
        """Remove one row; the last row takes its place in every list."""
        last = len(self) - 1
        if row != last and self.lengths[last]:
            self._move(last, 0, self.lengths[last], to=row)
        self.lengths[row], self.paths[row] = self.lengths[last], self.paths[last]
        del self.lengths[last], self.paths[last]
        self._plan = None
        if not self.lengths:
            self._tails = [None] * len(self._tails)

    def tail(self, row: int, start: int, stop: int, *, last_use: bool = False) -> KV:
        """Copy tokens [start, stop) of one row's tail out.

        `last_use` promises that the batch is dropped now: buffers that hold just these tokens are given away.
        """
        first = self._tails[0]
        if last_use and first and first[0].shape[0] == 1 and (start, stop) == (0, first[0].shape[2]):
            return KV([t for t in self._tails if t])
        return KV([tuple(detached(x[row : row + 1], start, stop) for x in t) for t in filter(None, self._tails)])  # type: ignore[misc]

    def drop_front(self, row: int, count: int) -> None:
        """Forget the first `count` tokens of a row's tail; `set_path` must say who holds them now."""
        self._move(row, count, self.lengths[row], to=row)
        self.lengths[row] -= count

    def _move(self, row: int, start: int, stop: int, *, to: int) -> None:
        """Put tokens [start, stop) of a row at the front of row `to`.

        By way of copies that are there before: a buffer that something still reads is not written in place but copied.
        """
        buffers = [x for tails in filter(None, self._tails) for x in tails]
        moved = [detached(x[row], start, stop) for x in buffers]
        mx.eval(moved)
        for x, copy in zip(buffers, moved, strict=True):
            x[to, :, : stop - start] = copy

    def wipe(self, row: int) -> None:
        """Zero a row's tail: a NaN left in a column would reach the next row there through its mask (0 * NaN)."""
        for tails in filter(None, self._tails):
            for x in tails:
                x[row] = mx.zeros_like(x[row])

    @property
    def plan(self) -> Plan:
        """The shared segments, each once, with the rows that read it."""
        if self._plan is None:
            readers: dict[tuple[int, int], tuple[KV, int, list[int]]] = {}
            for row, path in enumerate(self.paths):
                for kv, used in path.nodes:
                    readers.setdefault((id(kv), used), (kv, used, []))[2].append(row)
            self._plan = Plan(((kv.first(used), rows) for kv, used, rows in readers.values()), len(self))
        return self._plan

    def write(self, layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Put the new tokens of all rows, [B, N, L, D], into the tails; return views of the tails, [B, N, S, D]."""
        if self._tails[layer] is None:
            columns = max(self._columns, max(self.lengths) + self._new_tokens)
            self._tails[layer] = (_empty(keys, len(self), columns), _empty(values, len(self), columns))
        tails = self._tails[layer]
        assert tails is not None
        end = max(self.lengths) + self._new_tokens
        for target, new in zip(tails, (keys, values), strict=True):
            if self._aligned:
                target[: len(self), :, end - self._new_tokens : end] = new
            else:
                target[mx.arange(len(self)), :, mx.array(self.lengths)] = new[:, :, 0]
        return tails[0][: len(self), :, :end], tails[1][: len(self), :, :end]

    def mask(self, new_tokens: int) -> mx.array | None:
        """Return which tail columns a query sees, boolean [B or 1, 1, L, S]; None where it sees them all.

        Query t of row b sees column c if c <= lengths[b] + t.
        """
        if self._aligned and new_tokens == 1:
            return None
        starts = mx.array(self.lengths[:1] if self._aligned else self.lengths)
        last = starts[:, None, None, None] + mx.arange(new_tokens)[None, None, :, None]
        return mx.arange(max(self.lengths) + new_tokens) <= last

    @property
    def _aligned(self) -> bool:
        return min(self.lengths) == max(self.lengths)

    def _reserve(self, rows: int, columns: int) -> None:
        for layer, tails in enumerate(self._tails):
            if tails:
                self._reserve_layer(layer, rows, columns, like=tails)

    def _reserve_layer(self, layer: int, rows: int, columns: int, *, like: tuple[mx.array, mx.array]) -> None:
        """Grow a layer's buffers to hold `rows` x `columns`, or shrink them when most of it is unused."""
        tails = self._tails[layer]
        held_rows, held = (tails[0].shape[0], tails[0].shape[2]) if tails else (0, 0)
        if rows <= held_rows <= 2 * rows and columns <= held <= 2 * columns + 16:
            return
        width = columns if columns <= self._columns else columns + max(GROWTH, columns // 16)
        fresh = (_empty(like[0], rows, width), _empty(like[1], rows, width))
        if tails:
            keep_rows, keep = min(held_rows, rows), min(held, width)
            for target, old in zip(fresh, tails, strict=True):
                target[:keep_rows, :, :keep] = old[:keep_rows, :, :keep]
        self._tails[layer] = fresh


def _empty(like: mx.array, rows: int, columns: int) -> mx.array:
    return mx.zeros((rows, like.shape[1], columns, like.shape[3]), like.dtype)


class LayerCache:
    """One layer's view of a `Batch`, in the form of an mlx-lm cache: `offset`, `make_mask`, `update_and_fetch`.

    `attend` is what `worker.attention.install` makes the model call.
    """

    def __init__(self, batch: Batch, layer: int) -> None:
        self._batch = batch
        self._layer = layer

    @property
    def offset(self) -> mx.array:
        """Position of each row's first new token, int32 [B]."""
        return self._batch.offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Store the new tokens; return the tails."""
        return self._batch.write(self._layer, keys, values)

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None, **_: Any) -> Any:
        """Return the mask over the tails that `attend` will be given back."""
        if window_size is not None:
            raise NotImplementedError("sliding windows do not fit a cache without an end")
        return self._batch.mask(n)

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        *,
        scale: float,
        mask: mx.array | None,
        sinks: mx.array | None,
    ) -> mx.array:
        """Attend to the rows' segments and tails: [B, H, L, D] to [B, H, L, Dv]."""
        plan = self._batch.plan
        if not plan.segments:
            return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
        if sinks is not None or (mask is not None and mask.dtype != mx.bool_):
            raise NotImplementedError("attention sinks, or scores in the mask, over a shared prefix")
        form = packed if self._batch.exact else merged
        return form(queries, keys, values, plan, self._layer, mask=mask, scale=scale)
