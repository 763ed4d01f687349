"""Prefill by chunks, decode by steps, rows join and leave: from `Prompt` to `Finished`. Knows no Redis, no text.

One step runs some prefill and one decode step of all running rows. Prefill comes in two kinds, one at a time and in
the order in which jobs were given: a *segment* that several known jobs need becomes a node of the tree; the *tails* of
jobs whose shared part is complete run together and join the batch. So N jobs with one cold prefix find it computed
once, by the first of them.

What fails in a call of the model fails with all its rows. They run again, half as many together; a row that fails
alone has nobody else to blame. A segment that failed never enters the tree and is remembered; who needs it runs alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from common.errors import Cancelled, InternalError, OutOfMemory, RadixqError, Unsupported
from common.log import logger
from worker import hook, platform
from worker.cache import NOTHING, Limits, Need, PrefixCache, Reuse
from worker.crossover import UNMEASURED, Crossover
from worker.forms import exactly
from worker.intake import Fill, Intake
from worker.kv import all_finite
from worker.model import LoadedModel
from worker.row import Answer, Row
from worker.running import Running
from worker.sampling import Sampler, sample
from worker.sequence import EngineStats, Event, Failed, Prompt, Tokens
from worker.vision import Inputs, Sight, VisionModel

FULL = 0.9  # of the rows: from here on there is one chunk of prefill between two decode steps
BURST_CHUNKS, BURST_S = 8, 0.25  # below it, at most so many, or for so long
MLX_LM_CHUNK_TOKENS = 2048  # the default of mlx-lm's generate_step

log = logger("worker.engine")


class Engine:
    """Rows and cache of one model. Not thread-safe: the thread that loaded the model calls everything.

    Attributes:
        cache: the prefixes; they live as long as the engine.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        limits: Limits,
        *,
        exact: bool,
        reuse: Reuse = "shared",
        crossover: Crossover = UNMEASURED,
    ) -> None:
        """Take a model, and what was measured of its attention; `exact` has only forms that are bit-identical."""
        self.cache = PrefixCache(loaded, limits, choose=exactly if exact else crossover, reuse=reuse)
        self._loaded, self._limits = loaded, limits
        self._model: Any = loaded.model
        self._sight: Sight | None = None
        if isinstance(loaded.model, VisionModel) and loaded.processor is not None and reuse == "shared":
            self._sight = Sight(loaded.model, loaded.processor, limits.picture_bytes)
        self._running = Running(self.cache)
        self._intake = Intake(self.cache, limits.max_rows)
        self._fill: Fill | None = None
        self._splits_seen = 0
        if reuse == "shared":
            hook.install(self._model)
        form = ("packed" if exact else crossover.words) if reuse == "shared" else reuse
        self._stats = EngineStats(cache_bytes_limit=limits.kv_bytes, attention_form=form)

    def add(self, job_id: str, prompt: Prompt) -> None:
        """Queue a job; it runs in a later `step`."""
        self._intake.line.append(self._new_row(job_id, prompt))

    def abort(self, job_id: str) -> None:
        """Forget a job, wherever it is; nothing more is said of it. Unknown ids are ignored."""
        for row in self._running.rows:
            if row.id == job_id:
                row.aborted = True
                self._guarded(partial(self._give_up, [row], Cancelled("aborted"), 1), self._running.rows)
                return
        for row in self._filling:
            if row.id == job_id:
                row.aborted = True  # the call goes on, and its rows need what they read
                self._intake.line.remove(job_id)
                return
        self._intake.remove(job_id)

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self._intake.line or self._fill or self._running)

    @property
    def blocked(self) -> bool:
        """Whether the next job does not fit into memory until a running one ends."""
        return self._intake.blocked

    @property
    def running(self) -> list[str]:
        """Ids of the jobs that decode, in the order of the batch."""
        return [row.id for row in self._running.rows]

    def step(self) -> list[Event]:
        """Run some prefill and one decode step; return what ended.

        Prefill is one chunk while the batch is full. While it is not, a decode step costs nearly as much and yields
        less, so there may be more chunks, within bounds that keep running rows from standing still.
        """
        events: list[Event] = []
        until = time.perf_counter() + BURST_S
        for _ in range(BURST_CHUNKS):
            events += self._prefill()
            idle = self._fill is None and (not self._intake.line or self.blocked)
            if idle or len(self._running) >= FULL * self._limits.max_rows or time.perf_counter() > until:
                break
        if self._running.rows:
            events += self._guarded(partial(self._decode, idle), self._running.rows)
        return events

    def stats(self) -> EngineStats:
        """Return counters and gauges as of now."""
        tree, batch = self.cache.tree, self._running.batch
        filling = self._fill.batch.nbytes if self._fill else 0
        return replace(
            self._stats,
            cache_nodes=tree.num_nodes,
            cache_bytes=tree.nbytes + batch.nbytes + filling,
            pinned_bytes=tree.pinned_bytes,
            evicted_nodes=self.cache.evicted.nodes,
            evicted_bytes=self.cache.evicted.nbytes,
            prefix_bytes_saved=batch.copied_tokens * self._loaded.kv_bytes_per_token,
            batch_rows=len(self._running),
            cohorts=batch.num_cohorts,
            vision_runs=self._sight.runs if self._sight else 0,
            vision_bytes=self._sight.nbytes if self._sight else 0,
            active_bytes=mx.get_active_memory(),
            peak_bytes=mx.get_peak_memory(),
        )

    def check(self) -> None:
        """Prove that tree, pins and rows agree.

        Raises:
            RuntimeError: they do not.
        """
        self.cache.tree.check()
        rows = {*self._running.rows, *self._filling, *self._intake.line}
        reading = sum(row.node is not None for row in rows)
        if self.cache.tree.root.pins != reading:
            raise RuntimeError(f"{self.cache.tree.root.pins} pins for {reading} rows")
        if len(self._running.batch) != len(self._running.rows):
            raise RuntimeError(f"{len(self._running.batch)} rows in the batch for {len(self._running.rows)} jobs")

    # Prefill

    def _prefill(self) -> list[Event]:
        """Run the next chunk, if there is one."""
        events: list[Event] = []
        if self._fill is None:
            events += self._guarded(self._take_in, None)
        if self._fill:
            events += self._guarded(self._run_fill, self._fill.rows)
        return events

    def _take_in(self) -> list[Event]:
        """Choose what to prefill next; return the failures of jobs that can never run."""
        self._fill, hopeless = self._intake.next_fill(self._running)
        if self._fill and self._fill.segment:
            (row,) = self._fill.rows
            prefix = row.prompt.tokens[: row.prefix_tokens + self._fill.width]
            self._count(herd_waits=self._intake.line.num_sharing(prefix) - 1)
        return [Failed(row.id, error) for row, error in hopeless]

    def _run_fill(self) -> list[Event]:
        """Run one chunk; when it was the last, put the result where it belongs."""
        fill = self._fill
        assert fill is not None
        began = time.perf_counter()
        self._follow_splits()
        if fill.done < fill.width:
            self._run_chunk(fill)
        if fill.done >= fill.width:
            self._insert_segment(fill) if fill.segment else self._join(fill)
            self._fill = None
        self._count(prefill_s=time.perf_counter() - began)
        return []

    def _run_chunk(self, fill: Fill) -> None:
        chunk = MLX_LM_CHUNK_TOKENS if self.cache.reuse == "none" else self._limits.chunk_tokens
        columns = min(max(1, chunk // len(fill.rows)), fill.width - fill.done)
        block = np.zeros((len(fill.rows), columns), np.int32)
        pieces = [tokens[fill.done : fill.done + columns] for tokens in fill.tokens]
        for line, row, piece in zip(block, fill.rows, pieces, strict=True):
            line[: len(piece)] = piece
            self._count_prompt(row, len(piece))
        fed = self._pictures(fill.batch, fill.rows, block)
        fill.batch.forward(self._model, block, [len(piece) for piece in pieces], **fed)
        fill.batch.evaluate()
        fill.done += columns

    def _insert_segment(self, fill: Fill) -> None:
        (row,) = fill.rows
        end = row.prefix_tokens + fill.width
        node = self.cache.keep(row, fill.batch, 0, end, last_use=True)
        if node is None:
            raise InternalError(f"the KV of tokens {row.prefix_tokens} and on is not finite")
        self.cache.attach(row, node, end)  # its job goes next, and must still find it then
        if row.aborted:
            self.cache.detach(row)

    def _join(self, fill: Fill) -> None:
        fill.batch.trim([len(tokens) for tokens in fill.tokens])
        self._running.join(fill.rows, fill.batch)
        for index in reversed(range(len(self._running))):
            if self._running.rows[index].aborted:
                self._running.batch.wipe(index)
                self._running.leave(index)
        self._count(batch_rows_max=max(0, len(self._running) - self._stats.batch_rows_max))

    # Decode

    def _decode(self, alone: bool) -> list[Event]:
        """Give every running row its next token; `alone`: no others are about to join."""
        began = time.perf_counter()
        self._follow_splits()
        self._running.make_ready(*self._coming())
        rows = self._running.rows
        inputs = np.array([[row.next_input] for row in rows], np.int32)
        logits, norm = self._logits(rows, inputs)
        chosen, finite = sample(logits - norm, [row.sampler for row in rows]), mx.isfinite(norm[:, 0])
        mx.eval(chosen, finite)
        for row in [row for row in rows if not row.generated]:
            self._count_prompt(row, 1)
        self._stats = replace(self._stats, last_token_at=time.time())
        self._count(decode_steps=1, decoded_tokens=len(rows))
        events = self._accept(np.array(chosen).tolist(), np.array(finite).tolist())
        if events or alone:
            self._guarded(partial(self._settle, alone), [])  # what ended in this step has, and rows stay where they are
        self._count(decode_s=time.perf_counter() - began)
        return events

    def _settle(self, alone: bool) -> list[Event]:
        """Let go of the lines that were moved when rows left, and of their room if no others are about to take it."""
        self._running.batch.evaluate()
        if alone:
            self._running.shrink()
        return []

    def _logits(self, rows: Sequence[Row], inputs: Tokens) -> tuple[mx.array, mx.array]:
        """Return the logits of all rows and their log-sum-exp, of which no row has made another's not finite."""
        batch = self._running.batch
        fed = self._pictures(batch, rows, inputs)
        logits = batch.forward(self._model, inputs, [1] * len(inputs), **fed)
        norm = mx.logsumexp(logits, axis=-1, keepdims=True)
        if batch.isolates or all_finite([norm]):
            return logits, norm
        log.warning("a step was not finite and runs again, row by row", extra={"rows": len(inputs)})
        logits = batch.repeat(self._model, inputs, **fed)
        return logits, mx.logsumexp(logits, axis=-1, keepdims=True)

    def _accept(self, tokens: list[int], finite: list[bool]) -> list[Event]:
        events: list[Event] = []
        for index in reversed(range(len(tokens))):  # a row that leaves is replaced by the last, which was seen already
            if index >= len(self._running):
                break  # for want of memory to let one go, all were given up
            accept = partial(self._accept_one, index, tokens[index], finite[index])
            events += self._guarded(accept, [self._running.rows[index]])
        return events

    def _accept_one(self, index: int, token: int, finite: bool) -> list[Event]:
        row = self._running.rows[index]
        if not finite:
            self._running.batch.wipe(index)
            raise InternalError("the model gave logits that are not finite numbers")
        return [self._finish(index)] if row.accept(token, self._loaded.eos_token_ids) else []

    def _finish(self, index: int) -> Event:
        """Keep a complete row's own KV in the tree, as far as memory allows, and let it go."""
        row, batch = self._running.rows[index], self._running.batch
        finished = row.finished()

        def keep() -> list[Event]:
            joining, beside = self._coming()
            beside += self._running.demand(joining, leaving=row)
            self.cache.keep(row, batch, index, row.prefix_tokens + batch.lengths[index], beside=beside)
            self._follow_splits()
            return []

        self._guarded(keep, [])  # an answer that is complete does not fail for want of memory to cache it
        self._intake.forgive(row.prompt.tokens)
        self._running.leave(index)
        usage = finished.usage
        self._count(
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            prefill_tokens=usage.prefill_tokens,
            completion_tokens=usage.completion_tokens,
        )
        return finished

    def _pictures(self, batch: Any, rows: Sequence[Row], block: Tokens) -> Inputs:
        """Return what the model is fed beside the next tokens of rows; nothing where all are text."""
        if not any(row.prompt.pictures for row in rows):
            return {}
        if self._sight is None:
            raise Unsupported(f"{self._loaded.name} takes no pictures here: {self._loaded.blind}")
        for row in rows:
            if row.prompt.pictures and row.view is None:
                row.view = self._sight.view(row.prompt)
        starts = [row.prefix_tokens + length for row, length in zip(rows, batch.lengths, strict=True)]
        return self._sight.inputs([row.view for row in rows], starts, block)

    # When something fails

    def _guarded(self, work: Callable[[], list[Event]], rows: list[Row] | None) -> list[Event]:
        """Run a part of a step; whatever the model throws ends here. The rows in it are those given, or `forming`."""
        failing = None if rows is None else list(rows)
        try:
            return work()
        except Exception as error:
            failing = list(self._intake.forming) if failing is None else failing
            log.exception("a part of a step failed", extra={"rows": len(failing)})
            reason = platform.translated(error).with_traceback(None)
        return self._failed(failing, reason)  # only now: a traceback keeps the arrays of the call

    def _failed(self, failing: list[Row], error: RadixqError) -> list[Event]:
        """Drop a failed call's arrays, give its rows another try, and free memory if that was what it lacked."""
        company = max(1, len(failing) // 2)
        fill = self._fill if self._fill and self._fill.rows == failing else None
        if fill is not None:
            self._fill = None
            if fill.segment:
                (row,) = failing
                prefix = row.prompt.tokens[: row.prefix_tokens + fill.width]
                failing = [row, *(other for other in self._intake.line.sharing(prefix) if other is not row)]
                self._intake.poison(prefix)
                self._count(poisoned_nodes=1)
                log.warning("a shared prefix failed", extra={"tokens": fill.width, "waiting": len(failing)})
            del fill  # its arrays go before others are made
        others = [row for row in self._running.rows if row not in failing]
        give_up = partial(self._give_up, failing, error, company)
        events = self._guarded(give_up, [*failing, *others]) if others else give_up()
        if isinstance(error, OutOfMemory):
            self.cache.evict(self.cache.tree.nbytes // 2)
            mx.clear_cache()
        return events

    def _give_up(self, rows: Sequence[Row], error: RadixqError, company: int) -> list[Event]:
        """Take rows out of wherever they are; they go next, so many together, unless they ran alone already."""
        events: list[Event] = []
        again: list[Row] = []
        if all(row in rows for row in self._running.rows):
            self._running.clear()  # cannot fail: none has to move
        for index in reversed(range(len(self._running))):
            if self._running.rows[index] in rows:
                self._running.leave(index)
        for row in rows:
            self._intake.line.remove(row.id)
            self.cache.detach(row)
            if row.aborted:
                continue
            if row.company == 1:
                events.append(Failed(row.id, error))
            else:
                again.append(self._new_row(row.id, row.prompt, company))
        self._intake.put_back(again)
        return events

    # Bookkeeping

    @property
    def _filling(self) -> Sequence[Row]:
        return self._fill.rows if self._fill else ()

    def _coming(self) -> tuple[Sequence[Row], Need]:
        """Return the rows that will join, and what the segment under way takes."""
        if self._fill and self._fill.segment:
            (row,) = self._fill.rows
            return (), self.cache.segment_need(row, row.prefix_tokens + self._fill.width)
        return self._filling, NOTHING

    def _new_row(self, job_id: str, prompt: Prompt, company: int | None = None) -> Row:
        answer = Answer(self._loaded.tokenizer, prompt.sampling.stop)
        return Row(job_id, prompt, answer, Sampler(prompt.sampling), company=company)

    def _follow_splits(self) -> None:
        """Let rows read the halves of nodes that were cut since the last call, so that nothing is held twice."""
        if self.cache.tree.num_splits == self._splits_seen:
            return
        self._splits_seen = self.cache.tree.num_splits
        fill = [(self._fill.batch, self._fill.rows)] if self._fill else []
        for batch, rows in [(self._running.batch, self._running.rows), *fill]:
            for index, row in enumerate(rows):
                batch.set_path(index, row.path())

    def _count_prompt(self, row: Row, tokens: int) -> None:
        row.computed_tokens += tokens
        self._count(computed_tokens=tokens)

    def _count(self, **increments: float) -> None:
        self._stats = replace(self._stats, **{name: getattr(self._stats, name) + n for name, n in increments.items()})
