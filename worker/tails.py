"""The buffers of a batch's tails: per layer a pair of them per bucket, where every row has a line of its own.

Knows no prefix and no model. Shape letters as in `worker.attention`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from worker.attention import Tail
from worker.buckets import Bucket

Pair = tuple[mx.array, mx.array]  # keys and values


@dataclass(slots=True)
class _Layer:
    """The buffers of one layer, [lines, N, columns, D], and which rows lie in them."""

    buckets: tuple[Bucket, ...]
    pairs: list[Pair]

    def line(self, row: int) -> tuple[int, int]:
        """Return in which bucket a row lies, and on which line."""
        return next((at, held.rows.index(row)) for at, held in enumerate(self.buckets) if row in held.rows)

    def rename(self, buckets: Sequence[Bucket]) -> None:
        """Say which rows lie in the buffers now, bucket by bucket; those that hold none are given up."""
        self.pairs = [pair for pair, held in zip(self.pairs, buckets, strict=True) if held.rows]
        self.buckets = tuple(held for held in buckets if held.rows)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the b rows of one bucket write in this step, and what they see of it.

    Attributes:
        pick: their numbers in the batch, int32 [b]; None where they are all rows, in order.
        num_rows: b; they lie on the first b lines.
        start, stop: columns of the new tokens of the longest tail, and of all where they are equally long; nobody has
            tokens from `stop` on.
        lines, columns: where the one new token of each row goes, int32 [b]; None where all tails are equally long.
        mask: which columns each row sees, its new token included, boolean [b, 1, 1, stop]; None where all of them.
    """

    pick: mx.array | None
    num_rows: int
    start: int
    stop: int
    lines: mx.array | None
    columns: mx.array | None
    mask: mx.array | None


class Tails:
    """Keys and values of every row's tail, left-aligned in a line of its row's bucket:

        bucket 0    row 0     a b c .
                    row 2     d e . .        . = free column
        bucket 1    row 1     f g h i j k .

    Who uses it knows how long each tail is. A change copies the line it is about; whole buffers are copied where rows
    are sorted into other buckets, one layer at a time. Layers may differ: where memory runs out on the way, those that
    were done stay so until the next time.
    """  # fmt: skip

    def __init__(self, num_layers: int) -> None:
        self.buckets: tuple[Bucket, ...] = ()
        self._layers: list[_Layer | None] = [None] * num_layers
        self._places: list[_Place] = []

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, free columns included."""
        return sum(x.nbytes for x in self._arrays())

    def evaluate(self) -> None:
        """Compute them and nothing else."""
        mx.eval(list(self._arrays()))

    def forget(self) -> None:
        """Give all buffers up."""
        self.buckets, self._layers = (), [None] * len(self._layers)

    def arrange(self, buckets: Sequence[Bucket], joining: Tails | None = None, first: int = 0) -> None:
        """Sort all rows into these buckets; those from `first` on come from another's, which is used up.

        Buckets that stay as they are, or only get rows into free lines, are not copied. Where others are, a layer is
        evaluated, and what it was made of dropped, before the next.
        """
        target = tuple(buckets)
        try:
            self._arrange(target, joining, first)
        except BaseException:
            if joining:
                self._part(first)
            raise
        self.buckets = target

    def _arrange(self, target: tuple[Bucket, ...], joining: Tails | None, first: int) -> None:
        for number, layer in enumerate(self._layers):
            theirs = joining._layers[number] if joining else None
            if (layer or theirs) and (layer is None or layer.buckets != target):
                mine = layer or _Layer((), [])
                pairs, copied = _sorted_into(target, mine, theirs, first)
                if copied:
                    mx.eval(pairs)
                    if joining:
                        joining._layers[number] = None
                self._layers[number] = _Layer(target, pairs)
        if joining:
            self.evaluate()  # else all that has joined would be held twice until the next step
            joining.forget()

    def _part(self, first: int) -> None:
        """Forget the rows from `first` on, which have joined in some layers only."""
        if not first:
            self.forget()
        for layer in filter(None, self._layers):
            layer.rename([_before(held, first) for held in layer.buckets])

    def begin(self, lengths: Sequence[int], new_tokens: int) -> None:
        """Say how long the tails are, and how many tokens each gets now; rows of different lengths get one."""
        self._places = [_place(held, lengths, new_tokens) for held in self.buckets]

    def write(self, layer: int, new: Pair) -> None:
        """Put the new tokens of all rows [B, N, L, D] behind their tails."""
        buffers = self._layers[layer]
        if buffers is None:
            buffers = self._layers[layer] = _Layer(self.buckets, [_empty(*new, bucket) for bucket in self.buckets])
        for place, pair in zip(self._places, buffers.pairs, strict=True):
            for target, added in zip(pair, new, strict=True):
                theirs = added if place.pick is None else added[place.pick]
                if place.lines is None:
                    _assign(target, slice(place.num_rows), slice(place.start, place.stop), theirs)
                else:
                    target[place.lines, :, place.columns] = theirs[:, :, 0]

    def read(self, layer: int) -> list[Tail]:
        """Return views of the tails with the new tokens: one per bucket, its lines in order; `rows` is not set."""
        buffers = self._layers[layer]
        assert buffers is not None
        return [
            Tail(k[: place.num_rows, :, : place.stop], v[: place.num_rows, :, : place.stop], place.mask)
            for place, (k, v) in zip(self._places, buffers.pairs, strict=True)
        ]

    def leave(self, row: int, lengths: Sequence[int]) -> None:
        """Drop a row; the last of its bucket takes its line, and the last of all its number."""
        moves = []
        for layer in filter(None, self._layers):
            at, line = layer.line(row)
            end = len(layer.buckets[at].rows) - 1
            used = lengths[layer.buckets[at].rows[end]]
            if line < end and used:
                moves += [(x, line, x[end : end + 1, :, :used] + 0) for x in layer.pairs[at]]
        _put(moves)
        last = len(lengths) - 1
        for layer in filter(None, self._layers):
            layer.rename([_without(held, row, last) for held in layer.buckets])
        self.buckets = tuple(held for bucket in self.buckets if (held := _without(bucket, row, last)).rows)

    def drop_front(self, row: int, count: int, stop: int) -> None:
        """Move columns [count, stop) of a row to its beginning."""
        _put([(x, line, x[line : line + 1, :, count:stop] + 0) for x, line in self._lines(row)])

    def wipe(self, row: int) -> None:
        """Zero a row."""
        for x, line in self._lines(row):
            x[line] = 0

    def copy(self, row: int, start: int, stop: int) -> list[Pair]:
        """Return columns [start, stop) of a row per layer, each [1, N, stop - start, D], detached."""
        parts = [detached(x[line : line + 1], start, stop) for x, line in self._lines(row)]
        return list(zip(parts[::2], parts[1::2], strict=True))

    def whole(self, columns: int) -> list[Pair] | None:
        """Return the buffers themselves if there is one row and it has just so many columns."""
        fits = [(held.lines, held.columns) for held in self.buckets] == [(1, columns)]
        return [layer.pairs[0] for layer in self._layers if layer] if fits else None

    def _lines(self, row: int) -> Iterator[tuple[mx.array, int]]:
        """Yield every buffer that a row has a line in, keys before values, and the line."""
        for layer in filter(None, self._layers):
            at, line = layer.line(row)
            yield from ((x, line) for x in layer.pairs[at])

    def _arrays(self) -> Iterator[mx.array]:
        return (x for layer in self._layers if layer for pair in layer.pairs for x in pair)


def _place(held: Bucket, lengths: Sequence[int], new_tokens: int) -> _Place:
    starts = [lengths[row] for row in held.rows]
    pick = None if held.rows == tuple(range(len(lengths))) else mx.array(held.rows)
    start, stop = max(starts), max(starts) + new_tokens
    if min(starts) == start:
        return _Place(pick, len(starts), start, stop, None, None, None)
    if new_tokens > 1:
        raise RuntimeError("rows with tails of different lengths can only decode, one token at a time")
    columns = mx.array(starts)
    mask = mx.arange(stop) <= columns[:, None, None, None]
    return _Place(pick, len(starts), start, stop, mx.arange(len(starts)), columns, mask)


def _sorted_into(target: Sequence[Bucket], mine: _Layer, theirs: _Layer | None, first: int) -> tuple[list[Pair], bool]:
    """Return the buffers of one layer's rows in other buckets, and whether any had to be copied.

    A row that is in neither has an empty tail.
    """
    lines = _lines_of(mine, 0) | (_lines_of(theirs, first) if theirs else {})
    keys, values = (theirs or mine).pairs[0]
    pairs, copied = list[Pair](), False
    for bucket in target:
        kept, known = _kept(bucket, mine)
        if kept is None:
            kept, copied = _empty(keys, values, bucket), True
        elif known < len(bucket.rows):
            for x in kept:  # a line may still hold a NaN of who was there, behind the end of who comes
                x[known : len(bucket.rows)] = 0
        _fill(kept, known, [lines.get(row) for row in bucket.rows[known:]])
        pairs.append(kept)
    return pairs, copied


def _lines_of(layer: _Layer, first: int) -> dict[int, tuple[Pair, int]]:
    """Return where each row lies; the numbers of rows begin with `first`."""
    held = zip(layer.pairs, layer.buckets, strict=True)
    return {first + row: (pair, line) for pair, bucket in held for line, row in enumerate(bucket.rows)}


def _kept(bucket: Bucket, layer: _Layer) -> tuple[Pair | None, int]:
    """Return the buffers that already are this bucket but for its last rows, and how many rows they have."""
    for held, pair in zip(layer.buckets, layer.pairs, strict=True):
        alike = (held.lines, held.columns) == (bucket.lines, bucket.columns)
        if alike and held.rows == bucket.rows[: len(held.rows)]:
            return pair, len(held.rows)
    return None, 0


def _fill(target: Pair, first: int, sources: Sequence[tuple[Pair, int] | None]) -> None:
    """Copy lines of other buffers to lines from `first` on, as many in one go as follow each other."""
    runs: list[tuple[int, Pair, int, int]] = []  # where to, which buffers, from which line, how many lines
    for to, source in enumerate(sources, first):
        if source is None:
            continue
        pair, line = source
        if runs and runs[-1][1] is pair and (runs[-1][0], runs[-1][2]) == (to - runs[-1][3], line - runs[-1][3]):
            runs[-1] = (*runs[-1][:3], runs[-1][3] + 1)
        else:
            runs.append((to, pair, line, 1))
    for to, pair, line, count in runs:
        columns = min(pair[0].shape[2], target[0].shape[2])
        for x, y in zip(target, pair, strict=True):
            _assign(x, slice(to, to + count), slice(columns), y[line : line + count, :, :columns])


def _without(held: Bucket, row: int, last: int) -> Bucket:
    """Return a bucket without a row, whose line the last one takes; the row `last` is then called as it was."""
    rows = list(held.rows)
    if row in rows:
        rows[rows.index(row)] = rows[-1]
        rows.pop()
    return Bucket(tuple(row if other == last else other for other in rows), held.lines, held.columns)


def _before(held: Bucket, first: int) -> Bucket:
    """Return a bucket without the rows from `first` on, which came last."""
    return Bucket(tuple(row for row in held.rows if row < first), held.lines, held.columns)


def _assign(x: mx.array, lines: slice, columns: slice, new: mx.array) -> None:
    """Write into a buffer. To assign all of it makes MLX take `new` in its place, with what `new` is a view of."""
    x[lines, :, columns] = detached(new, 0, new.shape[2]) if new.shape == x.shape else new


def _put(moves: Iterable[tuple[mx.array, int, mx.array]]) -> None:
    """Overwrite beginnings of lines. MLX copies a buffer that is read and written in one go: first evaluate."""
    if moves := list(moves):
        mx.eval([line for _, _, line in moves])
    for x, number, line in moves:
        x[number : number + 1, :, : line.shape[2]] = line


def detached(x: mx.array, start: int, stop: int) -> mx.array:
    """Copy tokens [start, stop) of [B, N, S, D]. A slice would keep the whole of `x` alive; a gather never does."""
    return mx.take(x, mx.arange(start, stop), axis=2)


def _empty(keys: mx.array, values: mx.array, bucket: Bucket) -> Pair:
    """Return buffers for a bucket, of as many heads, and as wide and precise, as these."""
    shapes = [(bucket.lines, x.shape[1], bucket.columns, x.shape[3]) for x in (keys, values)]
    return mx.zeros(shapes[0], keys.dtype), mx.zeros(shapes[1], values.dtype)
