"""A compressed trie of the prompts of one queue, with counts of the jobs that wait at and below every node.

Pure: knows no Redis, no MLX and no order in which jobs should run. Keys are the bytes of int32 tokens, and so are
depths and lengths here: bytes, always whole tokens.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
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
        self.born = born  # number of the oldest job that came through here; breaks ties
        self.children: dict[bytes, Node] = {}
        self.waiting: dict[str, None] = {}  # jobs that end here and were not offered, oldest first
        self.total = 0  # jobs known at or below
        self.open = 0  # of these, not offered yet
        self.fresh = 0  # bytes of the segments, this one included, that lead to waiting jobs: what it takes to run them
        self.ranks: list[_Rank] | None = None

    def path(self) -> Iterator[Node]:
        """Yield this node and its ancestors, the root last."""
        node: Node | None = self
        while node is not None:
            yield node
            node = node.parent

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


@dataclass(slots=True)
class _Frame:
    """A node on the way down to where jobs are being inserted, and what they add to its counts."""

    node: Node
    jobs: int = 0
    fresh: int = 0
    oldest: int = 0


@dataclass(slots=True)
class Trie:
    """The nodes. A job is counted at every node from the root to its own."""

    root: Node = field(default_factory=lambda: Node(b"", 0, 0))
    num_bytes: int = 0

    def insert(self, jobs: Iterable[Job]) -> None:
        """Insert jobs that wait, and set their nodes.

        In the order of their keys: so every node on their ways is passed once, however many of them go through it.
        """
        before, frames = b"", [_Frame(self.root)]
        for job in sorted(jobs, key=attrgetter("key")):  # stable: among equal prompts the oldest stays first
            while not job.key.startswith(before[: frames[-1].node.end]):
                _leave(frames)
            self._descend(frames, job)
            job.node = frames[-1].node
            job.node.waiting[job.id] = None
            before, job.key = job.key, b""
        while frames:
            _leave(frames)

    def take(self, job: Job) -> tuple[bytes, list[int]]:
        """Count a job as no longer waiting; return its key and the depths at which other known jobs leave it."""
        del job.node.waiting[job.id]
        job.offered = True
        below, freed, segments, depths = 1, 0, [], []
        for node in job.node.path():
            if node.total > below:
                depths.append(node.end)
            below = node.total
            node.open -= 1
            if not node.open:
                freed += len(node.segment)
            node.fresh -= freed
            segments.append(node.segment)
        segments.reverse()
        depths.reverse()
        return b"".join(segments), depths

    def remove(self, job: Job) -> None:
        """Take a job out, and the nodes that nobody else needs."""
        if not job.offered:
            self.take(job)
        job.gone = True
        for node in job.node.path():
            node.total -= 1
        self._tidy(job.node)

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

    def _descend(self, frames: list[_Frame], job: Job) -> None:
        """Lengthen the way down from its last node to where the key of `job` ends, making nodes if need be."""
        node, key = frames[-1].node, job.key
        while node.end < len(key):
            found = node.child(key)
            if found is None:
                child = Node(key[node.end :], len(key), job.number)
                node.adopt(child)
                self.num_bytes += len(child.segment)
            else:
                agreed = shared(key, node.end, found.segment)
                child = found if agreed == len(found.segment) else _split(found, agreed)
            node = child
            frames.append(_Frame(node, oldest=job.number))
        frames[-1].jobs += 1
        frames[-1].oldest = min(frames[-1].oldest, job.number)

    def _tidy(self, node: Node) -> None:
        """Remove nodes that nobody needs, and join one that no longer branches with its only child."""
        parent = node.parent
        while parent is not None and not node.total:
            del parent.children[node.segment[:WIDTH]]
            node.parent = None
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


def shared(key: bytes, depth: int, segment: bytes) -> int:
    """Return how many bytes of `segment` agree with `key` from `depth` on, in whole tokens."""
    if key.startswith(segment, depth):
        return len(segment)
    num = min(len(key) - depth, len(segment)) // WIDTH
    ours = np.frombuffer(key, np.int32, num, depth)
    differ = ours != np.frombuffer(segment, np.int32, num)
    first = int(differ.argmax()) if num else 0
    return (first if num and differ[first] else num) * WIDTH


def _leave(frames: list[_Frame]) -> None:
    """Climb out of a node: it and its parent's frame get what was inserted below."""
    frame = frames.pop()
    node = frame.node
    added = frame.fresh + (0 if node.open else len(node.segment))
    node.total += frame.jobs
    node.open += frame.jobs
    node.fresh += added
    node.born = min(node.born, frame.oldest)
    if frames:
        above = frames[-1]
        above.jobs += frame.jobs
        above.fresh += added
        above.oldest = min(above.oldest, frame.oldest)
        above.node.rank(node)


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
