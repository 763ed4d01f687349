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
from collections.abc import Iterator
from typing import Generic, NamedTuple, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]


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
        pins: how many locked handles lie in its subtree; above zero it cannot be evicted.
    """

    __slots__ = ("children", "last_used", "parent", "payload", "pins", "start", "tokens")

    def __init__(self, tokens: Tokens, start: int, parent: Node[P] | None, payload: P | None) -> None:
        self.tokens = tokens
        self.start = start
        self.parent = parent
        self.payload = payload
        self.children: dict[int, Node[P]] = {}
        self.pins = 0
        self.last_used = 0

    @property
    def end(self) -> int:
        """Depth at which the node's own tokens end."""
        return self.start + len(self.tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of the payload."""
        return self.payload.nbytes if self.payload is not None else 0

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


class RadixTree(Generic[P]):
    """The tree of one namespace.

    Attributes:
        nbytes, num_nodes, num_tokens: what it holds, the root not counted.
        num_splits: how often a node was cut so far; a reader of payloads looks again when it changes.
        pinned_bytes: the part of `nbytes` that eviction cannot touch now.
    """

    def __init__(self) -> None:
        self.root: Node[P] = Node(np.empty(0, np.int32), 0, None, None)
        self.nbytes = 0
        self.num_nodes = 0
        self.num_tokens = 0
        self.num_splits = 0
        self.pinned_bytes = 0
        self._clock = 0

    def match(self, tokens: Tokens) -> Match[P]:
        """Find the longest prefix of `tokens` in the tree. Changes nothing, not even recency."""
        node, length = self.root, 0
        while length < len(tokens):
            child = node.children.get(int(tokens[length]))
            if child is None:
                break
            common = common_prefix(child.tokens, tokens[length:])
            node, length = child, length + common
            if common < len(child.tokens):
                break
        return Match(node, length)

    def lock(self, node: Node[P]) -> None:
        """Pin `node` and all above it, and mark them as used now. Undo with `release(node)`."""
        self._clock += 1
        for step in _upward(node):
            if step.pins == 0:
                self.pinned_bytes += step.nbytes
            step.pins += 1
            step.last_used = self._clock

    def release(self, node: Node[P]) -> None:
        """Undo one `lock(node)`. What becomes unpinned stays in the tree until it is evicted."""
        for step in _upward(node):
            if step.pins <= 0:
                raise RuntimeError(f"release of a node that is not locked (tokens {step.start} to {step.end})")
            step.pins -= 1
            if step.pins == 0:
                self.pinned_bytes -= step.nbytes

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
        first = int(tokens[0])
        if first in parent.children:
            raise ValueError(f"depth {at.length} already has a branch with token {first}; match again before inserting")
        node = Node(np.array(tokens, np.int32), at.length, parent, payload)
        self._clock += 1
        node.last_used = self._clock
        parent.children[first] = node
        self._count(node, +1)
        return node

    def fill(self, at: Match[P], payload: P) -> Node[P]:
        """Give the node that ends at `at` a payload if its own is empty, splitting a node to make one end there."""
        node = at.node if at.length == at.node.end else self._split(at.node, at.length)
        if node.nbytes == 0:
            self._count(node, -1)
            node.payload = payload
            self._count(node, +1)
        return node

    def evict(self, nbytes: int, nodes: int = 0) -> Evicted:
        """Drop least recently used unpinned leaves until `nbytes` and `nodes` are freed or none is left.

        A parent that is left childless and unpinned becomes a leaf and goes in the same pass, in its turn.
        """
        leaves = [(n.last_used, id(n), n) for n in self.nodes() if not n.children and not n.pins]
        heapq.heapify(leaves)
        freed = count = 0
        while leaves and (freed < nbytes or count < nodes):
            _, _, node = heapq.heappop(leaves)
            parent = node.parent
            assert parent is not None
            del parent.children[int(node.tokens[0])]
            self._count(node, -1)
            freed, count = freed + node.nbytes, count + 1
            node.payload = None
            if parent is not self.root and not parent.children and not parent.pins:
                heapq.heappush(leaves, (parent.last_used, id(parent), parent))
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
        nbytes = num_nodes = num_tokens = pinned = 0
        for node in self.nodes():
            _check_links(node)
            nbytes, num_nodes, num_tokens = nbytes + node.nbytes, num_nodes + 1, num_tokens + len(node.tokens)
            pinned += node.nbytes if node.pins else 0
        counted = (self.nbytes, self.num_nodes, self.num_tokens, self.pinned_bytes)
        if counted != (nbytes, num_nodes, num_tokens, pinned):
            raise RuntimeError(
                f"counters (bytes, nodes, tokens, pinned) say {counted}, the tree holds "
                f"{(nbytes, num_nodes, num_tokens, pinned)}"
            )

    def _split(self, node: Node[P], depth: int) -> Node[P]:
        """Cut `node` at `depth`, strictly inside it; return the new upper node."""
        assert node.parent is not None
        assert node.payload is not None
        cut = depth - node.start
        self._count(node, -1)
        self.num_splits += 1
        upper: Node[P] = Node(node.tokens[:cut].copy(), node.start, node.parent, None)
        upper.payload, node.payload = node.payload.split(cut)
        upper.pins, upper.last_used = node.pins, node.last_used
        node.parent.children[int(upper.tokens[0])] = upper
        node.tokens, node.start, node.parent = node.tokens[cut:].copy(), depth, upper
        upper.children[int(node.tokens[0])] = node
        self._count(upper, +1)
        self._count(node, +1)
        return upper

    def _count(self, node: Node[P], sign: int) -> None:
        self.nbytes += sign * node.nbytes
        self.num_nodes += sign
        self.num_tokens += sign * len(node.tokens)
        self.pinned_bytes += sign * node.nbytes if node.pins else 0


def common_prefix(a: Tokens, b: Tokens) -> int:
    """Return how many leading tokens two arrays share."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    first = int(differs.argmax()) if n else 0
    return first if n and differs[first] else n


def _upward(node: Node[P]) -> Iterator[Node[P]]:
    step: Node[P] | None = node
    while step is not None:
        yield step
        step = step.parent


def _check_links(node: Node[P]) -> None:
    parent = node.parent
    where = f"node at tokens {node.start} to {node.end}"
    if parent is None or parent.children.get(int(node.tokens[0])) is not node:
        raise RuntimeError(f"{where} is an orphan")
    if not len(node.tokens) or node.start != parent.end:
        raise RuntimeError(f"{where} does not continue its parent, which ends at {parent.end}")
    if node.payload is None:
        raise RuntimeError(f"{where} has no payload")
    if not node.pins >= sum(child.pins for child in node.children.values()):
        raise RuntimeError(f"{where} has {node.pins} pins, fewer than its children")
