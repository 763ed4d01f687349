"""A compressed radix tree over token ids: match, insert, split, pin, release, evict, check.

Pure: knows neither MLX nor Redis. What a node holds is opaque (`Payload`): it has a size and can be cut in two.

    root
     `-- [0 .. 512)  system prompt         a node owns the tokens [start, end) of every prompt that
          |-- [512 .. 700)  document A     runs through it; its children begin with different tokens
          `-- [512 .. 655)  document B

One tree serves one namespace (model, adapter, KV dtype): whoever owns it keeps others out.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]
_ITEM = 4  # bytes of a token


class Payload(Protocol):
    """What a node holds for its tokens."""

    @property
    def nbytes(self) -> int:
        """Bytes that are freed when the payload is dropped."""
        ...

    def split(self, at: int) -> tuple[Self, Self]:
        """Return the first `at` tokens and the rest, neither keeping the other's memory alive."""
        ...


P = TypeVar("P", bound=Payload)


class Node(Generic[P]):
    """One segment of the tree. Read it freely; only the tree changes it.

    Attributes:
        start, end: the depths (tokens from the root) between which its own tokens lie.
        raw: these tokens as int32 in memory: equal segments are found with one comparison of bytes.
        nbytes: bytes of the payload.
        pins: how many locked handles lie in its subtree; above zero it cannot be evicted.
        last_used: the tree's count of uses when it was locked last, or inserted.
    """

    __slots__ = ("children", "end", "last_used", "nbytes", "offer", "parent", "payload", "pins", "raw", "start")

    def __init__(self, raw: bytes, start: int, parent: Node[P] | None, payload: P | None) -> None:
        self.raw = raw
        self.start = start
        self.end = start + len(raw) // _ITEM
        self.parent = parent
        self.payload = payload
        self.nbytes = 0 if payload is None else payload.nbytes
        self.children: dict[int, Node[P]] = {}
        self.pins = 0
        self.last_used = 0
        self.offer = 0  # number of the entry in the tree's heap that counts; earlier ones are out of date

    @property
    def tokens(self) -> Tokens:
        """The node's own tokens, a view that cannot be written."""
        return np.frombuffer(self.raw, np.int32)

    @property
    def first(self) -> int:
        """The first of its tokens: its key among the parent's children."""
        return memoryview(self.raw).cast("i")[0]

    def path(self) -> list[Node[P]]:
        """Return the nodes from the root's child down to this one."""
        nodes: list[Node[P]] = []
        node: Node[P] | None = self
        while node is not None and node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


class Match(NamedTuple, Generic[P]):
    """How far a prompt is in the tree: `length` tokens, the last of them inside (or at the end of) `node`."""

    node: Node[P]
    length: int


class Evicted(NamedTuple):
    """What one call of `evict` took out."""

    nodes: int
    nbytes: int


Policy = Callable[[Node[Any]], float]
"""The order of eviction: of the leaves that nobody uses, the one for which it returns the least goes first.

It is asked once each time a leaf comes to be unused (when its last pin is released, or its last child has gone) or is
cut: what else changes while the leaf lies there unused has no effect. It must not change the tree. Equal leaves go in
the order in which they came to be unused.
"""


def least_recently_used(node: Node[Any]) -> float:
    """Evict what was used longest ago."""
    return node.last_used


class RadixTree(Generic[P]):
    """The tree of one namespace. `policy` chooses what `evict` drops; nothing else does.

    Attributes:
        nbytes, num_nodes, num_tokens: what it holds, the root not counted.
        num_splits: how often a node was cut so far; a reader of payloads looks again when it changes.
        pinned_bytes, num_pinned: the part of `nbytes` and `num_nodes` that eviction cannot touch now.
    """

    def __init__(self, policy: Policy = least_recently_used) -> None:
        self.root: Node[P] = Node(b"", 0, None, None)
        self.nbytes = 0
        self.num_nodes = 0
        self.num_tokens = 0
        self.num_splits = 0
        self.pinned_bytes = 0
        self.num_pinned = 0
        self._clock = 0
        self._policy = policy
        self._leaves: list[tuple[float, int, Node[P]]] = []  # see `_offer`
        self._num_offers = 0

    def match(self, tokens: Tokens) -> Match[P]:
        """Find the longest prefix of `tokens` in the tree. Changes nothing, not even recency."""
        node, length = self.root, 0
        raw, ids = tokens.tobytes(), tokens.data
        while length < len(ids):
            child = node.children.get(ids[length])
            if child is None:
                break
            if not raw.startswith(child.raw, length * _ITEM):
                return Match(child, length + common_prefix(child.tokens, tokens[length:]))
            node, length = child, child.end
        return Match(node, length)

    def lock(self, node: Node[P]) -> None:
        """Pin `node` and all above it, and mark them as used now. Undo with `release(node)`."""
        self._clock += 1
        step: Node[P] | None = node
        while step is not None:
            if step.pins == 0:
                self._count_pinned(step, +1)
            step.pins += 1
            step.last_used = self._clock
            step = step.parent

    def release(self, node: Node[P]) -> None:
        """Undo one `lock(node)`. What becomes unpinned stays in the tree until it is evicted."""
        step: Node[P] | None = node
        while step is not None:
            if step.pins <= 0:
                raise RuntimeError(f"release of a node that is not locked (tokens {step.start} to {step.end})")
            step.pins -= 1
            if step.pins == 0:
                self._count_pinned(step, -1)
            step = step.parent
        self._offer(node)

    def insert(self, at: Match[P], tokens: Tokens, payload: P) -> Node[P]:
        """Add the segment `tokens` below `at`, a fresh match; the tree owns the payload from now on.

        A match that ends inside a node splits it: the node keeps its identity, its children and its lower part, and
        gets a new parent with the upper part, so handles on it stay right.

        Raises:
            ValueError: nothing to insert, or a child begins with the same token (match again first).
        """
        if not len(tokens):
            raise ValueError("an empty segment cannot be inserted")
        parent = at.node if at.length == at.node.end else self._split(at.node, at.length)
        node = Node(tokens.astype(np.int32, copy=False).tobytes(), at.length, parent, payload)
        if node.first in parent.children:
            raise ValueError(f"depth {at.length} already has a branch with token {node.first}; match again first")
        self._clock += 1
        node.last_used = self._clock
        parent.children[node.first] = node
        self._count(node, +1)
        self._offer(node)
        return node

    def fill(self, at: Match[P], payload: P) -> Node[P]:
        """Give the node that ends at `at` a payload if its own is empty, splitting a node to make one end there."""
        node = at.node if at.length == at.node.end else self._split(at.node, at.length)
        if node.nbytes == 0:
            self._count(node, -1)
            node.payload, node.nbytes = payload, payload.nbytes
            self._count(node, +1)
        return node

    def evict(self, nbytes: int, nodes: int = 0) -> Evicted:
        """Drop unpinned leaves, as the policy orders them, until `nbytes` and `nodes` are freed or none is left.

        A parent that is left childless and unpinned becomes a leaf and goes in the same pass, in its turn.
        """
        freed = count = 0
        while self._leaves and (freed < nbytes or count < nodes):
            _, offer, node = heapq.heappop(self._leaves)
            parent = node.parent
            if parent is None or not _idle(node) or node.offer != offer:
                continue  # gone, in use, or used since
            del parent.children[node.first]
            self._count(node, -1)
            freed, count = freed + node.nbytes, count + 1
            node.payload = node.parent = None
            self._offer(parent)
        return Evicted(count, freed)

    def nodes(self) -> Iterator[Node[P]]:
        """Yield every node but the root, parents first."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def check(self) -> None:
        """Prove the invariants.

        Raises:
            RuntimeError: a count, a pin, a link or an edge is wrong; the message has both figures.
        """
        nbytes = num_nodes = num_tokens = pinned = num_pinned = 0
        for node in self.nodes():
            _check_links(node)
            nbytes, num_nodes, num_tokens = nbytes + node.nbytes, num_nodes + 1, num_tokens + node.end - node.start
            pinned, num_pinned = pinned + (node.nbytes if node.pins else 0), num_pinned + bool(node.pins)
        missing = {n for n in self.nodes() if _idle(n)} - {n for _, offer, n in self._leaves if offer == n.offer}
        if missing:
            raise RuntimeError(f"{len(missing)} leaves that nobody uses are not offered to eviction")
        counted = (self.nbytes, self.num_nodes, self.num_tokens, self.pinned_bytes, self.num_pinned)
        if counted != (nbytes, num_nodes, num_tokens, pinned, num_pinned):
            raise RuntimeError(
                f"counters (bytes, nodes, tokens, pinned bytes, pinned nodes) say {counted}, the tree holds "
                f"{(nbytes, num_nodes, num_tokens, pinned, num_pinned)}"
            )

    def _split(self, node: Node[P], depth: int) -> Node[P]:
        """Cut `node` at `depth`, strictly inside it; return the new upper node."""
        assert node.parent is not None
        assert node.payload is not None
        cut = (depth - node.start) * _ITEM
        above, below = node.payload.split(depth - node.start)  # first: it copies, and may lack the memory
        self._count(node, -1)
        self.num_splits += 1
        upper = Node(node.raw[:cut], node.start, node.parent, above)
        upper.pins, upper.last_used = node.pins, node.last_used
        node.parent.children[upper.first] = upper
        node.raw, node.start, node.parent = node.raw[cut:], depth, upper
        node.payload, node.nbytes = below, below.nbytes
        upper.children[node.first] = node
        self._count(upper, +1)
        self._count(node, +1)
        self._offer(node)  # smaller than it was
        return upper

    def _offer(self, node: Node[P]) -> None:
        """Put a leaf that nobody uses where eviction finds it, in the place that the policy gives it.

        The heap keeps entries that are out of date until they come up; it is made anew when they are the most of it.
        """
        if not _idle(node) or node is self.root:
            return
        self._num_offers += 1
        node.offer = self._num_offers
        heapq.heappush(self._leaves, (self._policy(node), node.offer, node))
        if len(self._leaves) > 2 * self.num_nodes + 16:
            self._leaves = [entry for entry in self._leaves if entry[1] == entry[2].offer and entry[2].parent]
            heapq.heapify(self._leaves)

    def _count(self, node: Node[P], sign: int) -> None:
        self.nbytes += sign * node.nbytes
        self.num_nodes += sign
        self.num_tokens += sign * (node.end - node.start)
        if node.pins:
            self._count_pinned(node, sign)

    def _count_pinned(self, node: Node[P], sign: int) -> None:
        self.pinned_bytes += sign * node.nbytes
        self.num_pinned += sign * (node is not self.root)


def common_prefix(a: Tokens, b: Tokens) -> int:
    """Return how many leading tokens two arrays share."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    first = int(differs.argmax()) if n else 0
    return first if n and differs[first] else n


def _idle(node: Node[P]) -> bool:
    return not node.children and not node.pins


def _check_links(node: Node[P]) -> None:
    parent = node.parent
    where = f"node at tokens {node.start} to {node.end}"
    if parent is None or parent.children.get(node.first) is not node:
        raise RuntimeError(f"{where} is an orphan")
    if node.end <= node.start or node.start != parent.end or node.end - node.start != len(node.raw) // _ITEM:
        raise RuntimeError(f"{where} does not continue its parent, which ends at {parent.end}")
    if node.payload is None or node.nbytes != node.payload.nbytes:
        raise RuntimeError(f"{where} counts {node.nbytes} bytes, not those of its payload")
    if not node.pins >= sum(child.pins for child in node.children.values()):
        raise RuntimeError(f"{where} has {node.pins} pins, fewer than its children")
