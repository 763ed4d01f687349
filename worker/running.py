"""The rows that decode, and the batch that holds their KV: kept in step while rows join, leave and share.

Knows the prefix cache; runs no model.
"""

from __future__ import annotations

from typing import Any

from worker.cache import PrefixCache
from worker.radix import common_prefix
from worker.row import Row
from worker.sequence import Tokens

UNEVEN_TOKENS = 256
"""A tail this long may be moved into the tree, to keep the batch's buffers small."""


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
        self.batch.join(batch)
        self.rows += rows

    def leave(self, index: int) -> None:
        """Drop a row; the last row takes its index."""
        self._cache.detach(self.rows[index])
        self.batch.leave(index)
        self.rows[index] = self.rows[-1]
        self.rows.pop()

    def share_with(self, row: Row, found_tokens: int, least_tokens: int) -> bool:
        """Put into the tree what a running row holds of a job's prompt, if that is `least_tokens` more than was found.

        Returns whether the tree has changed.
        """
        best, shared = -1, found_tokens + least_tokens - 1
        for index, other in enumerate(self.rows):
            if not _alike(other.prompt.tokens, row.prompt.tokens, found_tokens, least_tokens):
                continue
            held = other.tokens(other.prefix_tokens + self.batch.lengths[index])
            if (common := common_prefix(held, row.cacheable)) > shared:
                best, shared = index, common
        return best >= 0 and self._share(self.rows[best], self.batch, best, shared)

    def even_out(self) -> None:
        """Move the longest tails into the tree while the buffers, as wide as the longest, exceed what was reserved."""
        self._even_out([(self.rows, self.batch)])

    def _even_out(self, groups: list[tuple[list[Row], Any]]) -> None:
        """Do so for rows that are, or will be, in one buffer."""
        rows = [row for members, _ in groups for row in members]
        while rows:
            reserved = sum(row.longest - row.prefix_tokens for row in rows)
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

    def _share(self, row: Row, batch: Any, index: int, end: int) -> bool:
        """Move a row's KV up to depth `end` from its tail into the tree; not if it is not finite: it will fail."""
        moved = end - row.prefix_tokens
        node = self._cache.keep(row, batch, index, end)
        if node is None:
            return False
        self._cache.attach(row, node, end)
        batch.drop_front(index, moved)
        batch.set_path(index, row.path())
        return True


def _alike(a: Tokens, b: Tokens, start: int, count: int) -> bool:
    """Whether two prompts agree right after `start`, or one of them ends there: a cheap look before a whole one."""
    return min(len(a), len(b)) < start + count or bool((a[start : start + count] == b[start : start + count]).all())
