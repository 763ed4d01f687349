"""The buffers of a batch's private KV: one pair per layer, where every row has a line of its own.

Knows no prefix and no model. Shape letters as in `worker.attention`.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx


class Tails:
    """Keys and values [rows, N, columns, D] per layer, tails left-aligned:

        row 0     a b c . . .
        row 1     d e f g h .        . = free column

    Who uses it knows how long each tail is. A change copies the line it is about, never a whole buffer, but for
    `reserve`.
    """  # fmt: skip

    def __init__(self, num_layers: int) -> None:
        self._layers: list[tuple[mx.array, mx.array] | None] = [None] * num_layers

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

    def reserve(self, rows: int, columns: int, spare: int, like: Tails | None = None) -> None:
        """Grow the buffers to `rows` x `columns` and `spare` more columns, or shrink them when most of it is unused.

        A layer without buffers gets them in the form of `like`'s.
        """
        for i, tails in enumerate(self._layers):
            source = tails or (like._layers[i] if like else None)
            if source is None:
                continue
            held = tails[0].shape if tails else (0, 0, 0, 0)
            if held[0] >= rows and columns <= held[2] <= 2 * columns + 16 and held[0] <= 2 * rows:
                continue
            width = columns + spare
            fresh = (_empty(source[0], rows, width), _empty(source[1], rows, width))
            if tails:
                keep_rows, keep = min(held[0], rows), min(held[2], width)
                for target, old in zip(fresh, tails, strict=True):
                    target[:keep_rows, :, :keep] = old[:keep_rows, :, :keep]
            self._layers[i] = fresh

    def write(
        self, layer: int, new: tuple[mx.array, mx.array], starts: Sequence[int], columns: int
    ) -> tuple[mx.array, mx.array]:
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

    def append(self, first: int, other: Tails, rows: int, columns: int) -> None:
        """Copy the first columns of another's rows to the rows from `first` on; they must be reserved."""
        for target, source in zip(self._arrays(), other._arrays(), strict=True):
            target[first : first + rows, :, :columns] = source[:rows, :, :columns]

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

    def copy(self, row: int, start: int, stop: int) -> list[tuple[mx.array, mx.array]]:
        """Return columns [start, stop) of a row per layer, each [1, N, stop - start, D], detached."""
        return [
            (detached(k[row : row + 1], start, stop), detached(v[row : row + 1], start, stop))
            for k, v in filter(None, self._layers)
        ]

    def whole(self, columns: int) -> list[tuple[mx.array, mx.array]] | None:
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


def _empty(like: mx.array, rows: int, columns: int) -> mx.array:
    return mx.zeros((rows, like.shape[1], columns, like.shape[3]), like.dtype)
