"""A compressed trie of the prompts of one queue, with counts of the jobs that wait at and below every node.

Pure: knows no Redis, no MLX and no order in which jobs should run. Keys are the bytes of int32 tokens, and so are
depths and lengths here: bytes, always whole tokens.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from operator import attrgetter

import numpy as np

WIDTH = np.dtype(np.int32).itemsize
_Rank = tuple[int, int, int, "Node"]


class Node:
    """Prompts that agree up to here. `segment` are the bytes between the parent and here.

    Every node but the root ends a job or has two children. `ranks`, once it is asked for, holds a heap
    entry (-open, born, id, child) for each child with waiting jobs, among entries that are out of date.
    """

    __slots__ = ("born", "children", "end", "fresh", "open", "parent", "ranks", "segment", "total", "waiting")

    def __init__(self, segment: bytes, end: int, born: int) -> None:
        self.segment = segment
        self.end = end  # depth; splits and joins leave it as it is
        self.parent: Node | None = None
        self.born = born  # number of the job for which it was made, or of an older one; breaks ties
        self.children: dict[bytes, Node] = {}
        self.waiting: dict[str, None] = {}  # jobs that end here and were not offered, oldest first
        self.total = 0  # jobs known at or below
        self.open = 0  # of these, not offered yet
        self.fresh = 0  # bytes of the segments, this one included, that lead to waiting jobs: what it takes to run them
        self.ranks: list[_Rank] | None = None

    def child(self, key: bytes) -> Node | None:
        """Return the child whose segment begins with the token of `key` that follows here."""
        return self.children.get(key[self.end : self.end + WIDTH])

    def adopt(self, child: Node) -> None:
        """Take `child` in, under the first token of its segment."""
        self.children[child.segment[:WIDTH]] = child
        child.parent = self
        self.rank(child)

    def rank(self, child: Node) -> None:
        """Note that `child` has grown; that one has shrunk is found out by `largest`."""
        if self.ranks is not None:
            heapq.heappush(self.ranks, (-child.open, child.born, id(child), child))
            if len(self.ranks) > 4 * len(self.children) + 16:
                self.ranks = None

    def largest(self) -> Node:
        """Return the child with the most waiting jobs; there must be one."""
        return self._ranked()[0][-1]

    def largest_few(self, most: int) -> list[Node]:
        """Return up to `most` children with waiting jobs, those with the most first."""
        few: list[_Rank] = []
        below = self.open - len(self.waiting)
        while below and len(few) < most:
            ranks = self._ranked()
            few.append(heapq.heappop(ranks))
            below += few[-1][0]
            while ranks and ranks[0] == few[-1]:
                heapq.heappop(ranks)
        if few and self.ranks is not None:
            for rank in few:
                heapq.heappush(self.ranks, rank)
        return [rank[-1] for rank in few]

    def _ranked(self) -> list[_Rank]:
        """Return `ranks` with the child that has the most waiting jobs in front; there must be one."""
        if self.ranks is None:
            self.ranks = [(-child.open, child.born, id(child), child) for child in self.children.values()]
            heapq.heapify(self.ranks)
        while True:
            rank, born, tie, child = self.ranks[0]
            if child.parent is self and child.open == -rank and child.born == born:
                return self.ranks
            heapq.heappop(self.ranks)
            if child.parent is self and 0 < child.open < -rank:
                heapq.heappush(self.ranks, (-child.open, child.born, tie, child))


@dataclass(slots=True, eq=False)
class Job:
    """A job, its place in the order of arrival, and the node where its prompt ends."""

    id: str
    key: bytes  # empty once it is in the trie
    number: int
    node: Node
    offered: bool = False
    gone: bool = False


_Step = tuple[Node, int, int]
"""A node on the way down to where jobs are being inserted; how many jobs, and how much `fresh`, there was before it."""


@dataclass(slots=True)
class Trie:
    """The nodes. A job is counted at every node from the root to its own.

    Attributes:
        here: the node of the job that was offered last, or what is left of the way to it.
        depth: how far that job's prompt agrees with the way to `here`.
    """

    root: Node = field(default_factory=lambda: Node(b"", 0, 0))
    num_bytes: int = 0
    here: Node = field(init=False)
    depth: int = 0

    def __post_init__(self) -> None:
        self.here = self.root

    def insert(self, jobs: Iterable[Job]) -> None:
        """Insert jobs that wait, and set their nodes.

        In the order of their keys: so every node on their ways is passed once, however many of them go through it.
        """
        before, way, num, fresh = memoryview(b""), [(self.root, 0, 0)], 0, 0
        for job in sorted(jobs, key=attrgetter("key")):  # stable: among equal prompts the oldest stays first
            for _ in range(bisect_left(way, True, key=_departed(job.key, before)), len(way)):
                fresh = _leave(way, num, fresh)
            job.node = self._descend(way, job, num, fresh)
            job.node.waiting[job.id] = None
            num += 1
            before, job.key = memoryview(job.key), b""
        while way:
            fresh = _leave(way, num, fresh)

    def take(self, job: Job) -> tuple[bytes, list[int]]:
        """Count a job as no longer waiting; return its key and the depths at which other known jobs leave it."""
        del job.node.waiting[job.id]
        job.offered = True
        below, freed, segments, depths = 1, 0, [], []
        node: Node | None = job.node
        while node is not None:
            if node.total > below:
                depths.append(node.end)
            below = node.total
            node.open -= 1
            if not node.open:
                freed += len(node.segment)
            node.fresh -= freed
            segments.append(node.segment)
            node = node.parent
        segments.reverse()
        depths.reverse()
        return b"".join(segments), depths

    def remove(self, job: Job) -> None:
        """Take a job out, and the nodes that nobody else needs."""
        if not job.offered:
            self.take(job)
        job.gone = True
        node: Node | None = job.node
        while node is not None:
            node.total -= 1
            node = node.parent
        self._tidy(job.node)

    def held(self, key: bytes) -> tuple[Node, int]:
        """Return the deepest node with waiting jobs on the way of `key`, and how far the two agree.

        `key` is that of the job offered last, or of another queue's; then `here` is the root.
        """
        node, depth = self.here, self.depth
        while node.parent is not None and (not node.open or node.end - len(node.segment) >= depth):
            depth = min(depth, node.end - len(node.segment))
            node = node.parent
        if depth < node.end:  # nodes that were joined since may agree with more of it
            depth += shared(key, depth, node.segment[depth - node.end :])
        while depth == node.end and (child := node.child(key)) is not None and child.open:
            depth += shared(key, depth, child.segment)
            node = child  # in its middle, if the prompt left its segment
        return node, depth

    def departures(self, key: bytes) -> list[int]:
        """Return the depths at which known jobs leave the prompt `key`, which is none of theirs."""
        node, depths = self.root, []
        while node.end < len(key) and (child := node.child(key)) is not None:
            if node.total > child.total:
                depths.append(node.end)
            agreed = shared(key, node.end, child.segment)
            if agreed < len(child.segment):
                return [*depths, node.end + agreed]
            node = child
        return [*depths, node.end] if node.total else depths

    def _descend(self, way: list[_Step], job: Job, num: int, fresh: int) -> Node:
        """Lengthen the way to where the key of `job` ends, making nodes if need be; return its last one."""
        node, key = way[-1][0], job.key
        while node.end < len(key):
            child = node.child(key)
            if child is None:
                child = Node(key[node.end :], len(key), job.number)
                node.adopt(child)
                self.num_bytes += len(child.segment)
            elif not key.startswith(child.segment, node.end):
                child = _split(child, shared(key, node.end, child.segment))
            node = child
            way.append((node, num, fresh))
        return node

    def _tidy(self, node: Node) -> None:
        """Remove nodes that nobody needs, and join one that no longer branches with its only child."""
        parent = node.parent
        while parent is not None and not node.total:
            del parent.children[node.segment[:WIDTH]]
            node.parent = None
            if node is self.here:
                self.here, self.depth = parent, min(self.depth, parent.end)
            self.num_bytes -= len(node.segment)
            node, parent = parent, parent.parent
        if parent is not None and len(node.children) == 1:
            (child,) = node.children.values()
            if child.total == node.total:
                child.segment = node.segment + child.segment
                child.fresh += len(node.segment) if child.open else 0
                child.born = min(child.born, node.born)
                parent.adopt(child)
                node.parent = None
                if node is self.here:
                    self.here, self.depth = child, min(self.depth, node.end)


def shared(key: bytes, depth: int, segment: bytes) -> int:
    """Return how many bytes of `segment` agree with `key` from `depth` on, in whole tokens."""
    if key.startswith(segment, depth):
        return len(segment)
    num = min(len(key) - depth, len(segment)) // WIDTH
    ours = np.frombuffer(key, np.int32, num, depth)
    differ = ours != np.frombuffer(segment, np.int32, num)
    first = int(differ.argmax()) if num else 0
    return (first if num and differ[first] else num) * WIDTH


def _departed(key: bytes, before: memoryview) -> Callable[[_Step], bool]:
    """Return a function that says whether `key` has left the way of `before` when it comes to the node of a step."""
    return lambda step: not key.startswith(before[: step[0].end])


def _leave(way: list[_Step], num: int, fresh: int) -> int:
    """Climb out of the last node of the way and count there what was inserted since; return `fresh`, with its own."""
    node, num_before, fresh_before = way.pop()
    if not node.open:
        fresh += len(node.segment)
    node.total += num - num_before
    node.open += num - num_before
    node.fresh += fresh - fresh_before
    if way:
        way[-1][0].rank(node)
    return fresh


def _split(lower: Node, at: int) -> Node:
    """Put a node in the middle of the segment of `lower`, `at` bytes behind its beginning."""
    parent = lower.parent
    assert parent is not None
    upper = Node(lower.segment[:at], lower.end - len(lower.segment) + at, lower.born)
    upper.total, upper.open, upper.fresh = lower.total, lower.open, lower.fresh
    parent.adopt(upper)
    lower.segment = lower.segment[at:]
    lower.fresh -= at if lower.open else 0
    upper.adopt(lower)
    return upper
