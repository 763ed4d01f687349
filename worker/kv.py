"""What a node of the tree holds (`KV`) and what a running batch reads (`Batch`): slice, detach, join, count bytes.

Knows MLX, but no model and no tree. Shape letters as in `worker.attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from worker.attention import Tail
from worker.buckets import Bucket, Room, cells, made
from worker.forms import MERGED, Choose, Division, always
from worker.tails import Tails, detached

_ENDLESS = 1 << 32  # columns
_TESTED = 8  # arrays at once


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
    """Return whether no array holds NaN or infinity. A few at a time: what is computed of them is large beside them."""
    groups = (arrays[first : first + _TESTED] for first in range(0, len(arrays), _TESTED))
    return all(bool(mx.all(mx.stack([mx.all(mx.isfinite(x)) for x in group]))) for group in groups)


class Path:
    """The nodes above one row: payload and how many of its tokens the row uses, from the root down."""

    __slots__ = ("nodes", "num_tokens")

    def __init__(self, nodes: Sequence[tuple[Any, int]] = ()) -> None:
        self.nodes = tuple(nodes)
        self.num_tokens = sum(used for _, used in self.nodes)


class Batch:
    """Rows that run together. A row is a `Path` of shared KV and a tail of its own.

    Row b's new tokens go to the columns of `Tails` after its last. Rows join and leave by copying their own tail,
    never a prefix, and never another row's unless buckets have to be made anew.

        row 0   path 700 tokens    tail  a b c
        row 1   path 512 tokens    tail  d e f g h

    Attributes:
        lengths: tail tokens per row.
        roomy: whether there is memory for buffers of which more than a little is free.
        shown: the mask of the prefill under way, if the model asked for an array.
    """

    def __init__(self, num_layers: int, choose: Choose = MERGED, *, prefill_columns: int | None = None) -> None:
        """Make an empty batch.

        Args:
            choose: which form of attention its rows take.
            prefill_columns: how many columns the tails come to in this prefill, whose last chunk may be one column
                wide; None in a batch that decodes, where only a call of several columns is taken for a prefill.
        """
        self.lengths: list[int] = []
        self.paths: list[Path] = []
        self.offset = mx.array([], mx.int32)
        self._limits: list[int] = []  # columns that each row's tail can come to
        self._choose, self._prefill_columns, self.roomy = choose, prefill_columns, True
        self._tails = Tails(num_layers)
        self._division: Division | None = None
        self._prefills = prefill_columns is not None
        self.shown: mx.array | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of the tail buffers, free columns included."""
        return self._tails.nbytes

    @property
    def num_cohorts(self) -> int:
        """How many different paths the rows have, the empty one not counted."""
        return len({tuple(id(kv) for kv, _ in p.nodes) for p in self.paths if p.nodes})

    @property
    def copied_tokens(self) -> int:
        """Prefix tokens that per-row copies would hold, less those that are held."""
        return sum(p.num_tokens for p in self.paths) - _shared_tokens(self.paths)

    @property
    def isolates(self) -> bool:
        """Whether, as the rows attend now, what is not finite in one of them stays in it."""
        return self.division.isolates

    def open(self, paths: Sequence[Path]) -> None:
        """Add one row with an empty tail per path."""
        self.paths.extend(paths)
        self.lengths.extend(0 for _ in paths)
        self._limits.extend(_ENDLESS for _ in paths)
        self._division = None

    def set_path(self, row: int, path: Path) -> None:
        """Give a row another path with the same tokens (a node was split), or one that took over part of its tail."""
        self.paths[row] = path
        self._division = None

    def forward(
        self, model: Any, tokens: np.ndarray[Any, np.dtype[np.int32]], counts: Sequence[int], **fed: mx.array
    ) -> mx.array:
        """Run the next tokens [B, L] of all rows, of which row b has `counts[b]`; return the last logits, [B, V].

        What lies behind a row's count is padding: `trim` cuts it off before the row decodes. It runs like tokens here,
        where nobody reads the counts; `worker.solo.Solo`, which may stand in this place, runs none of it. `fed` is what
        the model takes beside tokens.
        """
        self._begin(tokens.shape[1])
        logits = model(mx.array(tokens), cache=[LayerCache(self, i) for i in range(len(self._tails))], **fed)
        self.lengths = [n + tokens.shape[1] for n in self.lengths]
        return logits[:, -1]  # type: ignore[no-any-return]

    def repeat(self, model: Any, tokens: np.ndarray[Any, np.dtype[np.int32]], **fed: mx.array) -> mx.array:
        """Run the last `forward` again, in the form that keeps what is not finite within its row."""
        self.lengths = [n - tokens.shape[1] for n in self.lengths]
        usual, self._choose, self._division = self._choose, always("alone"), None
        try:
            return self.forward(model, tokens, [tokens.shape[1]] * len(self), **fed)
        finally:
            self._choose, self._division = usual, None

    def _begin(self, new_tokens: int) -> None:
        """Make room for `new_tokens` more per row and fix positions."""
        prefills = self._prefill_columns is not None or new_tokens > 1
        if prefills != self._prefills:
            self._prefills, self._division = prefills, None  # other forms suit a prefill
        starts = [p.num_tokens + n for p, n in zip(self.paths, self.lengths, strict=True)]
        self.offset = mx.array(starts, mx.int32)
        planned = self._prefill_columns or 0
        needed = [max(planned, n + new_tokens) for n in self.lengths]
        if not self._hold(needed):
            limits = [planned] * len(self) if planned >= max(needed) else self._limits
            self._arrange(made(needed, limits, self._room(needed)))
        self._tails.arrange(self._tails.buckets)  # layers that lacked the memory for it before
        self._tails.begin(self.lengths, new_tokens)
        self.shown = None

    def trim(self, lengths: Sequence[int]) -> None:
        """Cut each row's tail to its real length: what lies behind it was padding."""
        self.lengths = list(lengths)

    def evaluate(self) -> None:
        """Compute the tails and nothing else: the logits of a prefill chunk are never needed."""
        self._tails.evaluate()

    def join(self, other: Batch, limits: Sequence[int] = (), *, roomy: bool = True) -> None:
        """Append all rows of `other`, copying their tails.

        Args:
            limits: how many columns each of them can come to, where that is known.
            roomy: the same from now on as the attribute.

        If it raises, this batch still has its rows and no others.
        """
        first, lengths = len(self), [*self.lengths, *other.lengths]
        paths, limits = [*self.paths, *other.paths], [*self._limits, *(limits or other._limits)]
        needed = [n + 1 for n in lengths]
        room = Room(needed, _shared_tokens(paths), roomy=roomy)
        buckets, fresh = self._filled_up(needed), made(needed, limits, room)
        if buckets is None or cells(buckets) > max(sum(needed) + room.most, cells(fresh)):
            buckets = fresh
        self._tails.arrange(buckets, other._tails, first)
        self.lengths, self.paths, self._limits = lengths, paths, limits
        self.roomy, self._division = roomy, None

    def _filled_up(self, needed: Sequence[int]) -> list[Bucket] | None:
        """Return the buckets with new rows in free lines; None if they do not fit."""
        buckets = list(self._tails.buckets)
        for row in range(len(self), len(needed)):
            fits = [b for b in buckets if len(b.rows) < b.lines and b.columns >= needed[row]]
            if not fits:
                return None
            at = buckets.index(min(fits, key=lambda b: b.columns))
            buckets[at] = replace(buckets[at], rows=(*buckets[at].rows, row))
        return None if any(b.columns < needed[row] for b in buckets for row in b.rows) else buckets

    def shrink(self) -> None:
        """Give up the lines of rows that have left, and columns, if they are more than a little of what is held."""
        needed = [n + 1 for n in self.lengths]
        room = self._room(needed)
        held = cells(self._tails.buckets)
        if held > sum(needed) + room.most and held > cells(fresh := made(needed, self._limits, room)):
            self._arrange(fresh)

    def _arrange(self, buckets: Sequence[Bucket]) -> None:
        self._tails.arrange(buckets)
        self._division = None

    def _room(self, needed: Sequence[int]) -> Room:
        return Room(needed, _shared_tokens(self.paths), roomy=self.roomy)

    @property
    def full(self) -> bool:
        """Whether the next token of all rows takes other buffers."""
        return not self._hold([n + 1 for n in self.lengths])

    def _hold(self, needed: Sequence[int]) -> bool:
        """Whether every row has a line that is long enough."""
        buckets = self._tails.buckets
        rows = sum(len(b.rows) for b in buckets)
        return rows == len(self) and all(b.columns >= needed[row] for b in buckets for row in b.rows)

    def leave(self, row: int) -> None:
        """Remove one row; the last row takes its place in every list."""
        self._tails.leave(row, self.lengths)
        self.lengths[row], self.paths[row], self._limits[row] = self.lengths[-1], self.paths[-1], self._limits[-1]
        del self.lengths[-1], self.paths[-1], self._limits[-1]
        self._division = None
        if not self.lengths:
            self.clear()

    def clear(self) -> None:
        """Remove all rows; needs no memory."""
        self._tails.forget()
        self.lengths, self.paths, self._limits, self._division = [], [], [], None

    def tail(self, row: int, start: int, stop: int, *, last_use: bool = False) -> KV:
        """Copy tokens [start, stop) of one row's tail out.

        `last_use` promises that the batch is dropped now: buffers that hold just these tokens are given away.
        """
        given = self._tails.whole(stop) if last_use and start == 0 else None
        return KV(given or self._tails.copy(row, start, stop))

    def drop_front(self, row: int, count: int) -> None:
        """Forget the first `count` tokens of a row's tail; `set_path` must say who holds them now."""
        self._tails.drop_front(row, count, self.lengths[row])
        self.lengths[row] -= count
        self._limits[row] -= count

    def wipe(self, row: int) -> None:
        """Zero a row's tail: a NaN left in a column would reach the next row there through its mask (0 * NaN)."""
        self._tails.wipe(row)

    @property
    def division(self) -> Division:
        """The rows by form of attention, and the shared segments, each once, with the rows that read it."""
        if self._division is None:
            shared = [(kv.first(used), rows) for kv, used, rows in self._readers.values()]
            buckets = [held.rows for held in self._tails.buckets] or None
            new_tokens = 2 if self._prefills else 1  # also for a chunk of one column: it must not spoil its mates
            self._division = Division(shared, len(self), self._choose, new_tokens, buckets)
        return self._division

    @property
    def _readers(self) -> dict[tuple[int, int], tuple[KV, int, list[int]]]:
        readers: dict[tuple[int, int], tuple[KV, int, list[int]]] = {}
        for row, path in enumerate(self.paths):
            for kv, used in path.nodes:
                readers.setdefault((id(kv), used), (kv, used, []))[2].append(row)
        return readers

    def write(self, layer: int, keys: mx.array, values: mx.array) -> None:
        """Put the new tokens of all rows, [B, N, L, D], into the tails."""
        self._tails.write(layer, (keys, values))

    def read(self, layer: int) -> list[Tail]:
        """Return views of the tails with the new tokens, one per bucket."""
        return self._tails.read(layer)


def _shared_tokens(paths: Sequence[Path]) -> int:
    """Return the tokens above rows, shared ones counted once, also where one row uses more of a node than another."""
    most = dict[int, int]()
    for path in paths:
        for kv, used in path.nodes:
            most[id(kv)] = max(used, most.get(id(kv), 0))
    return sum(most.values())


class LayerCache:
    """One layer's view of a `Batch`, in the form of an mlx-lm cache: `offset`, `make_mask`, `update_and_fetch`.

    `attend` is what `worker.hook.install` makes the model call.
    """

    def __init__(self, batch: Batch, layer: int) -> None:
        self._batch = batch
        self._layer = layer

    @property
    def offset(self) -> mx.array:
        """Position of each row's first new token, int32 [B]."""
        return self._batch.offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Store the new tokens and return them, and no others: what rows see lies in several places."""
        self._batch.write(self._layer, keys, values)
        return keys, values

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None, **_: Any) -> Any:
        """Return what `attend` will be given back; which columns rows see it knows by itself."""
        if window_size is not None:
            raise NotImplementedError("sliding windows do not fit a cache without an end")
        if n == 1:
            return None
        if not return_array:
            return "causal"
        if self._batch.shown is None:
            columns = self._batch.lengths[0] + n
            self._batch.shown = mx.arange(columns) <= columns - n + mx.arange(n)[:, None]
        return self._batch.shown

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        *,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None,
    ) -> mx.array:
        """Attend to the rows' segments and tails: [B, H, L, D] to [B, H, L, Dv]."""
        given = None if queries.shape[2] == 1 else "causal" if isinstance(mask, str) else self._batch.shown
        ours = mask == given if isinstance(mask, str) else mask is given
        if sinks is not None or not ours:
            raise NotImplementedError("attention sinks, or a mask of the model's own, over a shared prefix")
        return self._batch.division.attend(queries, self._batch.read(self._layer), self._layer, scale=scale)
