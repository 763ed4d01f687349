"""Which of the given jobs prefill next: those that wait, those that try again, and prefixes that failed.

Jobs keep the order in which they were given; the scout planned it. Runs no model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from common.errors import RadixqError
from worker.cache import PrefixCache
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
        waiting: jobs in order; the one whose segment is computed stays at the head.
        retries: jobs that failed together with others; each runs alone.
        forming: the jobs that the last call of `next_fill` was busy with.
        blocked: the next job does not fit into memory until a running one ends.
    """

    def __init__(self, cache: PrefixCache, max_rows: int) -> None:
        self.waiting: deque[Row] = deque()
        self.retries: deque[Row] = deque()
        self.blocked = False
        self.forming: list[Row] = []
        self._cache, self._max_rows = cache, max_rows
        self._poisoned: deque[Tokens] = deque(maxlen=MAX_POISONED)

    def __len__(self) -> int:
        return len(self.waiting) + len(self.retries)

    def next_fill(self, running: Running) -> tuple[Fill | None, list[tuple[Row, RadixqError]]]:
        """Take the next segment, or the next rows whose shared part is complete; and jobs that can never run.

        If it raises, `forming` has the rows that were taken, or looked at, when it did.
        """
        self.forming = []
        if any(row.retry for row in running.rows):
            return None, []
        return self._next_retry(running) if self.retries else self._next_waiting(running)

    def waiting_for(self, row: Row, end: int) -> Iterator[Row]:
        """Yield the waiting jobs that share a job's prompt up to depth `end`, itself among them."""
        tokens = row.prompt.tokens
        return (other for other in self.waiting if common_prefix(other.prompt.tokens, tokens) >= end)

    def poison(self, prefix: Tokens) -> None:
        """Remember a prefix that failed: who needs it runs alone."""
        self._poisoned.append(prefix)

    def forgive(self, tokens: Tokens) -> None:
        """Forget what failed of a prompt that has been computed since."""
        kept = [bad for bad in self._poisoned if common_prefix(bad, tokens) < len(bad)]
        self._poisoned = deque(kept, maxlen=MAX_POISONED)

    def _next_waiting(self, running: Running) -> tuple[Fill | None, list[tuple[Row, RadixqError]]]:
        rows: list[Row] = []
        hopeless: list[tuple[Row, RadixqError]] = []
        self.blocked = False
        while self.waiting and len(running) + len(rows) < self._max_rows:
            row = self.waiting[0]
            if row.aborted:
                self.waiting.popleft()
                continue
            if self._through_poison(row):
                row.retry = True
                self.retries.append(self.waiting.popleft())
                break
            self.forming = [*rows, row]
            found = self._cache.find(row)
            if self._cache.reuse == "shared" and running.share_with(row, found.length, MIN_SHARED_TOKENS):
                found = self._cache.find(row)
            end = self._shared_end(row, found.length)
            if rows and (end is not None or self._apart(rows, row, found.length)):
                break
            self._cache.attach(row, found.node, found.length)  # before room is made: what was found must stay
            if not self._cache.make_room(self._cache.need(row, end), (*running.rows, *rows)):
                self._cache.detach(row)
                if rows or running.rows:
                    self.blocked = not rows
                    break
                end = None
                if not self._from_nothing(row):
                    hopeless.append((self.waiting.popleft(), self._cache.too_large(row)))
                    continue
            if end is not None:
                return self._open([row], [row.prompt.tokens[row.prefix_tokens : end]], segment=True), hopeless
            rows.append(self.waiting.popleft())
        return self._tails(rows), hopeless

    def _next_retry(self, running: Running) -> tuple[Fill | None, list[tuple[Row, RadixqError]]]:
        """Take one job that failed, once nothing else runs."""
        if running.rows:
            return None, []
        row = self.retries.popleft()
        if row.aborted:
            return None, []
        self.forming = [row]
        found = self._cache.find(row)
        self._cache.attach(row, found.node, found.length)
        if not self._cache.make_room(self._cache.need(row, None), ()) and not self._from_nothing(row):
            return None, [(row, self._cache.too_large(row))]
        return self._tails([row]), []

    def _through_poison(self, row: Row) -> bool:
        """Whether a prompt goes through a prefix that failed and that nobody has computed since."""
        tokens = row.prompt.tokens
        return any(common_prefix(bad, tokens) == len(bad) for bad in self._poisoned)

    def _shared_end(self, row: Row, start: int) -> int | None:
        """Return where the next segment from `start` ends that another known job needs too; None if none does."""
        if self._cache.reuse == "none":
            return None
        last = len(row.cacheable)
        waiting = (other for other in self.waiting if other is not row and not other.aborted)
        others = (common_prefix(row.prompt.tokens, other.prompt.tokens) for other in waiting)
        ends = [min(end, last) for end in (*row.prompt.branches, *others)]
        return min((end for end in ends if end - start >= MIN_SHARED_TOKENS), default=None)

    def _from_nothing(self, row: Row) -> bool:
        """Let the only job there is compute its whole prompt, where the prefix and the job do not fit together."""
        self._cache.attach(row, self._cache.tree.root, 0)
        fits = self._cache.make_room(self._cache.need(row, None), ())
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

    def _tails(self, rows: list[Row]) -> Fill | None:
        return self._open(rows, [row.cacheable[row.prefix_tokens :] for row in rows], segment=False) if rows else None

    def _open(self, rows: list[Row], tokens: list[Tokens], *, segment: bool) -> Fill:
        batch = self._cache.new_batch(max(map(len, tokens)))
        batch.open([row.path() for row in rows])
        if self._cache.reuse != "shared":  # the rows have copies of their own now
            for row in rows:
                self._cache.unpin(row)
        return Fill(rows, tokens, batch, segment)
