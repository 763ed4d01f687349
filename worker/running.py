"""The rows that decode, and the batch that holds their KV: kept in step while rows join, leave and share.

Knows the prefix cache; runs no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from worker.cache import Need, PrefixCache
from worker.radix import common_prefix
from worker.row import Row
from worker.sequence import Tokens

WIDE_TOKENS = 128
"""Where memory allows, tails up to this length stay in the buffers, however short most of them are."""
LEAST_TOKENS = 16
"""Less than this of a tail is not moved into the tree: a node of its own would cost more than it saves."""
SLACK = 1 + 1 / 16
"""Columns are so many times the tails' mean length; what is longer is moved into the tree."""


class Running:
    """Rows and batch, index by index.

    Attributes:
        rows: do not change it from outside.
    """

    def __init__(self, cache: PrefixCache) -> None:
        self.rows: list[Row] = []
        self.batch: Any = cache.new_batch()
        self._cache = cache

    def __len__(self) -> int:
        return len(self.rows)

    def join(self, rows: list[Row], batch: Any) -> None:
        """Take over the rows of another batch."""
        if self._cache.reuse == "shared":
            roomy = self._cache.make_room(self.demand(rows, roomy=True))
            most = self._columns([*self.rows, *rows], roomy=roomy)
            self._even_out(self.rows, self.batch, most)
            self._even_out(rows, batch, most)
            self.batch.join(batch, most)
        else:
            self.batch.join(batch)
        self.rows += rows

    def leave(self, index: int) -> None:
        """Drop a row; the last row takes its index."""
        self._cache.detach(self.rows[index])
        self.batch.leave(index)
        self.rows[index] = self.rows[-1]
        self.rows.pop()

    def demand(self, joining: Sequence[Row] = (), *, leaving: Row | None = None, roomy: bool = False) -> Need:
        """Return what rows hold at most from now on, with those that will join, and while they do."""
        rows = [row for row in (*self.rows, *joining) if row is not leaving]
        if self._cache.reuse != "shared":
            all_, new = (sum(self._cache.nbytes(row.longest) for row in part) for part in (rows, joining))
            return Need(max(all_, self.batch.nbytes + new), len(self.rows) + len(joining))
        columns = self._columns(rows, roomy=roomy)
        whole = self._cache.nbytes(len(rows) * columns)
        prefilled = len(joining) * max((len(row.cacheable) - row.prefix_tokens for row in joining), default=0)
        moved = [over for row in rows if (over := self._too_long(row, columns))]
        lasting, before = max(whole, self.batch.nbytes), self.batch.nbytes + self._cache.nbytes(prefilled)
        copied = 0 if self.batch.holds(len(rows), columns) else whole // self._cache.num_layers  # whenever they grow
        passing = max(0, before - lasting) + copied
        return Need(lasting + self._cache.nbytes(sum(moved)), 2 + len(moved), passing)

    def _columns(self, rows: Sequence[Row], *, roomy: bool) -> int:
        """Return how wide these rows' buffers may become: as the longest tail will, but not much wider than most.

        Where there is room for it, only what a tail is too long by now counts: others may end before it grows.
        """
        tails = [self._cache.tail_tokens(row) for row in rows]
        least = WIDE_TOKENS if roomy else LEAST_TOKENS
        planned = min(max(tails), max(least, int(SLACK * sum(tails) / len(tails)))) if tails else 0
        if roomy:
            planned = max(
                [planned, *(tail for tail, row in zip(tails, rows, strict=True) if row.own_tokens <= planned)]
            )
        return max(planned, self.batch.columns) if self.batch.holds(len(rows), planned) else planned

    def _too_long(self, row: Row, columns: int) -> int:
        """Return how much of a row's tail will be moved into the tree."""
        over = self._cache.tail_tokens(row) - columns
        return max(over, LEAST_TOKENS) if over > 0 else 0

    def share_with(self, row: Row, found_tokens: int, least_tokens: int, joining: Sequence[Row]) -> bool:
        """Put into the tree what a running row holds of a job's prompt, if that is `least_tokens` more than was found.

        Returns whether the tree has changed; `joining` are rows that will run, for which room is left.
        """
        best, shared = -1, found_tokens + least_tokens - 1
        for index, other in enumerate(self.rows):
            if not _alike(other.prompt.tokens, row.prompt.tokens, found_tokens, least_tokens):
                continue
            held = other.tokens(other.prefix_tokens + self.batch.lengths[index])
            if (common := row.prompt.whole(common_prefix(held, row.cacheable))) > shared:
                best, shared = index, common
        return best >= 0 and self._share(self.rows[best], self.batch, best, shared, beside=self.demand(joining))

    def even_out(self) -> None:
        """Before each step, see that one more column fits, so that a long tail does not widen all others."""
        most = self.batch.most
        if self.rows and max(self.batch.lengths) >= most:
            self._even_out(self.rows, self.batch, most - 1)

    def shrink(self) -> None:
        """Give up the room of rows that have left; for when no others are about to take it."""
        if self.rows:
            self.batch.shrink()

    def _even_out(self, rows: list[Row], batch: Any, columns: int) -> None:
        """Move what is too much of tails longer than `columns` into the tree."""
        for index, row in enumerate(rows):
            if (length := batch.lengths[index]) > columns:
                moved = min(length, self._too_long(row, columns))
                self._share(row, batch, index, row.prefix_tokens + moved)

    def _share(self, row: Row, batch: Any, index: int, end: int, beside: Need | None = None) -> bool:
        """Move a row's KV up to depth `end` from its tail into the tree; not if it is not finite: it will fail."""
        moved = end - row.prefix_tokens
        node = self._cache.keep(row, batch, index, end, beside=beside)
        if node is None:
            return False
        batch.drop_front(index, moved)  # may lack the memory: only then does the row change
        self._cache.attach(row, node, end)
        batch.set_path(index, row.path())
        return True


def _alike(a: Tokens, b: Tokens, start: int, count: int) -> bool:
    """Whether two prompts agree right after `start`, or one of them ends there: a cheap look before a whole one."""
    return min(len(a), len(b)) < start + count or bool((a[start : start + count] == b[start : start + count]).all())
