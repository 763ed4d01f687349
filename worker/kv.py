"""What a node of the tree holds (`KV`) and what a running batch reads (`Batch`): slice, detach, join, count bytes.

Knows MLX, but no model and no tree. Shape letters as in `worker.attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from worker.forms import MERGED, Choose, Division, always
from worker.tails import Tails, detached

GROWTH = 2
"""Free columns that a tail buffer gets at least when it grows."""
FREE = 1 / 64
"""Of what rows that share hold, so much may be free room in buffers; three quarters of it are made when they grow."""


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


class Path:
    """The nodes above one row: payload and how many of its tokens the row uses, from the root down."""

    __slots__ = ("nodes", "num_tokens")

    def __init__(self, nodes: Sequence[tuple[Any, int]] = ()) -> None:
        self.nodes = tuple(nodes)
        self.num_tokens = sum(used for _, used in self.nodes)


class Batch:
    """Rows that run together. A row is a `Path` of shared KV and a tail of its own.

    Row b's new tokens go to the columns of `Tails` after its last. Rows join and leave by copying their own tail,
    never a prefix and never another row's.

        row 0   path 700 tokens    tail  a b c
        row 1   path 512 tokens    tail  d e f g h

    Attributes:
        lengths: tail tokens per row.
    """

    def __init__(self, num_layers: int, choose: Choose = MERGED, *, columns: int = 0) -> None:
        """Make an empty batch; `columns` is how long its tails will become where that is near: in a prefill."""
        self.lengths: list[int] = []
        self.paths: list[Path] = []
        self.offset = mx.array([], mx.int32)
        self._choose, self._soon, self._most = choose, columns, 0
        self._tails = Tails(num_layers)
        self._division: Division | None = None
        self._new_tokens = 0

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
        return sum(p.num_tokens for p in self.paths) - sum(used for _, used in self._readers)

    @property
    def isolates(self) -> bool:
        """Whether, as the rows attend now, what is not finite in one of them stays in it."""
        return self.division.isolates

    def open(self, paths: Sequence[Path]) -> None:
        """Add one row with an empty tail per path."""
        self.paths.extend(paths)
        self.lengths.extend(0 for _ in paths)
        self._division = None

    def set_path(self, row: int, path: Path) -> None:
        """Give a row another path with the same tokens (a node was split), or one that took over part of its tail."""
        self.paths[row] = path
        self._division = None

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
        if new_tokens > 1 and min(self.lengths) != max(self.lengths):
            raise RuntimeError("rows with tails of different lengths can only decode, one token at a time")
        if (new_tokens == 1) != (self._new_tokens == 1):
            self._division = None  # other forms suit a prefill
        self._new_tokens = new_tokens
        starts = [p.num_tokens + n for p, n in zip(self.paths, self.lengths, strict=True)]
        self.offset = mx.array(starts, mx.int32)
        needed = self._needed
        self._tails.reserve(len(self), needed, needed + self._spare(needed, self.paths))

    def trim(self, lengths: Sequence[int]) -> None:
        """Cut each row's tail to its real length: what lies behind it was padding."""
        self.lengths = list(lengths)

    def evaluate(self) -> None:
        """Compute the tails and nothing else: the logits of a prefill chunk are never needed."""
        self._tails.evaluate()

    def join(self, other: Batch, most: int = 0) -> None:
        """Append all rows of `other`, copying their tails; no tail will be longer than `most`, where that is known.

        Buffers that have to grow for it are copied, and the old ones dropped, layer by layer. If it raises, this
        batch still has its rows and no others.
        """
        paths, lengths = [*self.paths, *other.paths], [*self.lengths, *other.lengths]
        self._soon, self._most = 0, most
        needed = max(lengths) + 1
        width = needed + self._spare(needed, paths)
        self._tails.join(other._tails, max(other.lengths), len(self), len(lengths), needed, width)
        self.open(other.paths)
        self.lengths = lengths

    def shrink(self) -> None:
        """Give up the lines of rows that have left, and columns, if they are more than a little of what is held."""
        needed = max(self.lengths) + 1
        if self._tails.cells > len(self) * needed + FREE * self._held(needed, self.paths):
            self._tails.resize(len(self), needed + self._spare(needed, self.paths))

    @property
    def columns(self) -> int:
        """Columns of the buffers."""
        return self._tails.columns

    def holds(self, rows: int, columns: int) -> bool:
        """Whether the buffers have room for so many rows and columns."""
        return self._tails.holds(rows, columns)

    @property
    def most(self) -> int:
        """Columns that the buffers come to at most, as they grow with the tails."""
        return max(self._most, self._tails.columns)

    def leave(self, row: int) -> None:
        """Remove one row; the last row takes its place in every list."""
        last = len(self) - 1
        if row != last and self.lengths[last]:
            self._tails.move(last, row, self.lengths[last])
        self.lengths[row], self.paths[row] = self.lengths[last], self.paths[last]
        del self.lengths[last], self.paths[last]
        self._division = None
        if not self.lengths:
            self._tails.forget()

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

    def wipe(self, row: int) -> None:
        """Zero a row's tail: a NaN left in a column would reach the next row there through its mask (0 * NaN)."""
        self._tails.wipe(row)

    @property
    def division(self) -> Division:
        """The rows by form of attention, and the shared segments, each once, with the rows that read it."""
        if self._division is None:
            shared = [(kv.first(used), rows) for kv, used, rows in self._readers.values()]
            self._division = Division(shared, len(self), self._choose, self._new_tokens or 1)
        return self._division

    @property
    def _readers(self) -> dict[tuple[int, int], tuple[KV, int, list[int]]]:
        readers: dict[tuple[int, int], tuple[KV, int, list[int]]] = {}
        for row, path in enumerate(self.paths):
            for kv, used in path.nodes:
                readers.setdefault((id(kv), used), (kv, used, []))[2].append(row)
        return readers

    def write(self, layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Put the new tokens of all rows, [B, N, L, D], into the tails; return views of the tails, [B, N, S, D]."""
        return self._tails.write(layer, (keys, values), self.lengths, self._needed)

    def mask(self, new_tokens: int) -> mx.array | None:
        """Return which tail columns a query sees, boolean [B or 1, 1, L, S]; None where it sees them all.

        Query t of row b sees column c if c <= lengths[b] + t.
        """
        aligned = min(self.lengths) == max(self.lengths)
        if aligned and new_tokens == 1:
            return None
        last = (
            mx.array(self.lengths[:1] if aligned else self.lengths)[:, None, None, None]
            + mx.arange(new_tokens)[None, None, :, None]
        )
        return mx.arange(max(self.lengths) + new_tokens) <= last

    @property
    def _needed(self) -> int:
        """Columns that the call under way needs, and those that follow soon."""
        return max(self._soon, max(self.lengths) + self._new_tokens)

    def _spare(self, columns: int, paths: Sequence[Path]) -> int:
        """Return how many free columns buffers get that need so many: each time they grow, all tails are copied.

        Where rows share, they are few beside what is shared.
        """
        if columns <= self._soon:
            return 0
        spare = columns // 16 + 2 * GROWTH
        if any(path.nodes for path in paths):
            spare = min(spare, max(GROWTH, int(0.75 * FREE * self._held(columns, paths)) // len(paths)))
        return min(spare, self._most - columns) if columns <= self._most else spare

    def _held(self, columns: int, paths: Sequence[Path]) -> int:
        """Return the tokens that rows with tails of so many columns hold, shared ones counted once."""
        shared = {(id(kv), used) for path in paths for kv, used in path.nodes}
        return sum(used for _, used in shared) + len(paths) * columns


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
        division = self._batch.division
        if not division.shares:
            return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
        if sinks is not None or (mask is not None and mask.dtype != mx.bool_):
            raise NotImplementedError("attention sinks, or scores in the mask, over a shared prefix")
        return division.attend(queries, keys, values, self._layer, mask=mask, scale=scale)
