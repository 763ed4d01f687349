"""Choose which waiting jobs go next, in which order, and at which depths others leave their prompts.

Pure: knows no Redis, no MLX and no clock; tokens are int32 arrays, jobs are ids.

The waiting prompts of each queue form a compressed trie; visiting it depth-first computes every shared prefix once.

    root --"You are ..."--+--"few shots A"--+-- question 1      offers: q1 q2 q3 | q4 q5: finish the subtree of the
                          |                 +-- question 2              last offer, walk up, then enter the child
                          |                 +-- question 3              with the most waiting jobs
                          +--"few shots B"--+-- question 4      branches of q1: len("You are ..."),
                                            +-- question 5                      len("You are ... few shots A")
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from worker.sequence import Tokens

_WIDTH = np.dtype(np.int32).itemsize
MIN_BRANCH_TOKENS = 16
MAX_PASSED = 10_000


@dataclass(frozen=True, slots=True)
class Waiting:
    """A job to be planned; `queue` is its queue's place in the order of priority, 0 first."""

    id: str
    tokens: Tokens
    queue: int = 0


@dataclass(frozen=True, slots=True)
class Chosen:
    """A job that goes next, with the depths at which other known jobs leave its prompt (ascending)."""

    id: str
    tokens: Tokens
    branches: tuple[int, ...]


class Plan:
    """The jobs that wait, in the order in which they should run.

    A job is known from `add` to `remove`; `next` offers it once, and it counts for the branches of others until it is
    removed. Queues go strictly by priority, as in RQ. Within a queue no job is passed by more than `max_passed`
    later arrivals: from then on the oldest goes next. Tokens are held once per shared segment.
    """

    def __init__(
        self, num_queues: int = 1, *, min_branch_tokens: int = MIN_BRANCH_TOKENS, max_passed: int = MAX_PASSED
    ) -> None:
        self._queues = [_Queue(max_passed) for _ in range(num_queues)]
        self._home: dict[str, _Queue] = {}
        self._min_branch = min_branch_tokens
        self._last = b""

    def __len__(self) -> int:
        """Number of jobs that `next` can still offer."""
        return sum(queue.root.open for queue in self._queues)

    def __contains__(self, job_id: str) -> bool:
        """Whether the job is known, offered or not."""
        return job_id in self._home

    @property
    def num_bytes(self) -> int:
        """Bytes of the tokens held."""
        return sum(queue.num_bytes for queue in self._queues)

    def add(self, jobs: Iterable[Waiting]) -> None:
        """Let jobs wait; the order of arrival is the order of `jobs`. An id must not be known already."""
        for job in jobs:
            home = self._home[job.id] = self._queues[job.queue]
            home.add(job.id, np.asarray(job.tokens, np.int32).tobytes())

    def remove(self, job_ids: Iterable[str]) -> None:
        """Forget jobs, offered or not; unknown ids are ignored."""
        for job_id in job_ids:
            home = self._home.pop(job_id, None)
            if home is not None:
                home.remove(job_id)

    def next(self, n: int, *, more: bool = False) -> list[Chosen]:
        """Offer up to `n` jobs, best first. Their branches count each other and all that wait.

        `more`: jobs wait that are not known yet. Then a subtree is not always finished: see `_Queue._cheapest`.
        """
        picked = [choice for _ in range(n) if (choice := self._pick(more)) is not None]
        return [self._chosen(job_id, key) for job_id, key in picked]

    def _pick(self, more: bool) -> tuple[str, bytes] | None:
        for queue in self._queues:
            if queue.root.open:
                job_id, self._last = queue.pick(self._last, more=more)
                return job_id, self._last
        return None

    def _chosen(self, job_id: str, key: bytes) -> Chosen:
        home, last = self._home[job_id], len(key) // _WIDTH - 1
        depths = {min(depth, last) for queue in self._queues for depth in queue.departures(key, own=queue is home)}
        branches = tuple(sorted(depth for depth in depths if depth >= self._min_branch))
        return Chosen(job_id, np.frombuffer(key, np.int32), branches)


class _Node:
    """Prompts that agree up to here. `segment` are the bytes of the tokens between the parent and here.

    Every node but the root ends a job or has two children. `ranks`, once it is asked for, holds a heap
    entry (-open, born, child) for each child with waiting jobs, among entries that are out of date.
    """

    __slots__ = ("born", "children", "open", "parent", "ranks", "segment", "total", "waiting")

    def __init__(self, segment: bytes, born: int) -> None:
        self.segment = segment
        self.parent: _Node | None = None
        self.born = born  # breaks ties: older first
        self.children: dict[bytes, _Node] = {}
        self.waiting: dict[str, None] = {}  # jobs that end here and were not offered, oldest first
        self.total = 0  # jobs known at or below
        self.open = 0  # of these, not offered yet
        self.ranks: list[tuple[int, int, _Node]] | None = None

    def path(self) -> Iterator[_Node]:
        """Yield this node and its ancestors, the root last."""
        node: _Node | None = self
        while node is not None:
            yield node
            node = node.parent

    def child(self, key: bytes, depth: int) -> _Node | None:
        """Return the child whose segment begins with the token of `key` at byte `depth`."""
        return self.children.get(key[depth : depth + _WIDTH])

    def adopt(self, child: _Node) -> None:
        """Take `child` in, under the first token of its segment."""
        self.children[child.segment[:_WIDTH]] = child
        child.parent = self
        self.rank(child)

    def rank(self, child: _Node) -> None:
        """Note that `child` has grown; that one has shrunk is found out by `largest`."""
        if self.ranks is not None:
            heapq.heappush(self.ranks, (-child.open, child.born, child))
            if len(self.ranks) > 4 * len(self.children) + 16:
                self.ranks = None

    def largest(self) -> _Node:
        """Return the child with the most waiting jobs; there must be one."""
        if self.ranks is None:
            self.ranks = [(-child.open, child.born, child) for child in self.children.values()]
            heapq.heapify(self.ranks)
        while True:
            rank, born, child = self.ranks[0]
            if child.parent is self and child.open == -rank:
                return child
            heapq.heappop(self.ranks)
            if child.parent is self and 0 < child.open < -rank:
                heapq.heappush(self.ranks, (-child.open, born, child))


@dataclass(slots=True, eq=False)
class _Job:
    """A job and the node where its prompt ends."""

    id: str
    node: _Node
    offered: bool = False
    gone: bool = False


class _Queue:
    """The trie of one queue and the age of its jobs."""

    def __init__(self, max_passed: int) -> None:
        self.root = _Node(b"", 0)
        self.num_bytes = 0
        self._births = 0
        self._jobs: dict[str, _Job] = {}
        self._arrivals: deque[_Job] = deque()  # oldest first; those that left go when they reach the head
        self._max_passed = max_passed
        self._num_passing = 0  # jobs that were offered before the oldest arrival here and came after it

    def add(self, job_id: str, key: bytes) -> None:
        """Insert a job; it is the youngest."""
        node = self._insert(key)
        node.waiting[job_id] = None
        job = self._jobs[job_id] = _Job(job_id, node)
        self._arrivals.append(job)

    def remove(self, job_id: str) -> None:
        """Take a job out, and the nodes that nobody else needs."""
        job = self._jobs.pop(job_id)
        if not job.offered:
            self._close(job)
        job.gone = True
        step: _Node | None = job.node
        while step is not None:
            step.total -= 1
            step = step.parent
        self._tidy(job.node)

    def pick(self, last: bytes, *, more: bool) -> tuple[str, bytes]:
        """Offer the best waiting job, given the prompt that was offered last; there must be one."""
        job = self._overdue() or self._nearest(last, more=more)
        self._close(job)
        job.offered = True
        self._num_passing += 1
        return job.id, b"".join(reversed([step.segment for step in job.node.path()]))

    def departures(self, key: bytes, *, own: bool) -> Iterator[int]:
        """Yield the depths (tokens) at which known jobs leave the prompt `key`; `own`: one of them is that job."""
        node, depth = self.root, 0
        while depth < len(key) and (child := node.child(key, depth)) is not None:
            if node.total > child.total:
                yield depth // _WIDTH
            if not own:  # else it is all the way its own path
                shared = _shared(key, depth, child.segment)
                if shared < len(child.segment):
                    yield (depth + shared) // _WIDTH
                    return
            node, depth = child, depth + len(child.segment)
        if node.total > own:
            yield depth // _WIDTH

    def _overdue(self) -> _Job | None:
        """Return the oldest waiting job if too many later ones went before it."""
        while self._arrivals[0].offered or self._arrivals[0].gone:
            self._num_passing -= self._arrivals.popleft().offered
        return self._arrivals[0] if self._num_passing >= self._max_passed else None

    def _nearest(self, last: bytes, *, more: bool) -> _Job:
        """Follow the last prompt down as far as jobs wait there, then take the largest subtree at every turn."""
        node, depth = self.root, 0
        while (child := node.child(last, depth)) is not None and child.open:
            node, shared = child, _shared(last, depth, child.segment)
            depth += shared
            if shared < len(child.segment):
                break  # the last prompt left this segment in its middle
        if more and 2 * depth < len(last):
            node = self._cheapest(last)
        while not node.waiting:
            node = node.largest()
        return self._jobs[next(iter(node.waiting))]

    def _cheapest(self, last: bytes) -> _Node:
        """Return the group, anywhere, that costs the fewest new tokens, by the square root of the jobs that share them.

        A group is a node with several waiting jobs that share nothing below it, or a job alone.
        """
        best, lowest = self.root, math.inf
        found = [(self.root, 0, 0)]  # a node with groups below it, its depth, how much of that is in the last prompt
        while found:
            node, depth, common = found.pop()
            on_path = node.child(last, depth) if common == depth else None
            if node.waiting and depth - common < lowest:
                best, lowest = node, depth - common
            for child in node.children.values():
                if not child.open:
                    continue
                end = depth + len(child.segment)
                held = depth + _shared(last, depth, child.segment) if child is on_path else common
                below = [below for below in child.children.values() if below.open] if child.open > 1 else []
                if held == end or any(group.open > 1 for group in below):
                    found.append((child, end, held))
                    continue
                own = min((len(job.segment) for job in below), default=0)
                cost = (end - held + own) / math.sqrt(child.open) if end - held > own else end - held + own
                if cost < lowest:
                    best, lowest = child, cost
        return best

    def _close(self, job: _Job) -> None:
        """Count a job as no longer waiting."""
        del job.node.waiting[job.id]
        step: _Node | None = job.node
        while step is not None:
            step.open -= 1
            step = step.parent

    def _insert(self, key: bytes) -> _Node:
        """Count one more job on the way down, and return the node where `key` ends, made if need be."""
        node, depth = self.root, 0
        node.total += 1
        node.open += 1
        while depth < len(key):
            parent, found = node, node.child(key, depth)
            if found is None:
                node = self._new(key[depth:])
                parent.adopt(node)
                self.num_bytes += len(node.segment)
                depth = len(key)
            else:
                shared = _shared(key, depth, found.segment)
                node = found if shared == len(found.segment) else self._split(found, shared)
                depth += shared
            node.total += 1
            node.open += 1
            parent.rank(node)
        return node

    def _split(self, lower: _Node, at: int) -> _Node:
        """Put a node in the middle of the segment of `lower`, at byte `at`."""
        parent = lower.parent
        assert parent is not None
        upper = self._new(lower.segment[:at])
        upper.total, upper.open = lower.total, lower.open
        parent.adopt(upper)
        lower.segment = lower.segment[at:]
        upper.adopt(lower)
        return upper

    def _new(self, segment: bytes) -> _Node:
        self._births += 1
        return _Node(segment, self._births)

    def _tidy(self, node: _Node) -> None:
        """Remove a node that nobody needs, and join one that no longer branches with its only child."""
        parent = node.parent
        if parent is None:
            return
        if not node.total:
            del parent.children[node.segment[:_WIDTH]]
            node.parent = None
            self.num_bytes -= len(node.segment)
            self._tidy(parent)
        elif len(node.children) == 1:
            (child,) = node.children.values()
            if child.total == node.total:
                child.segment = node.segment + child.segment
                parent.adopt(child)
                node.parent = None


def _shared(key: bytes, depth: int, segment: bytes) -> int:
    """Return how many bytes of `segment` agree with `key` from byte `depth` on, in whole tokens."""
    if key.startswith(segment, depth):
        return len(segment)
    num = min(len(key) - depth, len(segment)) // _WIDTH
    ours = np.frombuffer(key, np.int32, num, depth)
    differ = ours != np.frombuffer(segment, np.int32, num)
    first = int(differ.argmax()) if num else 0
    return (first if num and differ[first] else num) * _WIDTH
