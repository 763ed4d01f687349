"""The buffers of a batch's private KV: one pair per layer, where every row has a line of its own.

Knows no prefix and no model. Shape letters as in `worker.attention`.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

Pair = tuple[mx.array, mx.array]  # keys and values


class Tails:
    """Keys and values [rows, N, columns, D] per layer, tails left-aligned:

        row 0     a b c . . .
        row 1     d e f g h .        . = free column

    Who uses it knows how long each tail is. A change copies the line it is about; whole buffers are copied where they
    must grow or shrink, at most one layer at a time.
    """  # fmt: skip

    def __init__(self, num_layers: int) -> None:
        self._layers: list[Pair | None] = [None] * num_layers

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, free columns included."""
        return sum(x.nbytes for x in self._arrays())

    def evaluate(self) -> None:
        """Compute them and nothing else."""
        mx.eval(self._arrays())

    def forget(self) -> None:
        """Give all buffers up."""
        self._layers = [None] * len(self._layers)

    @property
    def columns(self) -> int:
        """Columns of the buffers; 0 where there are none."""
        held = self._layers[0]
        return held[0].shape[2] if held else 0

    @property
    def cells(self) -> int:
        """Tokens that the buffers have room for."""
        held = self._layers[0]
        return held[0].shape[0] * held[0].shape[2] if held else 0

    def holds(self, rows: int, columns: int) -> bool:
        """Whether there is room for so many rows and columns."""
        held = self._layers[0]
        return held is not None and held[0].shape[0] >= rows and held[0].shape[2] >= columns

    def reserve(self, rows: int, columns: int, width: int) -> None:
        """Make room for `rows` x `columns`; buffers too small for it, or mostly unused, become `width` columns wide.

        Layers may differ in size: a `join` that lacked the memory leaves some of them grown.
        """
        if not all(self._fits(layer, rows, columns) for layer, held in enumerate(self._layers) if held):
            self.resize(rows, width)

    def resize(self, rows: int, width: int) -> None:
        """Give all buffers so many lines and columns, a layer at a time; what lay beyond is lost."""
        for layer, held in enumerate(self._layers):
            if held:
                fresh = self._layers[layer] = _resized(held[0], rows, width), _resized(held[1], rows, width)
                mx.eval(fresh)

    def join(self, other: Tails, taken: int, first: int, rows: int, columns: int, width: int) -> None:
        """Copy the first `taken` columns of another's rows to rows [first, rows), and reserve as `reserve` does.

        A layer that grows for it is evaluated, and the other's dropped, before the next: so no more than one layer
        is held twice.
        """
        for layer, theirs in enumerate(other._layers):
            if theirs is None:
                continue
            fits = self._fits(layer, rows, columns)
            mine = self._layers[layer] or (theirs[0][:0], theirs[1][:0])
            if not fits:
                mine = self._layers[layer] = _resized(mine[0], rows, width), _resized(mine[1], rows, width)
            for target, source in zip(mine, theirs, strict=True):
                target[first:rows, :, :taken] = source[: rows - first, :, :taken]
            if not fits:
                mx.eval(mine)
                other._layers[layer] = None

    def _fits(self, layer: int, rows: int, columns: int) -> bool:
        """Whether there is room for so many rows and columns in a layer, and not much more."""
        held = self._layers[layer]
        if held is None:
            return False
        held_rows, _, held_columns, _ = held[0].shape
        return bool(rows <= held_rows <= 2 * rows and columns <= held_columns <= 2 * columns + 16)

    def write(self, layer: int, new: Pair, starts: Sequence[int], columns: int) -> Pair:
        """Put new tokens [B, N, L, D] behind each row's first `starts[b]`; return views of the tails, [B, N, S, D].

        `columns` is how many a new buffer has. Rows that begin at different columns take one token.
        """
        rows, length, end = len(starts), new[0].shape[2], max(starts) + new[0].shape[2]
        tails = self._layers[layer]
        if tails is None:
            tails = self._layers[layer] = (_empty(new[0], rows, columns), _empty(new[1], rows, columns))
        for target, added in zip(tails, new, strict=True):
            if min(starts) == max(starts):
                target[:rows, :, end - length : end] = added
            else:
                target[mx.arange(rows), :, mx.array(list(starts))] = added[:, :, 0]
        return tails[0][:rows, :, :end], tails[1][:rows, :, :end]

    def move(self, source: int, target: int, columns: int) -> None:
        """Copy the first columns of one row to another row."""
        self._put(target, [x[source : source + 1, :, :columns] + 0 for x in self._arrays()])

    def drop_front(self, row: int, count: int, stop: int) -> None:
        """Move columns [count, stop) of a row to its beginning."""
        self._put(row, [x[row : row + 1, :, count:stop] + 0 for x in self._arrays()])

    def wipe(self, row: int) -> None:
        """Zero a row."""
        for x in self._arrays():
            x[row] = mx.zeros_like(x[row])

    def copy(self, row: int, start: int, stop: int) -> list[Pair]:
        """Return columns [start, stop) of a row per layer, each [1, N, stop - start, D], detached."""
        return [
            (detached(k[row : row + 1], start, stop), detached(v[row : row + 1], start, stop))
            for k, v in filter(None, self._layers)
        ]

    def whole(self, columns: int) -> list[Pair] | None:
        """Return the buffers themselves if there is one row and it has just so many columns."""
        layers = [pair for pair in self._layers if pair]
        fits = bool(layers) and layers[0][0].shape[0] == 1 and layers[0][0].shape[2] == columns
        return layers if fits else None

    def _put(self, row: int, lines: list[mx.array]) -> None:
        """Overwrite the beginning of a row. MLX copies a buffer that is read and written in one go: first evaluate."""
        mx.eval(lines)
        for x, line in zip(self._arrays(), lines, strict=True):
            x[row : row + 1, :, : line.shape[2]] = line

    def _arrays(self) -> list[mx.array]:
        return [x for pair in self._layers if pair for x in pair]


def detached(x: mx.array, start: int, stop: int) -> mx.array:
    """Copy tokens [start, stop) of [B, N, S, D]. A slice would keep the whole of `x` alive; a gather never does."""
    return mx.take(x, mx.arange(start, stop), axis=2)


def _resized(x: mx.array, rows: int, columns: int) -> mx.array:
    """Copy the first rows and columns of a buffer, and add zeros up to these sizes."""
    fresh, kept = _empty(x, rows, columns), x[:rows, :, :columns]
    fresh[: kept.shape[0], :, : kept.shape[2]] = kept
    return fresh


def _empty(like: mx.array, rows: int, columns: int) -> mx.array:
    return mx.zeros((rows, like.shape[1], columns, like.shape[3]), like.dtype)
