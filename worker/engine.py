"""Prefill by chunks, decode by steps, rows join and leave: from `Prompt` to `Finished`. Knows no Redis, no text.

One step runs a chunk of the current prefill and one decode step of all running rows. Prefill comes in two kinds, one
at a time and in the order in which jobs were given: a *segment* that several known jobs need becomes a node of the
tree; the *tails* of jobs whose shared part is complete run together and join the batch. So N jobs with one cold
prefix find it computed once, by the first of them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from common.errors import ContextLengthExceeded, InternalError, OutOfMemory, RadixqError
from common.log import logger
from worker.kv import KV, Batch
from worker.model import LoadedModel
from worker.radix import Match, RadixTree, common_prefix
from worker.row import Answer, Row
from worker.sampling import Sampler, sample
from worker.sequence import EngineStats, Event, Failed, Prompt, Tokens

MIN_SHARED_TOKENS = 16
"""A shared piece shorter than this is computed per row: a node of its own would cost more than it saves."""

log = logger("worker.engine")


@dataclass(frozen=True, slots=True)
class Limits:
    """What the engine may use.

    Attributes:
        kv_bytes: bound on tree and tails together, worst case.
        chunk_tokens: prompt tokens between two decode steps.
    """

    max_rows: int
    chunk_tokens: int
    kv_bytes: int


@dataclass(slots=True)
class Fill:
    """A prefill under way: the same number of columns for every row, shorter rows padded on the right.

    Attributes:
        rows: the jobs. One for a segment, where it is charged with it; all that join for tails.
        tokens: what is left to run per row.
        segment: whether the result becomes a node of the tree.
    """

    rows: list[Row]
    tokens: list[Tokens]
    batch: Batch
    segment: bool
    done: int = 0

    @property
    def width(self) -> int:
        """Columns in all."""
        return max(map(len, self.tokens))


class Engine:
    """Rows, tree and batch of one model. Not thread-safe: the thread that loaded the model calls everything.

    Attributes:
        tree: the KV cache; lives as long as the engine.
        blocked: the next job does not fit into memory until a running one ends.
    """

    def __init__(self, loaded: LoadedModel, limits: Limits, *, exact: bool) -> None:
        self.tree: RadixTree[KV] = RadixTree()
        self.blocked = False
        self._loaded = loaded
        self._model: Any = loaded.model
        self._limits = limits
        self._exact = exact
        self._waiting: deque[Row] = deque()
        self._fill: Fill | None = None
        self._rows: list[Row] = []
        self._batch = Batch(loaded.num_layers, exact=exact)
        self._splits_seen = 0
        self._stats = EngineStats(cache_bytes_limit=limits.kv_bytes, attention_form="packed" if exact else "merged")

    def add(self, job_id: str, prompt: Prompt) -> None:
        """Queue a job; it runs in a later `step`."""
        answer = Answer(self._loaded.tokenizer, prompt.sampling.stop)
        self._waiting.append(Row(job_id, prompt, answer, Sampler(prompt.sampling, job_id)))

    def abort(self, job_id: str) -> None:
        """Forget a job, wherever it is; nothing more is said of it. Unknown ids are ignored."""
        for index, row in enumerate(self._rows):
            if row.id == job_id:
                self._leave(index)
                return
        for row in [*self._waiting, *(self._fill.rows if self._fill else ())]:
            if row.id == job_id:
                row.aborted = True

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self._waiting or self._fill or self._rows)

    @property
    def running(self) -> list[str]:
        """Ids of the jobs that decode, in the order of the batch."""
        return [row.id for row in self._rows]

    def step(self) -> list[Event]:
        """Run one chunk of prefill and one decode step; return what ended.

        A failure of the model ends the jobs that took part in the call, and no others.
        """
        events: list[Event] = []
        self._follow_splits()
        if self._fill is None:
            self._fill = self._next_fill(events)
        if self._fill:
            events += self._guarded(self._run_fill, self._fill.rows)
        if self._rows:
            events += self._guarded(self._decode, self._rows)
        return events

    def stats(self) -> EngineStats:
        """Return counters and gauges as of now."""
        tree, rows = self.tree, len(self._rows)
        return replace(
            self._stats,
            cache_nodes=tree.num_nodes,
            cache_bytes=tree.nbytes + self._batch.nbytes,
            pinned_bytes=tree.pinned_bytes,
            prefix_bytes_saved=self._batch.copied_tokens * self._loaded.kv_bytes_per_token,
            batch_rows=rows,
            cohorts=self._batch.num_cohorts,
            active_bytes=mx.get_active_memory(),
            peak_bytes=mx.get_peak_memory(),
        )

    def check(self) -> None:
        """Prove that tree, pins and rows agree.

        Raises:
            RuntimeError: they do not.
        """
        self.tree.check()
        rows = [*self._rows, *(self._fill.rows if self._fill else ())]
        if self.tree.root.pins != sum(row.node is not None for row in rows):
            raise RuntimeError(f"{self.tree.root.pins} pins for {len(rows)} rows")

    # What to prefill next

    def _next_fill(self, events: list[Event]) -> Fill | None:
        """Take the next segment, or the next rows whose shared part is complete, from the head of the queue."""
        rows: list[Row] = []
        self.blocked = False
        while self._waiting and len(self._rows) + len(rows) < self._limits.max_rows:
            row = self._waiting[0]
            if row.aborted:
                self._waiting.popleft()
                continue
            found = self._find(row)
            end = self._shared_end(row, found.length)
            if end is not None and rows:
                break
            if rows and _wasteful([*map(_own_tokens, rows), len(row.cacheable) - found.length]):
                break
            need = (end - found.length) if end else len(row.prompt.tokens) - found.length + row.max_tokens
            self.tree.lock(found.node)  # before room is made: eviction must not take what was just found
            if not self._make_room(need, rows):
                self.tree.release(found.node)
                if not (rows or self._rows):
                    events.append(Failed(self._waiting.popleft().id, self._too_large(row)))
                    continue
                self.blocked = not rows
                break
            row.node, row.prefix_tokens = found.node, found.length
            if end is not None:
                return self._segment_fill(row, end)
            rows.append(self._waiting.popleft())
        return self._tail_fill(rows) if rows else None

    def _find(self, row: Row) -> Match[KV]:
        """Match a job against the tree, and against running rows: what a row holds for it alone becomes shared."""
        wanted = row.cacheable
        found = self.tree.match(wanted)
        best, shared = -1, found.length + MIN_SHARED_TOKENS - 1
        for index, other in enumerate(self._rows):
            held = other.tokens(other.prefix_tokens + self._batch.lengths[index])
            if (common := common_prefix(held, wanted)) > shared:
                best, shared = index, common
        if best < 0:
            return found
        self._share(best, shared)
        return self.tree.match(wanted)

    def _share(self, index: int, end: int) -> None:
        """Move a running row's KV up to depth `end` from its tail into the tree."""
        row, batch = self._rows[index], self._batch
        tokens = row.tokens(end)
        at = self.tree.match(tokens)
        start, stop = at.length - row.prefix_tokens, end - row.prefix_tokens
        node = at.node if start == stop else self.tree.insert(at, tokens[at.length :], batch.tail(index, start, stop))
        self._attach(row, node, end)
        batch.drop_front(index, stop)
        batch.set_path(index, row.path())

    def _shared_end(self, row: Row, start: int) -> int | None:
        """Return where the next segment from `start` ends that another known job needs too; None if none does."""
        last = len(row.cacheable)
        others = (common_prefix(row.prompt.tokens, other.prompt.tokens) for other in self._waiting if other is not row)
        ends = [min(end, last) for end in (*row.prompt.branches, *others)]
        return min((end for end in ends if end - start >= MIN_SHARED_TOKENS), default=None)

    def _make_room(self, tokens: int, starting: Sequence[Row]) -> bool:
        """Evict until `tokens` more fit beside the tree and the worst case of all rows; return whether they do."""
        per_token = self._loaded.kv_bytes_per_token
        filling = self._fill.rows if self._fill else ()
        tails = sum(row.worst_tail_tokens for row in (*self._rows, *filling, *starting))
        over: int = self.tree.nbytes + (tails + tokens) * per_token - self._limits.kv_bytes
        if over > 0:
            evicted = self.tree.evict(over)
            self._count(evicted_nodes=evicted.nodes, evicted_bytes=evicted.nbytes)
            over -= evicted.nbytes
        return over <= 0

    def _too_large(self, row: Row) -> ContextLengthExceeded:
        need = (len(row.prompt.tokens) + row.max_tokens) * self._loaded.kv_bytes_per_token
        return ContextLengthExceeded(
            f"{len(row.prompt.tokens)} prompt tokens and up to {row.max_tokens} of answer need {need / 1e9:.2f} GB "
            f"of KV; the budget is {self._limits.kv_bytes / 1e9:.2f} GB: lower max_tokens, or raise RADIXQ_KV_BYTES"
        )

    def _segment_fill(self, row: Row, end: int) -> Fill:
        tokens = row.prompt.tokens[row.prefix_tokens : end]
        waits = sum(common_prefix(other.prompt.tokens, row.prompt.tokens) >= end for other in self._waiting) - 1
        self._count(herd_waits=waits)
        return self._open_fill([row], [tokens], segment=True)

    def _tail_fill(self, rows: list[Row]) -> Fill:
        return self._open_fill(rows, [row.cacheable[row.prefix_tokens :] for row in rows], segment=False)

    def _open_fill(self, rows: list[Row], tokens: list[Tokens], *, segment: bool) -> Fill:
        batch = Batch(self._loaded.num_layers, exact=self._exact, columns=max(map(len, tokens)))
        batch.open([row.path() for row in rows])
        return Fill(rows, tokens, batch, segment)

    # Running the model

    def _run_fill(self) -> list[Event]:
        """Run one chunk; when it was the last, put the result where it belongs."""
        fill = self._fill
        assert fill is not None
        began = time.perf_counter()
        if fill.done < fill.width:
            self._run_chunk(fill)
        if fill.done >= fill.width:
            self._fill = None
            self._insert_segment(fill) if fill.segment else self._join(fill)
        self._count(prefill_s=time.perf_counter() - began)
        return []

    def _run_chunk(self, fill: Fill) -> None:
        columns = min(max(1, self._limits.chunk_tokens // len(fill.rows)), fill.width - fill.done)
        block = np.zeros((len(fill.rows), columns), np.int32)
        for line, row, tokens in zip(block, fill.rows, fill.tokens, strict=True):
            piece = tokens[fill.done : fill.done + columns]
            line[: len(piece)] = piece
            self._count_prompt(row, len(piece))
        fill.batch.begin(columns)
        self._model(mx.array(block), cache=fill.batch.caches())
        fill.batch.advance()
        fill.batch.evaluate()
        fill.done += columns

    def _insert_segment(self, fill: Fill) -> None:
        (row,), (tokens,) = fill.rows, fill.tokens
        end = row.prefix_tokens + len(tokens)
        at = self.tree.match(row.prompt.tokens[:end])
        if at.length < end:
            start = at.length - row.prefix_tokens
            self.tree.insert(at, tokens[start:], fill.batch.tail(0, start, len(tokens)))
        self._detach(row)

    def _join(self, fill: Fill) -> None:
        fill.batch.trim([len(tokens) for tokens in fill.tokens])
        self._batch.join(fill.batch)
        self._rows += fill.rows
        for index in reversed(range(len(self._rows))):
            if self._rows[index].aborted:
                self._leave(index)
        self._count(batch_rows_max=max(0, len(self._rows) - self._stats.batch_rows_max))

    def _decode(self) -> list[Event]:
        """Give every running row its next token."""
        began = time.perf_counter()
        rows, batch = self._rows, self._batch
        batch.begin(1)
        logits = self._model(mx.array([[row.next_input] for row in rows]), cache=batch.caches())[:, -1]
        batch.advance()
        norm = mx.logsumexp(logits, axis=-1, keepdims=True)
        chosen, finite = sample(logits - norm, [row.sampler for row in rows]), mx.isfinite(norm[:, 0])
        mx.eval(chosen, finite)
        for row in rows:
            if not row.generated:
                self._count_prompt(row, 1)
        events = self._accept(np.array(chosen).tolist(), np.array(finite).tolist())
        self._count(decode_steps=1, decode_s=time.perf_counter() - began)
        self._stats = replace(self._stats, last_token_at=time.time())
        return events

    def _accept(self, tokens: list[int], finite: list[bool]) -> list[Event]:
        events: list[Event] = []
        for index in reversed(range(len(tokens))):  # a row that leaves is replaced by the last, which was seen already
            row = self._rows[index]
            if not finite[index]:
                self._batch.wipe(index)
                self._leave(index)
                events.append(Failed(row.id, InternalError("the model gave logits that are not finite; see the log")))
            elif row.accept(tokens[index], self._loaded.eos_token_ids):
                events.append(self._finish(index))
        return events

    def _finish(self, index: int) -> Event:
        """Keep a complete row's own KV in the tree, as far as memory allows, and let it go."""
        row = self._rows[index]
        finished = row.finished()
        held = row.prefix_tokens + self._batch.lengths[index]
        tokens = row.tokens(held)
        at = self.tree.match(tokens)
        if at.length < held and self._make_room(0, ()):
            own = self._batch.tail(index, at.length - row.prefix_tokens, held - row.prefix_tokens)
            self.tree.insert(at, tokens[at.length :], own)
        self._leave(index)
        usage = finished.usage
        self._count(
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            prefill_tokens=usage.prefill_tokens,
            completion_tokens=usage.completion_tokens,
        )
        return finished

    # Bookkeeping

    def _follow_splits(self) -> None:
        """Let rows read the halves of nodes that were cut since the last step, so that nothing is held twice."""
        if self.tree.num_splits == self._splits_seen:
            return
        self._splits_seen = self.tree.num_splits
        fill = [(self._fill.batch, self._fill.rows)] if self._fill else []
        for batch, rows in [(self._batch, self._rows), *fill]:
            for index, row in enumerate(rows):
                batch.set_path(index, row.path())

    def _leave(self, index: int) -> None:
        """Drop a running row; the last row takes its index, as in the batch."""
        self._detach(self._rows[index])
        self._batch.leave(index)
        self._rows[index] = self._rows[-1]
        self._rows.pop()

    def _attach(self, row: Row, node: Any, prefix_tokens: int) -> None:
        self.tree.lock(node)
        self._detach(row)
        row.node, row.prefix_tokens = node, prefix_tokens

    def _detach(self, row: Row) -> None:
        if row.node is not None:
            self.tree.release(row.node)
        row.node, row.prefix_tokens = None, 0

    def _guarded(self, work: Any, rows: list[Row]) -> list[Event]:
        """Run a part of a step; if it fails, its rows fail and everything they held is given back."""
        failing = list(rows)
        try:
            return work()  # type: ignore[no-any-return]
        except Exception as error:  # the border around one batch: whatever the model throws
            log.exception("a step failed", extra={"rows": len(failing)})
            return self._drop(failing, _translated(error))

    def _drop(self, rows: Iterable[Row], error: RadixqError) -> list[Event]:
        failed = list(rows)
        self._fill = None if self._fill and self._fill.rows == failed else self._fill
        for row in failed:
            if row in self._rows:
                self._leave(self._rows.index(row))
            self._detach(row)
            if row in self._waiting:
                self._waiting.remove(row)
        return [Failed(row.id, error) for row in failed if not row.aborted]

    def _count_prompt(self, row: Row, tokens: int) -> None:
        row.computed_tokens += tokens
        self._count(computed_tokens=tokens)

    def _count(self, **increments: float) -> None:
        self._stats = replace(self._stats, **{name: getattr(self._stats, name) + n for name, n in increments.items()})


def _own_tokens(row: Row) -> int:
    return len(row.cacheable) - row.prefix_tokens


def _wasteful(lengths: Sequence[int]) -> bool:
    """Whether padding tails of these lengths to the longest would more than double the work."""
    return max(lengths) * len(lengths) > 2 * sum(lengths) + 16 * len(lengths)


def _translated(error: Exception) -> RadixqError:
    """Turn what MLX throws into our tree; MLX says that memory ran out in words only."""
    if isinstance(error, RadixqError):
        return error
    words = str(error).lower()
    if isinstance(error, MemoryError) or "malloc" in words or "memory" in words or "resource limit" in words:
        return OutOfMemory(f"the device ran out of memory ({error})")
    return InternalError(f"{type(error).__name__} in the model; the worker's log has the details")
