"""Which of the given jobs prefill next, how many of them together, and prefixes that failed.

Jobs keep the order in which they were given; the scout planned it. Runs no model.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common.errors import RadixqError
from worker.cache import PrefixCache
from worker.line import Line
from worker.radix import common_prefix
from worker.row import Row
from worker.running import Running
from worker.sequence import Tokens

MIN_SHARED_TOKENS = 16
"""A shared piece shorter than this is computed per row: a node of its own would cost more than it saves."""

MAX_POISONED = 64
"""Failed prefixes that are remembered, so that later jobs do not wait for them again."""


@dataclass(slots=True)
class Fill:
    """A prefill under way: the same number of columns for every row, shorter rows padded on the right.

    Attributes:
        rows: the jobs. One for a segment, which is charged with it; all that join for tails.
        tokens: what is to run per row.
        segment: whether the result becomes a node of the tree.
    """

    rows: list[Row]
    tokens: list[Tokens]
    batch: Any
    segment: bool
    done: int = 0

    @property
    def width(self) -> int:
        """Columns in all."""
        return max(map(len, self.tokens))


class Intake:
    """Jobs between `Engine.add` and their prefill.

    Attributes:
        line: jobs in order; the one whose segment is computed stays at the head, and keeps what was computed pinned.
        forming: the jobs that the last call of `next_fill` was busy with.
        blocked: the next job does not fit into memory until a running one ends.
    """

    def __init__(self, cache: PrefixCache, max_rows: int) -> None:
        self.line = Line()
        self.blocked = False
        self.forming: list[Row] = []
        self._cache, self._max_rows = cache, max_rows
        self._poisoned: deque[Tokens] = deque(maxlen=MAX_POISONED)

    def next_fill(self, running: Running) -> tuple[Fill | None, list[tuple[Row, RadixqError]]]:
        """Take the next segment, or the next rows whose shared part is complete; or a job that can never run.

        If it raises, `forming` has the rows that were taken, or looked at, when it did.
        """
        self.blocked, self.forming = False, []
        rows: list[Row] = []
        while (row := self.line.head) is not None and self._may_join(row, [*running.rows, *rows]):
            self.forming = [*rows, row]
            found = self._cache.find(row)
            if self._cache.reuse == "shared" and running.share_with(row, found.length, MIN_SHARED_TOKENS, rows):
                found = self._cache.find(row)
            end = self._shared_end(row, found.length)
            if rows and (end is not None or self._apart(rows, row, found.length)):
                break
            self._cache.attach(row, found.node, found.length)  # before room is made: what was found must stay
            if not self._fits(row, end, rows, running):
                if rows or running.rows:
                    self.blocked = not rows
                    break
                end = None
                if not self._from_nothing(row, running):
                    self.line.remove(row.id)
                    return None, [(row, self._cache.too_large(row))]
            if end is not None:
                return self._open([row], [row.prompt.tokens[row.prefix_tokens : end]], segment=True), []
            self.line.remove(row.id)
            rows.append(row)
        return (self._tails(rows) if rows else None), []

    def put_back(self, rows: Sequence[Row]) -> None:
        """Let rows that failed go next."""
        self.line.put_back(rows)

    def remove(self, job_id: str) -> None:
        """Forget a waiting job."""
        if (row := self.line.remove(job_id)) is not None:
            self._cache.detach(row)

    def poison(self, prefix: Tokens) -> None:
        """Remember a prefix that failed: who needs it runs alone."""
        self._poisoned.append(prefix)

    def forgive(self, tokens: Tokens) -> None:
        """Forget what failed of a prompt that has been computed since."""
        kept = [bad for bad in self._poisoned if common_prefix(bad, tokens) < len(bad)]
        self._poisoned = deque(kept, maxlen=MAX_POISONED)

    def _may_join(self, row: Row, beside: Sequence[Row]) -> bool:
        """Whether a job may run beside these: rows of a failed call bear fewer, and one with a failed prefix none."""
        if any(common_prefix(bad, row.prompt.tokens) == len(bad) for bad in self._poisoned):
            row.company = 1
        bearable = [other.company for other in (row, *beside) if other.company is not None]
        return len(beside) < min([self._max_rows, *bearable])

    def _shared_end(self, row: Row, start: int) -> int | None:
        """Return where the next segment from `start` ends that another known job needs too; None if none does."""
        if self._cache.reuse == "none" or row.company == 1:
            return None
        last, least = len(row.cacheable), start + MIN_SHARED_TOKENS
        told = bisect_left(row.prompt.branches, least)
        seen = self.line.departure(row, least)
        ends = [*row.prompt.branches[told : told + 1], *([] if seen is None else [seen])]
        end = row.prompt.whole(min(last, *ends)) if ends else start
        return end if end >= least else None

    def _fits(self, row: Row, segment_end: int | None, rows: Sequence[Row], running: Running) -> bool:
        if segment_end is None:
            return self._cache.make_room(running.demand([*rows, row]))
        return self._cache.make_room(running.demand() + self._cache.segment_need(row, segment_end))

    def _from_nothing(self, row: Row, running: Running) -> bool:
        """Let the only job there is compute its whole prompt, where the prefix and the job do not fit together."""
        for other in self.line:
            self._cache.detach(other)
        self._cache.attach(row, self._cache.tree.root, 0)
        fits = self._fits(row, None, (), running)
        if not fits:
            self._cache.detach(row)
        return fits

    def _apart(self, rows: Sequence[Row], row: Row, prefix_tokens: int) -> bool:
        """Whether a job should not prefill together with these: padding would more than double the work.

        A model whose results change with the size of its prefill steps gets mlx-lm's, one job at a time.
        """
        lengths = [len(r.cacheable) - r.prefix_tokens for r in rows] + [len(row.cacheable) - prefix_tokens]
        wasteful = max(lengths) * len(lengths) > 2 * sum(lengths) + 16 * len(lengths)
        return wasteful or self._cache.reuse == "none"

    def _tails(self, rows: list[Row]) -> Fill:
        return self._open(rows, [row.cacheable[row.prefix_tokens :] for row in rows], segment=False)

    def _open(self, rows: list[Row], tokens: list[Tokens], *, segment: bool) -> Fill:
        batch = self._cache.new_batch(prefill_columns=max(map(len, tokens)))
        batch.open([row.path() for row in rows])
        if self._cache.reuse != "shared":  # the rows have copies of their own now
            for row in rows:
                self._cache.unpin(row)
        return Fill(rows, tokens, batch, segment)
