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

import math
import random
import zlib
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from worker.sequence import Tokens
from worker.trie import WIDTH, Job, Node, Trie

MIN_BRANCH_TOKENS = 16
MAX_PASSED = 10_000
_SIBLINGS = 4  # children of one node that are weighed against each other, the largest
_TURNS = 32  # the same, when other workers run
_MAX_TURNS = 64


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


@dataclass(frozen=True, slots=True)
class Neighbours:
    """What other workers on the same queues do, in the marks of their `Plan.trail`.

    Attributes:
        running: where they are now.
        senior: those of `running` that belong to workers which stay when two meet.
        held: where they were, so that their caches may hold the prefix.
        own: where this worker was.
    """

    running: frozenset[int]
    senior: frozenset[int] = frozenset()
    held: frozenset[int] = frozenset()
    own: frozenset[int] = frozenset()

    def rank(self, mark: int) -> int:
        """Return how little a subtree suits this worker: 0 it was there, 1 nobody was, 2 others were, 3 others are."""
        if mark in self.running:
            return 3
        return 0 if mark in self.own else 2 if mark in self.held else 1


class Plan:
    """The jobs that wait, in the order in which they should run.

    A job is known from `add` to `remove`; `next` offers it once, and it counts for the branches of others until it is
    removed. Queues go strictly by priority, as in RQ. Within a queue no job is passed by more than `max_passed`
    later arrivals: from then on the oldest goes next. Tokens are held once per shared segment.

    Several workers on the same queues tell each other their `trail`, and `heed` what they are told: each takes a
    subtree where no other is, while there is one. `seed` should differ between them: it decides which jobs they take
    where they have to share a subtree.
    """

    def __init__(
        self,
        num_queues: int = 1,
        *,
        min_branch_tokens: int = MIN_BRANCH_TOKENS,
        max_passed: int = MAX_PASSED,
        seed: int = 0,
    ) -> None:
        self._queues = [_Queue(max_passed, random.Random(seed)) for _ in range(num_queues)]
        self._home: dict[str, _Queue] = {}
        self._min_branch = min_branch_tokens
        self._last = b""
        self._forks: list[int] = []
        self._neighbours: Neighbours | None = None

    def __len__(self) -> int:
        """Number of jobs that `next` can still offer."""
        return sum(queue.open for queue in self._queues)

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

        `more`: jobs wait that are not known yet. Then a subtree is not always finished: see `_cheapest`.
        """
        chosen: list[Chosen] = []
        for queue in self._queues:
            while len(chosen) < n and queue.open:
                job_id, self._last, self._forks = queue.pick(self._last, self._neighbours, more=more)
                branches = self._branches(queue, self._forks)
                chosen.append(Chosen(job_id, np.frombuffer(self._last, np.int32), branches))
        return chosen

    def heed(self, neighbours: Neighbours | None) -> None:
        """Take note of what other workers do; None: there are none."""
        self._neighbours = neighbours

    def trail(self) -> frozenset[int]:
        """Return marks of the turns that led to the last offer.

        A mark names a child of a node by all tokens up to its first one, whatever else is known of it.
        """
        key = self._last
        return frozenset(zlib.crc32(key[: fork + WIDTH]) for fork in self._forks[:_MAX_TURNS] if fork < len(key))

    def _branches(self, home: _Queue, depths: list[int]) -> tuple[int, ...]:
        """Return the depths, and those of other queues' jobs, in tokens; all but the last token can be shared."""
        ends = depths
        if len(home) < len(self._home):
            others = (depth for queue in self._queues if queue is not home for depth in queue.departures(self._last))
            ends = sorted({*depths, *others})
        last = len(self._last) - WIDTH
        if ends and ends[-1] > last:
            ends = [*ends[:-1], last] if ends[-2:-1] != [last] else ends[:-1]
        least = self._min_branch * WIDTH
        return tuple([depth // WIDTH for depth in ends if depth >= least])


class _Queue:
    """The trie of one queue and the age of its jobs."""

    def __init__(self, max_passed: int, rng: random.Random) -> None:
        self._trie = Trie()
        self._last = b""  # the prompt of the job that this queue offered last
        self._rng = rng
        self._new: list[Job] = []  # not in the trie yet: many are inserted faster together
        self._births = 0
        self._jobs: dict[str, Job] = {}
        self._arrivals: deque[Job] = deque()  # oldest first; those that left go when they reach the head
        self._max_passed = max_passed
        self._num_passing = 0  # jobs that were offered before the oldest arrival here and came after it

    def __len__(self) -> int:
        """Number of jobs known, offered or not."""
        return len(self._jobs)

    @property
    def open(self) -> int:
        """Number of jobs not offered yet."""
        return self._trie.root.open + len(self._new)

    @property
    def num_bytes(self) -> int:
        """Bytes of the tokens held."""
        return self._grown().num_bytes

    def add(self, job_id: str, key: bytes) -> None:
        """Insert a job; it is the youngest."""
        self._births += 1
        job = self._jobs[job_id] = Job(job_id, key, self._births, self._trie.root)
        self._new.append(job)
        self._arrivals.append(job)

    def remove(self, job_id: str) -> None:
        """Take a job out."""
        self._grown().remove(self._jobs.pop(job_id))

    def departures(self, key: bytes) -> list[int]:
        """Return the depths (bytes) at which known jobs leave the prompt `key` of another queue."""
        return self._grown().departures(key)

    def pick(self, last: bytes, neighbours: Neighbours | None, *, more: bool) -> tuple[str, bytes, list[int]]:
        """Offer the best waiting job, given the prompt that was offered last and the neighbours; there must be one.

        Return its id, its key and the depths (bytes) at which other jobs of this queue leave it.
        """
        trie = self._grown()
        if last is not self._last:
            trie.here, trie.depth = trie.root, 0  # it is of another queue
        job = self._overdue() or (
            self._nearest(last, more=more) if neighbours is None else self._aside(last, neighbours)
        )
        self._num_passing += 1
        self._last, forks = trie.take(job)
        trie.here, trie.depth = job.node, len(self._last)
        return job.id, self._last, forks

    def _grown(self) -> Trie:
        """Return the trie with all jobs in it."""
        if self._new:
            new, self._new = self._new, []
            self._trie.insert(new)
        return self._trie

    def _overdue(self) -> Job | None:
        """Return the oldest waiting job if too many later ones went before it."""
        while self._arrivals[0].offered or self._arrivals[0].gone:
            self._num_passing -= self._arrivals.popleft().offered
        return self._arrivals[0] if self._num_passing >= self._max_passed else None

    def _nearest(self, last: bytes, *, more: bool) -> Job:
        """Follow the last prompt down as far as jobs wait there, then take the largest subtree at every turn."""
        node, depth = self._trie.held(last)
        if more and not (node.waiting and depth == node.end):
            node = _cheapest(node, depth)
        while not node.waiting:
            node = node.largest()
        return self._jobs[next(iter(node.waiting))]

    def _aside(self, last: bytes, neighbours: Neighbours) -> Job:
        """Go on in the subtree of the last prompt unless a senior is there too; else take the largest free one.

        Where everything is taken, go in with the others and take jobs at random, so as not to reach for the same ones.
        """
        node, mark, on_path, sharing = self._trie.root, 0, True, False
        while True:
            child = node.child(last) if on_path else None
            if child is None or not child.open:
                if node.waiting:
                    return self._jobs[next(iter(node.waiting))]
                child = None
            turn = zlib.crc32(child.segment[:WIDTH], mark) if child else 0
            if child is None or turn in neighbours.senior:
                found = self._turn(node, mark, neighbours, sharing)
                if child is None or found[0] < 3:
                    _, turn, child = found
            sharing = sharing or turn in neighbours.running
            on_path = on_path and last.startswith(child.segment, node.end)
            mark = zlib.crc32(child.segment, mark)
            node = child

    def _turn(self, node: Node, mark: int, neighbours: Neighbours, sharing: bool) -> tuple[int, int, Node]:
        """Return the child to enter, after its rank and its mark; `mark` is the one of all tokens up to `node`."""
        few = node.largest_few(_TURNS)
        if sharing:
            few = [child for child in node.children.values() if child.open]
            few = self._rng.sample(few, min(_TURNS, len(few)))
        marks = [zlib.crc32(child.segment[:WIDTH], mark) for child in few]
        ranks = [neighbours.rank(turn) for turn in marks]
        at = ranks.index(min(ranks))
        return ranks[at], marks[at], few[at]


def _cheapest(node: Node, depth: int) -> Node:
    """Return the subtree, anywhere, whose waiting jobs cost the fewest tokens each.

    The last prompt is held down to `depth`, on the segment of `node`, where jobs still wait. What is needed beyond it
    must be computed, and what leaving it costs when they get their turn: a subtree elsewhere has to be worth the way
    there and back.
    """
    rest = node.end - depth  # where the last prompt left the segment, there is no way back
    best, lowest = node, (node.fresh - len(node.segment) + rest) / node.open if rest else math.inf
    below, above = None, node.parent
    while True:
        back = max(0, depth - node.end)
        if back < lowest * (node.open - (below.open if below else 0)):  # else no job aside of the way is worth it
            best, lowest = _cheaper(node, below, rest, back, (best, lowest))
        if above is None:
            return best
        node, below, above, rest = above, node, above.parent, 0


def _cheaper(fork: Node, taken: Node | None, there: int, back: int, best: tuple[Node, float]) -> tuple[Node, float]:
    """Return the best subtree below `fork`, `taken` excepted, and its price, or `best` if that is cheaper."""
    found, lowest = best
    if taken and fork.waiting and back < lowest * len(fork.waiting):
        found, lowest = fork, back / len(fork.waiting)
    stack = [fork]
    while stack:
        node = stack.pop()
        way = node.end - fork.end + there + back
        for child in node.largest_few(_SIBLINGS):
            if way >= lowest * child.open:
                break
            if child is taken:
                continue
            price = (way + child.fresh) / child.open
            if price < lowest:
                found, lowest = child, price
            if way + len(child.segment) < lowest * child.open:
                stack.append(child)
    return found, lowest
