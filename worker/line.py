"""The jobs that wait for the engine, in order, and what their prompts share. Runs no model and holds no KV.

The prompts lie in a radix tree of their own, each pinned where it ends: how many jobs go through a node is the number
of its pins, so where others leave a prompt is read off and no two prompts are compared.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Self

from worker.radix import Match, Node, RadixTree
from worker.row import Row
from worker.sequence import Tokens


class _Nothing:
    """What a node of this tree holds."""

    nbytes = 0

    def split(self, _at: int) -> tuple[Self, Self]:
        return self, self


class Line:
    """Rows in the order in which they should start; all but `iter` and `sharing` cost no more when more wait."""

    def __init__(self) -> None:
        self._rows: OrderedDict[str, Row] = OrderedDict()
        self._ends: dict[str, Node[_Nothing]] = {}
        self._prompts: RadixTree[_Nothing] = RadixTree()

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    @property
    def head(self) -> Row | None:
        """The row that goes next."""
        return next(iter(self._rows.values()), None)

    def append(self, row: Row) -> None:
        """Let a row wait behind all others."""
        self._rows[row.id] = row
        self._ends[row.id] = self._insert(row.prompt.tokens)

    def put_back(self, rows: Sequence[Row]) -> None:
        """Let rows wait before all others, in this order."""
        for row in reversed(rows):
            self.append(row)
            self._rows.move_to_end(row.id, last=False)

    def remove(self, job_id: str) -> Row | None:
        """Take a row out, wherever it is; None if it does not wait."""
        row = self._rows.pop(job_id, None)
        if row is not None:
            self._prompts.release(self._ends.pop(job_id))
            self._prompts.evict(0, self._prompts.num_nodes)  # what no other prompt goes through
        return row

    def departure(self, row: Row, least: int) -> int | None:
        """Return the first depth from `least` on where another waiting prompt leaves that of a waiting row."""
        found = None
        node = self._ends[row.id]
        through = 1  # jobs that go on below `node` together with this one
        while node.parent is not None and node.end >= least:
            if node.pins > through:
                found = node.end
            node, through = node.parent, node.pins
        return found

    def num_sharing(self, prefix: Tokens) -> int:
        """Return how many prompts begin with `prefix`."""
        node, length = self._prompts.match(prefix)
        return node.pins if length == len(prefix) else 0

    def sharing(self, prefix: Tokens) -> list[Row]:
        """Return the rows whose prompts begin with `prefix`."""
        raw = prefix.tobytes()
        return [row for row in self if row.prompt.tokens[: len(prefix)].tobytes() == raw]

    def _insert(self, tokens: Tokens) -> Node[_Nothing]:
        at: Match[_Nothing] = self._prompts.match(tokens)
        rest = tokens[at.length :]
        end = self._prompts.insert(at, rest, _Nothing()) if len(rest) else self._prompts.fill(at, _Nothing())
        self._prompts.lock(end)
        return end
