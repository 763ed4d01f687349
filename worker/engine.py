"""Prefill by chunks, decode by steps, rows join and leave: from `Prompt` to `Finished`. Knows no Redis, no text.

One step runs a chunk of the current prefill and one decode step of all running rows. Prefill comes in two kinds, one
at a time and in the order in which jobs were given: a *segment* that several known jobs need becomes a node of the
tree; the *tails* of jobs whose shared part is complete run together and join the batch. So N jobs with one cold
prefix find it computed once, by the first of them.

Whatever fails, fails with a whole call of the model. All rows in it run once more, each alone, and what fails then has
nobody else to blame. A segment that failed never enters the tree and is remembered; who needs it runs alone as well.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from common.errors import InternalError, OutOfMemory, RadixqError
from common.log import logger
from worker import attention
from worker.cache import Limits, PrefixCache, Reuse
from worker.model import LoadedModel
from worker.radix import Match, common_prefix
from worker.row import Answer, Row
from worker.sampling import Sampler, sample
from worker.sequence import EngineStats, Event, Failed, Prompt, Tokens

MIN_SHARED_TOKENS = 16
"""A shared piece shorter than this is computed per row: a node of its own would cost more than it saves."""

FULL = 0.9  # of the rows: from here on there is one chunk of prefill between two decode steps
BURST_CHUNKS, BURST_S = 8, 0.25  # below it, at most so many, or for so long
UNEVEN_TOKENS = 256  # a tail this long may be moved into the tree to keep the batch's buffers small

MAX_POISONED = 64
"""Failed prefixes that are remembered, so that later jobs do not wait for them again."""

log = logger("worker.engine")


@dataclass(slots=True)
class Fill:
    """A prefill under way: the same number of columns for every row, shorter rows padded on the right.

    Attributes:
        rows: the jobs. One for a segment, which is charged with it; all that join for tails.
        tokens: what is to run per row.
        segment: whether the result becomes a node of the tree.
    """

    rows: list[Row]
    tokens: list[Tokens]
    batch: Any
    segment: bool
    done: int = 0

    @property
    def width(self) -> int:
        """Columns in all."""
        return max(map(len, self.tokens))


class Engine:
    """Rows, cache and batch of one model. Not thread-safe: the thread that loaded the model calls everything.

    Attributes:
        cache: the prefixes; they live as long as the engine.
        blocked: the next job does not fit into memory until a running one ends.
    """

    def __init__(self, loaded: LoadedModel, limits: Limits, *, exact: bool, reuse: Reuse = "shared") -> None:
        self.cache = PrefixCache(loaded, limits, exact=exact, reuse=reuse)
        self.blocked = False
        self._loaded = loaded
        self._model: Any = loaded.model
        self._limits = limits
        self._waiting: deque[Row] = deque()
        self._retries: deque[Row] = deque()
        self._poisoned: deque[Tokens] = deque(maxlen=MAX_POISONED)
        self._fill: Fill | None = None
        self._rows: list[Row] = []
        self._batch = self.cache.new_batch()
        if reuse == "shared" and attention.install(self._model) < loaded.num_layers:
            raise ValueError(f"{loaded.name} has attention layers that cannot read a shared prefix")
        self._splits_seen = 0
        form = ("packed" if exact else "merged") if reuse == "shared" else reuse
        self._stats = EngineStats(cache_bytes_limit=limits.kv_bytes, attention_form=form)

    def add(self, job_id: str, prompt: Prompt) -> None:
        """Queue a job; it runs in a later `step`."""
        self._waiting.append(self._new_row(job_id, prompt))

    def abort(self, job_id: str) -> None:
        """Forget a job, wherever it is; nothing more is said of it. Unknown ids are ignored."""
        for index, row in enumerate(self._rows):
            if row.id == job_id:
                self._leave(index)
                return
        for row in (*self._waiting, *self._retries, *self._filling):
            if row.id == job_id:
                row.aborted = True

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self._waiting or self._retries or self._fill or self._rows)

    @property
    def running(self) -> list[str]:
        """Ids of the jobs that decode, in the order of the batch."""
        return [row.id for row in self._rows]

    def step(self) -> list[Event]:
        """Run some prefill and one decode step; return what ended.

        Prefill is one chunk while the batch is full. While it is not, a decode step costs nearly as much and yields
        less, so there may be more chunks, within bounds that keep running rows from standing still.
        """
        events: list[Event] = []
        until = time.perf_counter() + BURST_S
        for _ in range(BURST_CHUNKS):
            events += self._prefill()
            if self._fill is None and not self._waiting or len(self._rows) >= FULL * self._limits.max_rows:
                break
            if time.perf_counter() > until or self.blocked:
                break
        if self._rows:
            events += self._guarded(self._decode, self._rows)
        return events

    def _prefill(self) -> list[Event]:
        """Run the next chunk of prefill, if there is one."""
        events: list[Event] = []
        if self._fill is None and not any(row.retry for row in self._rows):
            self._fill = self._next_retry() if self._retries else self._next_fill(events)
        if self._fill:
            events += self._guarded(self._run_fill, self._fill.rows)
        return events

    def stats(self) -> EngineStats:
        """Return counters and gauges as of now."""
        tree, filling = self.cache.tree, self._fill.batch.nbytes if self._fill else 0
        return replace(
            self._stats,
            cache_nodes=tree.num_nodes,
            cache_bytes=tree.nbytes + self._batch.nbytes + filling,
            pinned_bytes=tree.pinned_bytes,
            evicted_nodes=self.cache.evicted.nodes,
            evicted_bytes=self.cache.evicted.nbytes,
            prefix_bytes_saved=self._batch.copied_tokens * self._loaded.kv_bytes_per_token,
            batch_rows=len(self._rows),
            cohorts=self._batch.num_cohorts,
            active_bytes=mx.get_active_memory(),
            peak_bytes=mx.get_peak_memory(),
        )

    def check(self) -> None:
        """Prove that tree, pins and rows agree.

        Raises:
            RuntimeError: they do not.
        """
        self.cache.tree.check()
        reading = sum(row.node is not None for row in (*self._rows, *self._filling))
        if self.cache.tree.root.pins != reading:
            raise RuntimeError(f"{self.cache.tree.root.pins} pins for {reading} rows")
        if len(self._batch) != len(self._rows):
            raise RuntimeError(f"{len(self._batch)} rows in the batch for {len(self._rows)} jobs")

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
            if self._through_poison(row, found.length):
                self._retries.append(self._new_row(row.id, row.prompt, retry=True))
                self._waiting.popleft()
                continue
            end = self._shared_end(row, found.length)
            if rows and (end is not None or _wasteful(rows, row, found.length)):
                break
            need = end - found.length if end is not None else self.cache.worst_tail(row, found.length)
            self.cache.attach(row, found.node, found.length)  # before room is made: what was found must stay
            if not self.cache.make_room(need, (*self._rows, *rows)):
                self.cache.detach(row)
                if not (rows or self._rows):
                    events.append(Failed(self._waiting.popleft().id, self.cache.too_large(row)))
                    continue
                self.blocked = not rows
                break
            if end is not None:
                return self._segment_fill(row, end)
            rows.append(self._waiting.popleft())
        return self._tail_fill(rows) if rows else None

    def _next_retry(self) -> Fill | None:
        """Take one job that failed, once nothing else runs."""
        if self._rows:
            return None
        row = self._retries.popleft()
        if row.aborted:
            return None
        found = self.cache.find(row)
        self.cache.attach(row, found.node, found.length)
        self.cache.make_room(self.cache.worst_tail(row, found.length), ())
        return self._tail_fill([row])

    def _find(self, row: Row) -> Match[Any]:
        """Match a job against the tree, and against running rows: what a row holds for it alone becomes shared."""
        found = self.cache.find(row)
        if self.cache.reuse != "shared":
            return found
        best, shared = -1, found.length + MIN_SHARED_TOKENS - 1
        for index, other in enumerate(self._rows):
            held = other.tokens(other.prefix_tokens + self._batch.lengths[index])
            if (common := common_prefix(held, row.cacheable)) > shared:
                best, shared = index, common
        if best >= 0:
            self._share(best, shared)
        return self.cache.find(row)

    def _share(self, index: int, end: int) -> None:
        """Move a running row's KV up to depth `end` from its tail into the tree."""
        row, batch = self._rows[index], self._batch
        moved = end - row.prefix_tokens
        node = self.cache.keep(row, batch, index, end)
        if node is not None:
            self.cache.attach(row, node, end)
            batch.drop_front(index, moved)
            batch.set_path(index, row.path())

    def _shared_end(self, row: Row, start: int) -> int | None:
        """Return where the next segment from `start` ends that another known job needs too; None if none does."""
        if self.cache.reuse == "none":
            return None
        last = len(row.cacheable)
        others = (common_prefix(row.prompt.tokens, other.prompt.tokens) for other in self._waiting if other is not row)
        ends = [min(end, last) for end in (*row.prompt.branches, *others)]
        return min((end for end in ends if end - start >= MIN_SHARED_TOKENS), default=None)

    def _through_poison(self, row: Row, start: int) -> bool:
        """Whether a prompt goes through a prefix that failed and has not been computed by anybody since."""
        tokens = row.prompt.tokens
        return any(len(bad) > start and common_prefix(bad, tokens) == len(bad) for bad in self._poisoned)

    def _segment_fill(self, row: Row, end: int) -> Fill:
        self._count(herd_waits=sum(1 for _ in self._waiting_for(row, end)) - 1)
        return self._open_fill([row], [row.prompt.tokens[row.prefix_tokens : end]], segment=True)

    def _tail_fill(self, rows: list[Row]) -> Fill:
        return self._open_fill(rows, [row.cacheable[row.prefix_tokens :] for row in rows], segment=False)

    def _open_fill(self, rows: list[Row], tokens: list[Tokens], *, segment: bool) -> Fill:
        batch = self.cache.new_batch(max(map(len, tokens)))
        batch.open([row.path() for row in rows])
        return Fill(rows, tokens, batch, segment)

    def _waiting_for(self, row: Row, end: int) -> Iterator[Row]:
        """Yield the waiting jobs that share a job's prompt up to depth `end`, itself among them."""
        tokens = row.prompt.tokens
        return (other for other in self._waiting if common_prefix(other.prompt.tokens, tokens) >= end)

    # Running the model

    def _run_fill(self) -> list[Event]:
        """Run one chunk; when it was the last, put the result where it belongs."""
        fill = self._fill
        assert fill is not None
        self._follow_splits()
        began = time.perf_counter()
        if fill.done < fill.width:
            self._run_chunk(fill)
        if fill.done >= fill.width:
            self._insert_segment(fill) if fill.segment else self._join(fill)
            self._fill = None
        self._count(prefill_s=time.perf_counter() - began)
        return []

    def _run_chunk(self, fill: Fill) -> None:
        columns = min(max(1, self._limits.chunk_tokens // len(fill.rows)), fill.width - fill.done)
        block = np.zeros((len(fill.rows), columns), np.int32)
        pieces = [tokens[fill.done : fill.done + columns] for tokens in fill.tokens]
        for line, row, piece in zip(block, fill.rows, pieces, strict=True):
            line[: len(piece)] = piece
            self._count_prompt(row, len(piece))
        fill.batch.forward(self._model, block, [len(piece) for piece in pieces])
        fill.batch.evaluate()
        fill.done += columns

    def _insert_segment(self, fill: Fill) -> None:
        (row,) = fill.rows
        if self.cache.keep(row, fill.batch, 0, row.prefix_tokens + fill.width) is None:
            raise InternalError(f"the KV of tokens {row.prefix_tokens} and on is not finite")
        self.cache.detach(row)

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
        self._even_out()
        self._follow_splits()
        rows = self._rows
        inputs = np.array([[row.next_input] for row in rows], np.int32)
        logits = self._batch.forward(self._model, inputs, [1] * len(rows))
        norm = mx.logsumexp(logits, axis=-1, keepdims=True)
        chosen, finite = sample(logits - norm, [row.sampler for row in rows]), mx.isfinite(norm[:, 0])
        mx.eval(chosen, finite)
        for row in rows:
            if not row.generated:
                self._count_prompt(row, 1)
        events = self._accept(np.array(chosen).tolist(), np.array(finite).tolist())
        self._count(decode_steps=1, decoded_tokens=len(finite), decode_s=time.perf_counter() - began)
        self._stats = replace(self._stats, last_token_at=time.time())
        return events

    def _even_out(self) -> None:
        """Move the longest tails into the tree while the buffers, as wide as the longest, exceed what was reserved."""
        while self.cache.reuse == "shared":
            lengths = self._batch.lengths
            widest = max(lengths)
            reserved = sum(self.cache.worst_tail(row, row.prefix_tokens) for row in self._rows)
            if widest < UNEVEN_TOKENS or len(lengths) * widest <= reserved:
                return
            index = lengths.index(widest)
            self._share(index, self._rows[index].prefix_tokens + widest)
            if self._batch.lengths[index] == widest:  # its values are not finite: the next logits will tell
                return

    def _accept(self, tokens: list[int], finite: list[bool]) -> list[Event]:
        events: list[Event] = []
        for index in reversed(range(len(tokens))):  # a row that leaves is replaced by the last, which was seen already
            row = self._rows[index]
            if not finite[index]:
                self._batch.wipe(index)
                events += self._give_up([row], InternalError("the model gave logits that are not finite numbers"))
            elif row.accept(tokens[index], self._loaded.eos_token_ids):
                events.append(self._finish(index))
        return events

    def _finish(self, index: int) -> Event:
        """Keep a complete row's own KV in the tree, as far as memory allows, and let it go."""
        row = self._rows[index]
        finished = row.finished()
        if self.cache.make_room(0, (*self._rows, *self._filling)):
            self.cache.keep(row, self._batch, index, row.prefix_tokens + self._batch.lengths[index])
        self._leave(index)
        usage = finished.usage
        self._count(
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            prefill_tokens=usage.prefill_tokens,
            completion_tokens=usage.completion_tokens,
        )
        return finished

    # When something fails

    def _guarded(self, work: Callable[[], list[Event]], rows: list[Row]) -> list[Event]:
        """Run a part of a step; whatever the model throws ends here."""
        failing = list(rows)
        try:
            return work()
        except Exception as error:
            log.exception("a step failed", extra={"rows": len(failing)})
            return self._failed(failing, _translated(error))

    def _failed(self, failing: list[Row], error: RadixqError) -> list[Event]:
        """Drop a failed call's arrays, give its rows another try, and free memory if that was what it lacked."""
        fill = self._fill if self._fill and self._fill.rows == failing else None
        if fill is not None:
            self._fill = None
            if fill.segment:
                (row,) = failing
                end = row.prefix_tokens + fill.width
                failing = list(self._waiting_for(row, end))
                self._poisoned.append(row.prompt.tokens[:end])
                self._count(poisoned_nodes=1)
                log.warning("a shared prefix failed", extra={"tokens": fill.width, "waiting": len(failing)})
        if isinstance(error, OutOfMemory):
            self.cache.evict(self.cache.tree.nbytes // 2)
            mx.clear_cache()
        return self._give_up(failing, error)

    def _give_up(self, rows: Iterable[Row], error: RadixqError) -> list[Event]:
        """Take rows out of wherever they are; they run again, alone, unless they did so already."""
        events: list[Event] = []
        for row in rows:
            if row in self._rows:
                self._leave(self._rows.index(row))
            if row in self._waiting:
                self._waiting.remove(row)
            self.cache.detach(row)
            if row.retry:
                events.append(Failed(row.id, error))
            elif not row.aborted:
                self._retries.append(self._new_row(row.id, row.prompt, retry=True))
        return events

    # Bookkeeping

    @property
    def _filling(self) -> Sequence[Row]:
        return self._fill.rows if self._fill else ()

    def _new_row(self, job_id: str, prompt: Prompt, *, retry: bool = False) -> Row:
        answer = Answer(self._loaded.tokenizer, prompt.sampling.stop)
        return Row(job_id, prompt, answer, Sampler(prompt.sampling), retry=retry)

    def _follow_splits(self) -> None:
        """Let rows read the halves of nodes that were cut since the last step, so that nothing is held twice."""
        if self.cache.tree.num_splits == self._splits_seen:
            return
        self._splits_seen = self.cache.tree.num_splits
        fill = [(self._fill.batch, self._fill.rows)] if self._fill else []
        for batch, rows in [(self._batch, self._rows), *fill]:
            for index, row in enumerate(rows):
                batch.set_path(index, row.path())

    def _leave(self, index: int) -> None:
        """Drop a running row; the last row takes its index, as in the batch."""
        self.cache.detach(self._rows[index])
        self._batch.leave(index)
        self._rows[index] = self._rows[-1]
        self._rows.pop()

    def _count_prompt(self, row: Row, tokens: int) -> None:
        row.computed_tokens += tokens
        self._count(computed_tokens=tokens)

    def _count(self, **increments: float) -> None:
        self._stats = replace(self._stats, **{name: getattr(self._stats, name) + n for name, n in increments.items()})


def _wasteful(rows: Sequence[Row], row: Row, prefix_tokens: int) -> bool:
    """Whether padding these rows' tails to the longest would more than double the work."""
    lengths = [len(other.cacheable) - other.prefix_tokens for other in rows] + [len(row.cacheable) - prefix_tokens]
    return max(lengths) * len(lengths) > 2 * sum(lengths) + 16 * len(lengths)


def _translated(error: Exception) -> RadixqError:
    """Turn what MLX throws into our tree; MLX says that memory ran out in words only."""
    if isinstance(error, RadixqError):
        return error
    words = str(error).lower()
    if isinstance(error, MemoryError) or "malloc" in words or "memory" in words or "resource limit" in words:
        return OutOfMemory(f"the device ran out of memory ({error})")
    return InternalError(f"{type(error).__name__} in the model; the worker's log has the details")
