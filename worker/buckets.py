"""Sort rows into buckets of like length, so that few columns of their buffers stay free. Pure: knows no arrays.

A bucket is one rectangular buffer per layer, as wide as its longest row:

    one bucket          two buckets
    a b c d e f g h     a b c d e f g h
    i j k l m n o .     i j k l m n o .
    p q . . . . . .     p q
    r s t . . . . .     r s t

Every bucket is attended with calls of its own, so there are as few as keep what is free within bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

MOST_BUCKETS = 8
GROWTH = 2
"""Free columns that a bucket gets at least when its buffers are made."""
FREE = 1 / 64
"""Of what rows that share hold, so much may be free room in buffers; three quarters of it beside shorter rows."""
TIGHT, ROOMY = 1 / 16, 1 / 4
"""Of their tails alone, the same: where memory is short, and beside shorter rows where they share little."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Rows whose tails lie in one buffer [lines, N, columns, D] per layer.

    Attributes:
        rows: the row of each line; there may be more lines, which are free.
    """

    rows: tuple[int, ...]
    lines: int
    columns: int

    @property
    def cells(self) -> int:
        """Tokens that it has room for."""
        return self.lines * self.columns


class Room:
    """How many cells of the buffers may be free, for rows that need so many columns and share so many tokens.

    Where more is shared than not, all of it is a small part of what is held. Else, while there is memory, shorter rows
    may leave more free: another bucket would cost more than it saves.

    Attributes:
        beside: free cells beside rows shorter than their bucket, when buckets are made.
        most: free cells with which buckets need not be made anew.
        roomy: whether there is memory for more than a little.
    """

    def __init__(self, needed: Sequence[int], shared: int, *, roomy: bool) -> None:
        own, rows = sum(needed), len(needed)
        self.roomy = roomy
        self._rows, self._longest = rows, max(needed) // 16 + 2 * GROWTH
        if not roomy:
            self._free = int(TIGHT * own)
        elif shared:
            self._free = int(FREE * (shared + own))
        else:
            self._free = self._longest * rows
        self._strict = shared > own or not roomy
        if self._strict:
            self.beside = int(0.75 * self._free)
            self.most = max(self._free, self.beside + GROWTH * rows)
        else:
            self.beside = int(ROOMY * own)
            self.most = self.beside + self.beside // 4 + max(self._free, GROWTH * rows)

    def growth(self, beside: int) -> int:
        """Return how many columns buckets get for tokens to come, where so many cells are free beside shorter rows."""
        free = self._free - beside if self._strict else self._free
        return max(GROWTH, min(self._longest, free // self._rows))


def most_cells(needed: Sequence[int], shared: int, *, roomy: bool) -> int:
    """Return how many cells the buffers come to at most of rows that will need so many columns and share up to this."""
    if not needed:
        return 0
    rooms = [Room(needed, tokens, roomy=roomy) for tokens in (0, shared)]
    groups = sorted_rows(needed, min(room.beside for room in rooms))
    free = max(room.most if roomy else room.beside for room in rooms)
    return max(sum(needed) + free, sum(len(rows) * max(needed[row] for row in rows) for rows in groups))


def made(needed: Sequence[int], limits: Sequence[int], room: Room) -> list[Bucket]:
    """Sort rows into buckets with some columns to grow, as far as their rows can, and as was planned for them."""
    groups = [(rows, max(needed[row] for row in rows)) for rows in sorted_rows(needed, room.beside)]
    least = sum(len(rows) * width for rows, width in groups)
    growth = room.growth(least - sum(needed))
    if not room.roomy:
        growth = min(growth, (most_cells(limits, 0, roomy=False) - least) // len(needed))
    buckets = []
    for rows, width in groups:
        most = max(limits[row] for row in rows)
        buckets.append(Bucket(rows, len(rows), width + max(0, min(growth, most - width))))
    return buckets


def cells(buckets: Sequence[Bucket]) -> int:
    """Return how many tokens buckets have room for."""
    return sum(held.cells for held in buckets)


def sorted_rows(needed: Sequence[int], most_free: int) -> list[tuple[int, ...]]:
    """Return the fewest groups of rows in which at most `most_free` columns stay free, or the best of `MOST_BUCKETS`.

    Row b needs `needed[b]` columns, and a group is as wide as the most of its rows needs. Lengths in order are cut by
    dynamic programming over the number of groups: an optimal group has no row from between another's.
    """
    order = sorted(range(len(needed)), key=lambda row: (-needed[row], row))
    widths = np.array([needed[row] for row in order])
    cuts = _cuts(widths, most_free)
    return [tuple(sorted(order[start:stop])) for start, stop in pairwise(cuts)]


def _cuts(widths: np.ndarray, most_free: int) -> list[int]:
    """Return where groups of descending widths begin, and their number."""
    count = len(widths)
    below = np.concatenate([[0], np.cumsum(widths)])
    start, stop = np.ogrid[:count, 1 : count + 1]
    free = np.where(start < stop, widths[:, None] * (stop - start) - (below[stop] - below[start]), np.inf)
    best, choices = free[0], list[np.ndarray]()  # best[j]: free columns of the first j + 1 rows
    while best[-1] > most_free and len(choices) + 1 < min(MOST_BUCKETS, count):
        ways = best[:-1, None] + free[1:]  # the last group begins after so many rows
        choices.append(np.argmin(ways, axis=0) + 1)
        best = np.min(ways, axis=0)
    cuts = [count]
    for choice in reversed(choices):
        cuts.append(int(choice[cuts[-1] - 1]))
    return [0, *reversed(cuts)]
