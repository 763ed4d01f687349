"""Wait for jobs without wearing anyone out: how often to look, when to warn, when to give up. Knows no result."""

from __future__ import annotations

import asyncio
import itertools
import time
import warnings
from collections.abc import Iterable, Sequence
from typing import Final
from weakref import WeakKeyDictionary

from redis import Redis
from rq import Queue, worker_registration
from rq.utils import as_text

from common import keys
from common.errors import BrokerUnavailable
from producer.broker import Broker, is_outage
from producer.state import State, read

PAUSE_MIN_S: Final = 0.02
PAUSE_MAX_S: Final = 0.25
REST: Final = 10
"""Pauses are this many times as long as the read before: waiting costs a tenth of a core at most."""

OUTAGE_S: Final = 60.0
"""A wait survives a server that is away for this long."""

NO_WORKER_AFTER_S: Final = 10.0


class NoWorkerWarning(RuntimeWarning):
    """A job has waited for a while, and no live worker listens to its queue."""


class Wait:
    """The pace of one loop that waits.

    Attributes:
        pause_s: how long to sleep before looking again; a tenth of the time waited so far, within bounds.
    """

    def __init__(self, broker: Broker) -> None:
        self.pause_s = PAUSE_MIN_S
        self._broker = broker
        self._began = self._fresh = self._next_check = time.monotonic()
        self._next_check += NO_WORKER_AFTER_S
        self._away_since: float | None = None

    def hurry(self) -> None:
        """Look often again: a new job is waited for."""
        self._fresh = time.monotonic()
        self.pause_s = PAUSE_MIN_S

    def look(self, job_ids: Sequence[str]) -> list[State]:
        """Return the jobs' states, or nothing while the server is briefly away.

        Raises:
            BrokerUnavailable: it refuses us, never answered, or has been away for `OUTAGE_S`.
        """
        began = time.monotonic()
        try:
            with self._broker.speaking() as client:
                states = read(client, job_ids)
        except BrokerUnavailable as error:
            self._away_since = self._away_since or began
            waited_enough = time.monotonic() - self._away_since > OUTAGE_S
            if waited_enough or not self._broker.answered or not is_outage(error):
                raise
            self.pause_s = PAUSE_MAX_S
            return []
        now = time.monotonic()
        self._away_since = None
        patience_s = min(PAUSE_MAX_S, max(PAUSE_MIN_S, (now - self._fresh) / 10))
        self.pause_s = max(patience_s, REST * (now - began))
        return states

    def nobody(self, queues: Iterable[str | None]) -> list[str]:
        """Return, every 10 s, a sentence for each queue without a live worker; each queue once per process."""
        now = time.monotonic()
        if now < self._next_check:
            return []
        self._next_check = now + NO_WORKER_AFTER_S
        unwarned = sorted({queue for queue in queues if queue} - self._broker.warned)
        try:
            with self._broker.speaking() as client:
                idle = [queue for queue in unwarned if not _has_worker(client, queue)]
                alive = client.zrangebyscore(keys.WORKERS, self._broker.now_s() - keys.WORKER_ALIVE_S, "+inf")
        except BrokerUnavailable:
            return []  # the next look reports the outage
        self._broker.warned.update(idle)
        names = ", ".join(as_text(label) for label in alive if isinstance(label, bytes))
        others = f" (seen in the last {keys.WORKER_ALIVE_S} s: {names})" if names else ""  # elsewhere, or stopped since
        return [
            f"waited {now - self._began:.0f} s, and no live worker listens to queue {queue!r}{others}; start one"
            f"{_of_a_model(queue)} with `rq worker --worker-class worker.BatchWorker -u {self._broker.url} {queue}`"
            for queue in idle
        ]


class Watch:
    """All asyncio waits of one event loop on one server: one read per look, however many tickets wait."""

    _by_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Broker, Watch]] = WeakKeyDictionary()

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._waiting: dict[str, list[asyncio.Future[State]]] = {}
        self._task: asyncio.Task[None] | None = None
        self._wait = Wait(broker)

    @classmethod
    def of(cls, broker: Broker) -> Watch:
        """Return the running loop's watch of this server."""
        watches = cls._by_loop.setdefault(asyncio.get_running_loop(), {})
        return watches.setdefault(broker, cls(broker))

    async def ended(self, job_id: str) -> State:
        """Return the state in which the job ended, or in which nobody knows it."""
        future: asyncio.Future[State] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(job_id, []).append(future)
        if self._task is None or self._task.done():
            self._wait = Wait(self._broker)
            self._task = asyncio.create_task(self._run())
        self._wait.hurry()
        try:
            return await future
        finally:
            self._leave(job_id, future)

    def _leave(self, job_id: str, future: asyncio.Future[State]) -> None:
        futures = self._waiting.get(job_id, [])
        if future in futures:
            futures.remove(future)
        if not futures:
            self._waiting.pop(job_id, None)

    async def _run(self) -> None:
        end: Exception | None = None
        try:
            while self._waiting:
                await self._look()
                await asyncio.sleep(self._wait.pause_s)
        except (BrokerUnavailable, NoWorkerWarning) as error:  # warnings may be errors in the caller's process
            end = error
        finally:
            for future in itertools.chain.from_iterable(self._waiting.values()):
                if not future.done():
                    future.set_exception(end) if end else future.cancel()

    async def _look(self) -> None:
        job_ids = list(self._waiting)
        states = await asyncio.to_thread(self._wait.look, job_ids)
        for job_id, state in zip(job_ids, states, strict=False):  # no states while the server is away
            for future in self._waiting.get(job_id, ()) if state.ended else ():
                if not future.done():
                    future.set_result(state)
        waiting = [state.queue for state in states if state.status == "queued"]
        warn(await asyncio.to_thread(self._wait.nobody, waiting))


def warn(sentences: Iterable[str]) -> None:
    """Warn with each sentence, as from the caller of `Ticket.result`."""
    for sentence in sentences:
        warnings.warn(sentence, NoWorkerWarning, stacklevel=3)


def _of_a_model(queue: str) -> str:
    """Say what a worker needs besides the queue: it runs no job that asks for another model."""
    ours = queue.startswith(f"{keys.DEFAULT_QUEUE}.")
    return " that serves this model (MLX_MODEL_PATH, RADIXQ_MODEL_ALIASES)" if ours else ""


def _has_worker(client: Redis, queue: str) -> bool:
    workers = worker_registration.get_keys(queue=Queue(queue, connection=client))
    return bool(workers) and bool(client.exists(*workers))  # the key of a dead worker expires, its registration stays
