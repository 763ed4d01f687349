"""The prefix cache of one model: the radix tree, what its nodes hold, and the memory that they and the rows may use.

Between the engine, which runs rows, and the tree, which knows no arrays. Knows no queue and runs no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from mlx_lm.models.cache import ArraysCache, KVCache, make_prompt_cache

from common.errors import ContextLengthExceeded
from worker.forms import Choose
from worker.kv import Batch
from worker.model import LoadedModel
from worker.radix import Evicted, Match, Node, RadixTree
from worker.row import Row
from worker.solo import Solo, leaves

Reuse = Literal["shared", "copied", "snapshot", "none"]
"""How a prefix serves a row: read in place by all; its KV copied; the whole state at its end copied; not at all."""


WAYS: Final[dict[Reuse, str]] = {
    "shared": "stored once and read in place",
    "copied": "copied for each row: this model's attention cannot read shared ones",
    "snapshot": "reused where the queue showed in advance that prompts part: this model keeps more than plain KV",
    "none": "not reused: no way was found that leaves this model's tokens unchanged",
}
"""What becomes of prefixes, per way, in words."""

PASSING = 0.04
"""Copies that live for a moment may exceed the budget by this part of it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What engine and cache may use.

    Attributes:
        chunk_tokens: prompt tokens between two decode steps.
        kv_bytes: bound on tree and rows together, worst case, with the copies that are made of them.
        arrays: bound on buffers of tree and rows: Metal has a fixed number of them for a process.
        picture_bytes: bound on what is kept of pictures beside it, the one used last excepted.
    """

    max_rows: int
    chunk_tokens: int
    kv_bytes: int
    arrays: int = 400_000
    picture_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Need:
    """What must fit beside the tree.

    Attributes:
        holders: things that hold what one cache of the model does: for plain KV two arrays per layer.
        passing: bytes needed besides for a moment, while buffers are copied layer by layer.
    """

    nbytes: int
    holders: int
    passing: int = 0

    def __add__(self, other: Need) -> Need:
        return Need(self.nbytes + other.nbytes, self.holders + other.holders, max(self.passing, other.passing))


NOTHING = Need(0, 0)


class PrefixCache:
    """Finds, keeps and evicts prefixes; not thread-safe.

    Attributes:
        tree: lives as long as the process.
        evicted: totals since start.
    """

    def __init__(self, loaded: LoadedModel, limits: Limits, *, choose: Choose, reuse: Reuse) -> None:
        self.tree: RadixTree[Any] = RadixTree()
        self.evicted = Evicted(0, 0)
        self.reuse = reuse
        self._loaded, self._limits, self._choose = loaded, limits, choose
        self._max_holders = limits.arrays // max(1, _num_arrays(make_prompt_cache(loaded.model)))

    def new_batch(self, prefill_columns: int | None = None) -> Any:
        """Return an empty batch of the kind that this model's rows run in; see `worker.kv.Batch`."""
        if self.reuse == "shared":
            return Batch(self._loaded.num_layers, self._choose, prefill_columns=prefill_columns)
        return Solo(lambda: make_prompt_cache(self._loaded.model), snapshots=self.reuse != "copied")

    def find(self, row: Row) -> Match[Any]:
        """Return how much of a prompt can be reused; its last token never is, since something must be left to run."""
        found = self.tree.match(row.cacheable)
        if self.reuse == "snapshot":
            return _last_state(found)
        return _cut(found, row.prompt.whole(found.length))

    def attach(self, row: Row, node: Node[Any], prefix_tokens: int) -> None:
        """Let a row read the tree up to `prefix_tokens`, which lie in `node`; what it read before is released."""
        self.tree.lock(node)
        self.detach(row)
        row.node, row.prefix_tokens = node, prefix_tokens

    def detach(self, row: Row) -> None:
        """Release what a row reads."""
        self.unpin(row)
        row.prefix_tokens = 0

    def unpin(self, row: Row) -> None:
        """Let eviction have what a row began with; it has a copy."""
        if row.node is not None:
            self.tree.release(row.node)
        row.node = None

    def keep(
        self, row: Row, batch: Any, index: int, end: int, *, beside: Need | None = None, last_use: bool = False
    ) -> Node[Any] | None:
        """Put what a row has computed up to depth `end` into the tree, as far as it is not there.

        Room for what is copied is made beside what the rows need; without `beside` it has been made before.
        `last_use` promises that the batch is dropped now.

        Returns the node in which `end` lies, or None where nothing can be kept: there is no room, the values are not
        all finite, the model's state cannot be reused, or another picture is there whose keys begin as this one's.
        """
        if self.reuse == "none":
            return None
        tokens = row.tokens(end)
        at = self.tree.match(tokens)
        if row.prompt.whole(at.length) < at.length:
            return None
        if at.length == end and (self.reuse != "snapshot" or (at.node.end == end and at.node.nbytes)):
            return at.node
        self.tree.lock(at.node)  # to make room must not take away the place for which it is made
        try:
            if beside is not None and not self.make_room(beside + Need(self._copied_bytes(at, end), 0)):
                return None
            own = batch.tail(index, at.length - row.prefix_tokens, end - row.prefix_tokens, last_use=last_use)
            if not own.finite():
                return None
            return self.tree.insert(at, tokens[at.length :], own) if at.length < end else self.tree.fill(at, own)
        finally:
            self.tree.release(at.node)

    def make_room(self, need: Need) -> bool:
        """Evict until `need` fits beside the tree; return whether it does."""
        tree = self.tree
        passing = max(0, need.passing - int(PASSING * self._limits.kv_bytes))
        over = tree.nbytes + need.nbytes + passing - self._limits.kv_bytes
        nodes_over = tree.num_nodes + 2 + need.holders - self._max_holders
        if over > tree.nbytes - tree.pinned_bytes or nodes_over > tree.num_nodes - tree.num_pinned:
            return False  # and nothing is evicted in vain
        self.evict(over, nodes_over)
        return True

    def evict(self, nbytes: int, nodes: int = 0) -> Evicted:
        """Evict so much and so many, or all that is not in use."""
        gone = self.tree.evict(nbytes, nodes)
        self.evicted = Evicted(self.evicted.nodes + gone.nodes, self.evicted.nbytes + gone.nbytes)
        return gone

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self._loaded.num_layers

    @property
    def pinned_tokens(self) -> int:
        """Tokens that rows read in the tree, each once."""
        return self.tree.pinned_bytes // max(1, self._loaded.kv_bytes_per_token)

    def tail_tokens(self, row: Row) -> int:
        """Return how many tokens a row can come to hold of its own; the last of its answer is never computed."""
        return row.longest - 1 - (row.prefix_tokens if self.reuse == "shared" else 0)

    def segment_need(self, row: Row, end: int) -> Need:
        """Return what it takes to compute a segment up to depth `end` for a row, and to keep it."""
        at = Match(row.node or self.tree.root, row.prefix_tokens)
        copied = 0 if self.reuse == "shared" else self.nbytes(end)
        return Need(copied + self._copied_bytes(at, end), 1)

    def _copied_bytes(self, at: Match[Any], end: int) -> int:
        """Return what keeping the tokens from `at` to `end` adds, with the copy of a node that is cut for them."""
        if self.reuse == "snapshot":
            return self.nbytes(end)
        return self.nbytes(end - at.length) + (at.node.nbytes if at.length < at.node.end else 0)

    def nbytes(self, tokens: int) -> int:
        """Return the bytes of so many tokens' KV."""
        return tokens * self._loaded.kv_bytes_per_token + self._loaded.state_bytes

    def row_nbytes(self, row: Row) -> int:
        """Return the bytes that a row alone comes to; mlx-lm's own caches grow by many tokens at a time."""
        return self.nbytes(row.longest if self.reuse == "shared" else row.longest + KVCache.step - 1)

    def too_large(self, row: Row) -> ContextLengthExceeded:
        """Return the error of a job that could not run even alone."""
        need, budget = self.row_nbytes(row) / 1e9, self._limits.kv_bytes / 1e9
        return ContextLengthExceeded(
            f"{len(row.prompt.tokens)} prompt tokens and up to {row.prompt.max_tokens} of answer need {need:.2f} GB of "
            f"KV; the budget is {budget:.2f} GB: lower max_tokens, or raise RADIXQ_KV_BYTES"
        )


def _num_arrays(caches: Sequence[Any]) -> int:
    """Return how many arrays these caches hold once they are used: a list of states each, or keys and values."""
    return sum(len(leaf.cache) if isinstance(leaf, ArraysCache) else 2 for leaf in leaves(caches))


def _cut(found: Match[Any], length: int) -> Match[Any]:
    """Return a shorter match on the same way."""
    node = found.node
    while node.parent is not None and node.start >= length:
        node = node.parent
    return Match(node, length)


def _last_state(found: Match[Any]) -> Match[Any]:
    """Return the deepest node on the way whose end was reached and which holds a state."""
    node = found.node if found.length == found.node.end else found.node.parent
    while node is not None and node.parent is not None and not node.nbytes:
        node = node.parent
    assert node is not None
    return Match(node, node.end)
