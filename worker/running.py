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

UNEVEN_TOKENS = 128
"""A tail this long may be moved into the tree, to keep the batch's buffers small."""
SLACK = 1 + 1 / 16
"""Buffers may be so much larger than what the rows in them need."""


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
            self._even_out([(self.rows, self.batch), (rows, batch)])
        self.batch.join(batch, self._columns([*self.rows, *rows]))
        self.rows += rows

    def leave(self, index: int) -> None:
        """Drop a row; the last row takes its index."""
        self._cache.detach(self.rows[index])
        self.batch.leave(index)
        self.rows[index] = self.rows[-1]
        self.rows.pop()

    def demand(self, joining: Sequence[Row] = (), *, leaving: Row | None = None) -> Need:
        """Return what rows hold at most from now on, with those that will join, and while they do."""
        rows = [row for row in (*self.rows, *joining) if row is not leaving]
        if self._cache.reuse != "shared":
            mine, theirs = (sum(self._cache.nbytes(row.longest) for row in part) for part in (rows, joining))
            return Need(max(mine, self.batch.nbytes + theirs), len(self.rows) + len(joining))
        whole = self._cache.nbytes(self._buffer_tokens(rows))
        prefilled = max((len(row.cacheable) - row.prefix_tokens for row in joining), default=0) * len(joining)
        columns = self._columns(rows)
        grows = bool(rows) and not (columns and self.batch.holds(len(rows), columns))
        copy = whole // self._cache.num_layers if grows else 0
        return Need(max(whole, self.batch.nbytes + self._cache.nbytes(prefilled)) + copy, 2)

    def _columns(self, rows: Sequence[Row]) -> int:
        """Return how wide buffers become, if that wastes little of them; else 0: they grow as they must."""
        tails = [self._cache.tail_tokens(row) for row in rows]
        return max(tails) if tails and max(tails) * len(tails) <= SLACK * sum(tails) else 0

    def _buffer_tokens(self, rows: Sequence[Row]) -> int:
        """Return rows times columns that buffers come to; long tails leave them, see `even_out`."""
        tails = [self._cache.tail_tokens(row) for row in rows]
        if columns := self._columns(rows):
            return columns * len(rows)
        return int(SLACK * max(sum(tails), len(rows) * min(UNEVEN_TOKENS, max(tails)))) if tails else 0

    def share_with(self, row: Row, found_tokens: int, least_tokens: int, joining: Sequence[Row]) -> bool:
        """Put into the tree what a running row holds of a job's prompt, if that is `least_tokens` more than was found.

        Returns whether the tree has changed; `joining` are rows that will run, for which room is left.
        """
        best, shared = -1, found_tokens + least_tokens - 1
        for index, other in enumerate(self.rows):
            if not _alike(other.prompt.tokens, row.prompt.tokens, found_tokens, least_tokens):
                continue
            held = other.tokens(other.prefix_tokens + self.batch.lengths[index])
            if (common := common_prefix(held, row.cacheable)) > shared:
                best, shared = index, common
        return best >= 0 and self._share(self.rows[best], self.batch, best, shared, beside=self.demand(joining))

    def even_out(self) -> None:
        """Move the longest tails into the tree while the buffers, as wide as the longest, exceed what was reserved."""
        self._even_out([(self.rows, self.batch)])

    def _even_out(self, groups: list[tuple[list[Row], Any]]) -> None:
        """Do so for rows that are, or will be, in one buffer."""
        rows = [row for members, _ in groups for row in members]
        while rows:
            reserved = SLACK * sum(self._cache.tail_tokens(row) for row in rows)
            widest, group, index = max(
                (length, group, index)
                for group, (_, batch) in enumerate(groups)
                for index, length in enumerate(batch.lengths)
            )
            if widest < UNEVEN_TOKENS or len(rows) * widest <= reserved:
                return
            members, batch = groups[group]
            if not self._share(members[index], batch, index, members[index].prefix_tokens + widest):
                return

    def _share(self, row: Row, batch: Any, index: int, end: int, beside: Need | None = None) -> bool:
        """Move a row's KV up to depth `end` from its tail into the tree; not if it is not finite: it will fail."""
        moved = end - row.prefix_tokens
        node = self._cache.keep(row, batch, index, end, beside=beside)
        if node is None:
            return False
        self._cache.attach(row, node, end)
        batch.drop_front(index, moved)
        batch.set_path(index, row.path())
        return True


def _alike(a: Tokens, b: Tokens, start: int, count: int) -> bool:
    """Whether two prompts agree right after `start`, or one of them ends there: a cheap look before a whole one."""
    return min(len(a), len(b)) < start + count or bool((a[start : start + count] == b[start : start + count]).all())
