"""The rows that decode, and the batch that holds their KV: kept in step while rows join, leave and share.

Knows the prefix cache; runs no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from worker.buckets import MOST_BUCKETS, most_cells
from worker.cache import Need, PrefixCache
from worker.radix import common_prefix
from worker.row import Row
from worker.sequence import Tokens


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
            self.batch.join(batch, [self._cache.tail_tokens(row) for row in rows], roomy=roomy)
        else:
            self.batch.join(batch)
        self.rows += rows

    def leave(self, index: int) -> None:
        """Drop a row; the last row takes its index."""
        self._cache.detach(self.rows[index])
        self.batch.leave(index)
        self.rows[index] = self.rows[-1]
        self.rows.pop()

    def clear(self) -> None:
        """Drop all rows."""
        for row in self.rows:
            self._cache.detach(row)
        self.batch.clear()
        self.rows.clear()

    def demand(self, joining: Sequence[Row] = (), *, leaving: Row | None = None, roomy: bool = False) -> Need:
        """Return what rows hold at most from now on, with those that will join, and while they do."""
        rows = [row for row in (*self.rows, *joining) if row is not leaving]
        if self._cache.reuse != "shared":
            all_, new = (sum(self._cache.row_nbytes(row) for row in part) for part in (rows, joining))
            return Need(max(all_, self.batch.nbytes + new), len(self.rows) + len(joining))
        tails = [self._cache.tail_tokens(row) for row in rows]
        whole = self._cache.nbytes(most_cells(tails, self._cache.pinned_tokens, roomy=roomy))
        prefilled = len(joining) * max((len(row.cacheable) - row.prefix_tokens for row in joining), default=0)
        lasting, before = max(whole, self.batch.nbytes), self.batch.nbytes + self._cache.nbytes(prefilled)
        sorted_anew = whole // self._cache.num_layers  # a layer at a time
        moved = self._cache.nbytes(max(tails)) if len(tails) > 1 else 0  # a line, when another row leaves
        copied = max(sorted_anew, moved)
        return Need(lasting, 1 + min(MOST_BUCKETS, len(rows)), max(0, before - lasting) + copied)

    def make_ready(self, joining: Sequence[Row], beside: Need) -> None:
        """Let buffers that the next token takes be roomy only where that leaves room for what is about to come."""
        if self._cache.reuse == "shared" and self.batch.roomy and self.batch.full:
            self.batch.roomy = self._cache.make_room(self.demand(joining, roomy=True) + beside)

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
        if best < 0:
            return False
        beside = self.demand(joining) + Need(0, 0, passing=self._cache.nbytes(self.batch.lengths[best]))
        return self._share(best, shared, beside)

    def shrink(self) -> None:
        """Give up the room of rows that have left; for when no others are about to take it."""
        if self.rows and self._cache.reuse == "shared":
            self.batch.shrink()

    def _share(self, index: int, end: int, beside: Need) -> bool:
        """Move a row's KV up to depth `end` from its tail into the tree; not if it is not finite: it will fail."""
        row, batch = self.rows[index], self.batch
        moved = end - row.prefix_tokens
        node = self._cache.keep(row, batch, index, end, beside=beside)
        if node is None:
            return False
        batch.drop_front(index, moved)  # may lack the memory: only then does the row change
        self._cache.attach(row, node, end)
        batch.set_path(index, row.path())
        batch.evaluate()  # lets go of where the rest of the tail lay
        return True


def _alike(a: Tokens, b: Tokens, start: int, count: int) -> bool:
    """Whether two prompts agree right after `start`, or one of them ends there: a cheap look before a whole one."""
    return min(len(a), len(b)) < start + count or bool((a[start : start + count] == b[start : start + count]).all())
