"""The one thread that owns MLX: it loads the model, steps the engine and reports. Knows no Redis.

Streams and lazy arrays of MLX belong to a thread, so nothing of MLX is imported or touched outside it.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from typing import TYPE_CHECKING

from common.errors import InternalError, ModelNotLoaded, RadixqError
from common.log import logger
from common.settings import Settings
from worker import platform
from worker.sequence import Died, EngineStats, Event, Failed, Finished, Prompt, Ready

if TYPE_CHECKING:
    from worker.engine import Engine
    from worker.model import LoadedModel

SPARE_PROMPTS = 8
"""Prompts asked for beyond the free rows, so that the next prefill need not wait for Redis."""
STOP_S = 5.0
"""How long the thread may take to end."""
_POOL_BYTES = 1 << 30  # of freed buffers that MLX may keep, at most; without a bound the pool grows for ever
_LEAST_TOKENS = 1024  # a budget that does not hold so many is refused: hardly a job would fit
_PICTURES = 0.1  # of the budget is for what pictures become, where a model takes any; the rest is for KV
_SHARE = 0.8  # of what the device has left beside the weights; the rest is for activations and other programs

log = logger("worker.runner")


class Runner:
    """Runs an `Engine` in its own thread. All methods are for the main thread and return at once, but `stop`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._inbox: queue.SimpleQueue[tuple[str, Prompt | None] | None] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._running: set[str] = set()
        self._stats = EngineStats()
        self._blocked = False
        self._thread = threading.Thread(target=self._main, name="radixq-engine", daemon=True)

    def start(self) -> None:
        """Start the thread; it loads the model and then reports `Ready` or `Died`."""
        self._thread.start()

    def submit(self, job_id: str, prompt: Prompt) -> None:
        """Give a prompt to the engine."""
        self._running.add(job_id)
        self._inbox.put((job_id, prompt))

    def abort(self, job_id: str) -> None:
        """Forget a prompt; an event of it that is already under way may still come out."""
        self._running.discard(job_id)
        self._inbox.put((job_id, None))

    def events(self) -> list[Event]:
        """Return what happened since the last call."""
        self._drain_wakeups()
        events: list[Event] = []
        while not self._outbox.empty():
            event = self._outbox.get()
            if isinstance(event, Finished | Failed):
                self._running.discard(event.id)
            events.append(event)
        return events

    def fileno(self) -> int:
        """A descriptor that is readable while events wait."""
        return self._wake_read

    def stats(self) -> EngineStats:
        """Return the latest counters and gauges."""
        return self._stats

    @property
    def room(self) -> int:
        """How many more prompts it would take now; none while the next one does not fit into memory."""
        if self._blocked:
            return 0
        return max(0, self._settings.max_rows + SPARE_PROMPTS - len(self._running))

    @property
    def free_rows(self) -> int:
        """How many more prompts would start at once, as far as is known."""
        return 0 if self._blocked else max(0, self._settings.max_rows - len(self._running))

    def stop(self) -> bool:
        """End the thread, dropping what runs; return whether it ended in time.

        A step ends soon, loading a model may not: the caller must then leave without ending the interpreter.
        """
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join(STOP_S)
        return not self._thread.is_alive()

    # In the engine's thread

    def _main(self) -> None:
        try:
            engine = self._load()
            while self._take(engine):
                events = engine.step()
                self._stats, self._blocked = engine.stats(), engine.blocked
                self._report(events)
        except RadixqError as error:
            self._report([Died(error)])
        except Exception as error:
            log.exception("the engine ended")
            self._report([Died(InternalError(f"the engine ended with {type(error).__name__}: {error}"))])
        finally:
            self._clear_streams()

    def _clear_streams(self) -> None:
        """Destroy this thread's MLX streams now: torn down while the interpreter ends, they abort the process."""
        if "mlx.core" in sys.modules:
            import mlx.core as mx

            mx.clear_streams()

    def _load(self) -> Engine:
        settings = self._settings
        blas = platform.prepare(fast_blas=settings.fast_blas)
        # only now: what comes with mlx must find the BLAS that was opened first
        import mlx.core as mx

        from worker import crossover, model, probe
        from worker.cache import WAYS, Limits
        from worker.engine import Engine
        from worker.processor import Bounds

        if settings.model_path is None:
            raise ModelNotLoaded("no model: set MLX_MODEL_PATH to a directory, a hub id or a .gguf file")
        device = platform.device()
        loaded = model.load(settings.model_path, dtype=settings.dtype, device=device, pictures=Bounds.of(settings))
        budget = _kv_budget(settings, loaded, device.working_set_bytes, mx.get_active_memory())
        mx.set_cache_limit(min(_POOL_BYTES, budget))
        way = probe.reuse(loaded.model, loaded.context_length)
        pictures = int(_PICTURES * budget) if loaded.processor else 0
        limits = Limits(settings.max_rows, settings.prefill_chunk_tokens, budget - pictures, picture_bytes=pictures)
        measured = crossover.UNMEASURED
        if way == "shared" and not settings.exact:
            measured = crossover.at_load(loaded.model, settings.home, crossover.device_key(device, blas))
        engine = Engine(loaded, limits, exact=settings.exact, reuse=way, crossover=measured)
        self._stats = engine.stats()
        blind = loaded.processor is not None and way != "shared"
        notes = (
            *loaded.notes,
            *((f"{model.NO_PICTURES}{loaded.blind}",) if blind else ()),
            f"prefixes are {WAYS[way]}",
            f"{device.name}, mlx {device.mlx_version}, {loaded.dtype}",
            f"BLAS: {blas.name}",
        )
        self._report([Ready(loaded.name, notes)])
        return engine

    def _take(self, engine: Engine) -> bool:
        """Hand what came in to the engine, waiting while it has nothing to do; return False to end."""
        while not self._inbox.empty() or not engine.busy:
            item = self._inbox.get()
            if item is None:
                return False
            job_id, prompt = item
            engine.abort(job_id) if prompt is None else engine.add(job_id, prompt)
        return True

    def _report(self, events: list[Event]) -> None:
        for event in events:
            self._outbox.put(event)
        if events:
            self._wake()

    def _wake(self) -> None:
        try:
            os.write(self._wake_write, b"!")
        except BlockingIOError:
            return  # the pipe is full of wake-ups already

    def _drain_wakeups(self) -> None:
        try:
            os.read(self._wake_read, 65536)
        except BlockingIOError:
            return


def _kv_budget(settings: Settings, loaded: LoadedModel, usable: int, in_use: int) -> int:
    """Return the bytes that KV may take; refuse a model beside which there is no room for a job."""
    budget = int(settings.kv_bytes or _SHARE * max(0, usable - in_use))
    tokens = min(_LEAST_TOKENS, loaded.context_length)
    least = tokens * loaded.kv_bytes_per_token + loaded.state_bytes
    if budget >= least:
        return budget
    source = "RADIXQ_KV_BYTES is" if settings.kv_bytes else f"its weights take {in_use / 1e9:.2f} of the device's"
    rest = "" if settings.kv_bytes else f"{usable / 1e9:.2f} GB, which leaves "
    fix = "raise it" if settings.kv_bytes else "take a smaller or more strongly quantised model, or a machine with more"
    raise ModelNotLoaded(
        f"no room for the KV of {loaded.name}: {source} {rest}{budget / 1e9:.4f} GB, and {tokens} tokens need "
        f"{least / 1e9:.4f} GB: {fix}"
    )
