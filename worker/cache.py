"""The prefix cache of one model: the radix tree, what its nodes hold, and the memory that they and the rows may use.

Between the engine, which runs rows, and the tree, which knows no arrays. Knows no queue and runs no model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from mlx_lm.models.cache import make_prompt_cache

from common.errors import ContextLengthExceeded
from worker.kv import Batch
from worker.model import LoadedModel
from worker.radix import Evicted, Match, Node, RadixTree
from worker.row import Row
from worker.solo import Solo

Reuse = Literal["shared", "copied", "snapshot", "none"]
"""How a prefix serves a row: read in place by all; its KV copied; the whole state at its end copied; not at all."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What engine and cache may use.

    Attributes:
        chunk_tokens: prompt tokens between two decode steps.
        kv_bytes: bound on tree and tails together, worst case.
        arrays: bound on buffers held by the tree: Metal has a fixed number of them for a process.
    """

    max_rows: int
    chunk_tokens: int
    kv_bytes: int
    arrays: int = 400_000


class PrefixCache:
    """Finds, keeps and evicts prefixes; not thread-safe.

    Attributes:
        tree: lives as long as the process.
        evicted: totals since start.
    """

    def __init__(self, loaded: LoadedModel, limits: Limits, *, exact: bool, reuse: Reuse) -> None:
        self.tree: RadixTree[Any] = RadixTree()
        self.evicted = Evicted(0, 0)
        self.reuse = reuse
        self._loaded, self._limits, self._exact = loaded, limits, exact

    def new_batch(self, columns: int = 0) -> Any:
        """Return an empty batch of the kind that this model's rows run in."""
        if self.reuse == "shared":
            return Batch(self._loaded.num_layers, exact=self._exact, columns=columns)
        return Solo(lambda: make_prompt_cache(self._loaded.model), snapshots=self.reuse != "copied")

    def find(self, row: Row) -> Match[Any]:
        """Return how much of a prompt can be reused; its last token never is, since something must be left to run."""
        found = self.tree.match(row.cacheable)
        return _last_state(found) if self.reuse == "snapshot" else found

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

    def keep(self, row: Row, batch: Any, index: int, end: int, *, last_use: bool = False) -> Node[Any] | None:
        """Put what a row has computed up to depth `end` into the tree, as far as it is not there.

        `last_use` promises that the batch is dropped now.

        Returns the node in which `end` lies, or None where nothing can be kept: the values are not all finite, or the
        model's state cannot be reused.
        """
        if self.reuse == "none":
            return None
        tokens = row.tokens(end)
        at = self.tree.match(tokens)
        if at.length == end and (self.reuse != "snapshot" or (at.node.end == end and at.node.nbytes)):
            return at.node
        own = batch.tail(index, at.length - row.prefix_tokens, end - row.prefix_tokens, last_use=last_use)
        if not own.finite():
            return None
        return self.tree.insert(at, tokens[at.length :], own) if at.length < end else self.tree.fill(at, own)

    def make_room(self, nbytes: int, rows: Iterable[Row]) -> bool:
        """Evict until `nbytes` more fit beside the tree and the worst case of `rows`; return whether they do."""
        over = self.tree.nbytes + nbytes + sum(self.need(row, None) for row in rows) - self._limits.kv_bytes
        nodes_over = self.tree.num_nodes + 1 - self._limits.arrays // (2 * self._loaded.num_layers)
        if over > self.tree.nbytes - self.tree.pinned_bytes:
            return False  # and nothing is evicted in vain
        if over > 0 or nodes_over > 0:
            gone = self.evict(over, nodes_over)
            over, nodes_over = over - gone.nbytes, nodes_over - gone.nodes
        return over <= 0 and nodes_over <= 0

    def evict(self, nbytes: int, nodes: int = 0) -> Evicted:
        """Evict so much and so many, or all that is not in use."""
        gone = self.tree.evict(nbytes, nodes)
        self.evicted = Evicted(self.evicted.nodes + gone.nodes, self.evicted.nbytes + gone.nbytes)
        return gone

    def need(self, row: Row, segment_end: int | None) -> int:
        """Return the bytes that a row can come to hold of its own, or that computing a segment for it takes."""
        shared = row.prefix_tokens if self.reuse == "shared" else 0
        if segment_end is None:
            return self._bytes(row.longest - shared)
        kept = segment_end if self.reuse == "snapshot" else segment_end - row.prefix_tokens
        copied = 0 if self.reuse == "shared" else self._bytes(segment_end)
        return copied + self._bytes(kept)

    def _bytes(self, tokens: int) -> int:
        return tokens * self._loaded.kv_bytes_per_token + self._loaded.state_bytes

    def too_large(self, row: Row) -> ContextLengthExceeded:
        """Return the error of a job that could not run even alone."""
        need, budget = self._bytes(row.longest) / 1e9, self._limits.kv_bytes / 1e9
        return ContextLengthExceeded(
            f"{len(row.prompt.tokens)} prompt tokens and up to {row.prompt.max_tokens} of answer need {need:.2f} GB of "
            f"KV; the budget is {budget:.2f} GB: lower max_tokens, or raise RADIXQ_KV_BYTES"
        )


def _last_state(found: Match[Any]) -> Match[Any]:
    """Return the deepest node on the way whose end was reached and which holds a state."""
    node = found.node if found.length == found.node.end else found.node.parent
    while node is not None and node.parent is not None and not node.nbytes:
        node = node.parent
    assert node is not None
    return Match(node, node.end)
