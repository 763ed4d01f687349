"""The worker's step: engine and scout on one side, Redis on the other, many jobs at once in between.

Runs in the main thread and never waits longer than `TICK_S`. Knows when what is due, not how it is done: that is in
`drain`, `leases`, `takeover`, `deliver` and `metrics`.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from multiprocessing.connection import wait
from queue import SimpleQueue
from typing import TYPE_CHECKING

import redis.exceptions
from rq.suspension import is_suspended
from rq.worker import WorkerStatus

from common.errors import Cancelled, JobTimeout, RadixqError
from common.log import logger
from worker import leases, schedule
from worker.deliver import Outbox, refused
from worker.drain import Drain
from worker.flight import Clock, Flight, iso
from worker.ledger import Ledger
from worker.metrics import Jobs, Metrics
from worker.orphans import Orphans
from worker.outage import Absence, explain
from worker.sequence import Died, Event, Finished, Ready
from worker.shelf import Shelf
from worker.suspects import RECORD_TOKENS, may_join
from worker.sweep import Sweep
from worker.takeover import Takeover

if TYPE_CHECKING:
    from common.settings import Settings
    from worker.app import BatchWorker
    from worker.runner import Runner
    from worker.scout import Candidate, Scout

TICK_S = 0.05
POLL_S = 0.5  # cancelled jobs, `rq suspend`
BEAT_S = 10.0  # well inside the lease
BATCH = 16  # jobs started, and results written, between two looks at the engine

_log = logger("worker.pump")


class Pump:
    """Everything between RQ's loop and the engine, for one worker process.

    Attributes:
        away: Redis is, as far as we know.
        clock: the server's time, as of the last renewal.
        flights: what runs, by execution, until its result is delivered.
        error: why it ended, unless it was asked to.
    """

    def __init__(self, worker: BatchWorker, settings: Settings, label: str, runner: Runner, scout: Scout) -> None:
        self._worker, self._settings, self._runner, self._scout = worker, settings, runner, scout
        self.clock = Clock()
        self._drain = Drain(worker, self.clock, label, settings)
        self._outbox = Outbox(worker, settings, self.clock, label)
        self._takeover = Takeover(worker, self._drain, self._outbox, settings.home, self.clock)
        self._sweep = Sweep(worker.connection, settings, self.clock)
        self._metrics = Metrics(worker.connection, label, self.clock)
        self._orphans = Orphans(worker.connection, worker.queues, settings)
        self._poll, self._second, self._beat = _Every(POLL_S), _Every(1.0), _Every(BEAT_S)
        self._offers: list[Candidate] = []
        self._shelf = Shelf(settings.max_image_pixels)
        self._stops: SimpleQueue[str] = SimpleQueue()
        self._ready = self._suspended = self._stopping = self._hurry = self._crashed = False
        self._alone, self._decoded_before = "", 0
        self._stopping_since = 0.0
        self.away = Absence()
        self._active_at = time.monotonic()
        self.flights: dict[str, Flight] = {}
        self._suspects: list[tuple[Flight, bool]] = []  # of which the scout died; by itself?
        self.started = 0
        self.error: RadixqError | None = None

    def run(self, *, burst: bool, max_jobs: int | None, max_idle_s: int | None) -> None:
        """Step until there is a reason to end; what still runs then is for `close` to hand back."""
        while not self._over(burst, max_jobs, max_idle_s):
            wait([self._scout.fileno(), self._runner.fileno()], 0 if self._backlog(max_jobs) else TICK_S)
            self._collect()
            self._with_redis(lambda: self._exchange(max_jobs))

    def stop(self, *, now: bool = False) -> None:
        """Start nothing more and finish what runs, for as long as the settings allow; `now`: not even that.

        Only sets flags: it is called by signal handlers.
        """
        if not self._stopping:
            self._stopping, self._stopping_since = True, time.monotonic()
        self._hurry = self._hurry or now

    def stop_job(self, name: str) -> None:
        """End an execution, or every execution of a job, as somebody asked RQ to; for any thread.

        Redis says that a job runs a moment before we know it ourselves: it is looked up when that moment is over.
        """
        self._stops.put(name)

    def recover(self) -> None:
        """Take over from dead workers."""
        self._takeover.look()

    def sweep(self) -> None:
        """Close the records of jobs that ended behind our back."""
        self._sweep.step()

    def renew(self) -> None:
        """Renew all leases; what was taken away is given up (its delivery finds out who has it)."""
        self.clock.sync(self._worker.connection)
        for flight in leases.renew(self._worker, self._drain.ledger, list(self.flights.values())):
            self._end(flight, Cancelled("the job was taken from this worker"))

    def close(self) -> None:
        """Deliver what is ready, hand back the rest; as far as Redis is there.

        Every step is taken, whatever the ones before it raise.
        """
        with ExitStack() as steps:  # last in, first out
            steps.callback(self._outbox.close)
            for step in (lambda: self._publish("stopped"), self._hand_back, self._deliver_all, self._drain.settle):
                steps.callback(self._last, step)

    @property
    def ledger(self) -> Ledger:
        """What this worker has in its hands, as it is written in Redis."""
        return self._drain.ledger

    @property
    def outbox(self) -> Outbox:
        """Where results wait to be written."""
        return self._outbox

    @property
    def state(self) -> WorkerStatus:
        """What `rq info` is to show."""
        if self.flights:
            return WorkerStatus.BUSY
        if not self._ready:
            return WorkerStatus.STARTED
        return WorkerStatus.SUSPENDED if self._suspended else WorkerStatus.IDLE

    def _collect(self) -> None:
        """Take in what happened; Redis is not needed for it."""
        try:
            known = {one.job_id for one in self._offers}  # a scout that was started again offers them once more
            self._offers += [one for one in self._scout.poll() if one.job_id not in known]
        except RadixqError as error:
            self.error = error
        for event in self._runner.events():
            self._handle(event)
        while not self._stops.empty():
            name = self._stops.get()
            for flight in self.flights.values():
                if name in (flight.id, flight.job.id) and flight.result is None:
                    flight.stopped = True
                    self._end(flight, Cancelled("the job was stopped while it ran"))
        now = time.monotonic()
        for flight in self.flights.values():
            if flight.result is None and now > flight.deadline:
                self._end(flight, JobTimeout(f"the job ran longer than its timeout of {flight.job.timeout} s"))

    def _exchange(self, max_jobs: int | None) -> None:
        """Do everything with Redis that is due."""
        if self._beat.due():
            self.renew()
            self.recover()
        self._deliver()
        self._suspect()
        self._record()
        if self._poll.due():
            self._look()
        if self._worker.should_run_maintenance_tasks:
            self._worker.run_maintenance_tasks()
        self._drain.settle()
        self._admit(max_jobs)
        if self._second.due():
            self._publish("stopping" if self._stopping else self.state.value)
            self._tend()
        if self._worker.get_state() != self.state:
            self._worker.set_state(self.state)

    def _tend(self) -> None:
        """Look after jobs that are in no queue yet, and after callbacks."""
        now_s = self.clock.now()
        schedule.enqueue_due(self._worker.connection, self._worker.queues, now_s)
        self._orphans.cancel(iso(now_s))
        self._outbox.callbacks.tick()

    def _over(self, burst: bool, max_jobs: int | None, max_idle_s: int | None) -> bool:
        if self.error is not None:
            return True
        if self._stopping:
            late = time.monotonic() - self._stopping_since > self._settings.drain_s
            return not self.flights or self._hurry or late
        if self.flights or self.away or self._drain.unsure:
            return False
        if max_jobs is not None and self.started >= max_jobs:
            return True
        long = max_idle_s is not None and self._ready and time.monotonic() - self._active_at > max_idle_s
        if not (burst or long):
            return False
        return self._suspended or (self._ready and not self._offers and self._scout.idle())

    def _handle(self, event: Event) -> None:
        if isinstance(event, Ready):
            self._ready, self._outbox.model = True, event.model
            self._active_at = time.monotonic()
            _log.info("ready", extra={"model": event.model, "notes": "; ".join(event.notes)})
        elif isinstance(event, Died):
            self.error, self._crashed = event.error, self._ready
        elif event.id in self.flights:
            self._outbox.put(self.flights[event.id], event if isinstance(event, Finished) else event.error)

    def _end(self, flight: Flight, error: RadixqError) -> None:
        self._runner.abort(flight.id)
        self._outbox.put(flight, error)

    def _admit(self, max_jobs: int | None) -> None:
        self._scout.want(self._room(max_jobs))
        if not self._open:
            left = [one for one in self._offers if self._stopping or not self._is_over(one)]
            self._scout.settled([one.job_id for one in left])
            self._offers = [one for one in self._offers if one not in left]
        batch = self._due(max_jobs)[:BATCH]
        self._offers = [one for one in self._offers if one not in batch]
        if not batch:
            return
        try:
            stored = self._fetch(batch)
            for candidate, flight in self._drain.take(batch, self._outbox.model):
                self._launch(candidate, flight, stored)
        finally:
            self._scout.settled([candidate.job_id for candidate in batch])

    def _fetch(self, batch: Sequence[Candidate]) -> Mapping[str, memoryview]:
        """Return the pictures of jobs that are about to start; one that is gone fails its job when it is needed."""
        prompts = [candidate.prompt for candidate in batch if candidate.prompt]
        wanted = [picture for prompt in prompts for picture in prompt.pictures]
        return self._shelf.fetch(self._worker.connection, wanted)

    def _due(self, max_jobs: int | None) -> list[Candidate]:
        """Choose from the offers what is to leave its queue now.

        What will not run needs no room. What expires must have a row: in the engine it might wait, and run too late.
        What brings pictures waits until there is room for them, and so do those with pictures behind it: else smaller
        ones might take its room for ever. Suspects go first, and never more at once than their limits allow.
        """
        due = [one for one in self._offers if self._is_over(one)]
        wanted = sorted((one for one in self._offers if one not in due), key=lambda one: -one.limit)
        room, rows = self._room(max_jobs), self._runner.free_rows
        running = [flight.limit for flight in self.flights.values()]
        chosen: list[Candidate] = []
        waits = False
        for one in wanted:
            if not may_join(one.limit, running):
                break
            waits = waits or not self._shelf.make_room([other.prompt for other in (*chosen, one)])
            shows = one.prompt is not None and bool(one.prompt.pictures)
            if not (waits and shows) and len(chosen) < (room if one.expires_s == math.inf else min(room, rows)):
                chosen.append(one)
                running.append(one.limit)
        return due + chosen

    def _is_over(self, candidate: Candidate) -> bool:
        """Whether it is only to be told so: it was refused, or its time has come."""
        return candidate.prompt is None or candidate.expires_s <= self.clock.now()

    @property
    def _open(self) -> bool:
        return self._ready and not self._suspended and not self._stopping

    def _room(self, max_jobs: int | None) -> int:
        """How many more jobs may be started now."""
        left = self._runner.room if max_jobs is None else min(self._runner.room, max_jobs - self.started)
        return max(0, left) if self._open else 0

    def _backlog(self, max_jobs: int | None) -> bool:
        """Whether there is more to do with Redis at once."""
        return not self.away and (self._outbox.waits or bool(self._offers and self._due(max_jobs)))

    def _launch(self, candidate: Candidate, flight: Flight, stored: Mapping[str, memoryview]) -> None:
        self.flights[flight.id] = flight
        self._active_at = time.monotonic()
        if flight.error is not None:
            self._outbox.put(flight, flight.error)
            return
        if candidate.crash is not None:
            self._suspects.append((flight, candidate.crash != -signal.SIGKILL))
            return
        self.started += 1
        if candidate.prompt is None:
            self._outbox.put(flight, refused(candidate.refusal))
        else:
            self._runner.submit(flight.id, candidate.prompt.showing(stored))

    def _deliver(self) -> None:
        for flight in self._outbox.flush(BATCH):
            self.flights.pop(flight.id, None)
            self._active_at = time.monotonic()

    def _suspect(self) -> None:
        """Hold it against jobs that the scout died of them; they run nowhere."""
        while self._suspects:
            flight, spoke = self._suspects[0]
            self._takeover.suspect([flight], spoke=spoke)
            self._suspects.pop(0)
            self.flights.pop(flight.id, None)

    def _record(self) -> None:
        """Write down how far a job came that runs alone: should it end this process, it is known where."""
        if len(self.flights) != 1:
            self._alone = ""
            return
        (flight,) = self.flights.values()
        decoded = self._runner.stats().decoded_tokens
        if self._alone != flight.id:
            self._alone, self._decoded_before = flight.id, decoded
        tokens = decoded - self._decoded_before
        if tokens >= flight.tokens + RECORD_TOKENS or (tokens and not flight.tokens):
            flight.tokens = tokens
            self._drain.ledger.record(flight)

    def _deliver_all(self) -> None:
        while self._outbox.waits:
            self._deliver()

    def _hand_back(self) -> None:
        flights = list(self.flights.values())
        for flight in flights:
            self._runner.abort(flight.id)
            flight.result = None
        handed_back = (self._takeover.suspect if self._crashed else self._drain.hand_back)(flights)
        self.flights.clear()
        _log.info("stopped", extra={"handed_back": handed_back, "started": self.started})

    def _last(self, step: Callable[[], None]) -> None:
        try:
            step()
        except redis.exceptions.RedisError as error:
            reason = explain(error) or type(error).__name__
            _log.error("redis failed while stopping", extra={"reason": reason, "running": len(self.flights)})

    def _look(self) -> None:
        self._suspended = bool(is_suspended(self._worker.connection))
        running = [flight for flight in self.flights.values() if flight.result is None]
        for flight in leases.cancelled(self._worker, running) if running else ():
            self._end(flight, Cancelled("the job was cancelled while it ran"))

    def _publish(self, state: str) -> None:
        running = sum(flight.result is None for flight in self.flights.values())
        jobs = Jobs(self._outbox.jobs_finished, self._outbox.jobs_failed, running)
        self._metrics.publish(state, self._outbox.model, jobs, self._runner.stats(), self._worker.queue_keys())

    def _with_redis(self, exchange: Callable[[], None]) -> None:
        """Do it unless Redis is away; then try again after a while. The engine goes on meanwhile."""
        if self.away.pausing:
            return
        try:
            exchange()
        except redis.exceptions.RedisError as error:
            reason = explain(error)
            if reason is None:
                raise
            if self.away.prolong(error):
                _log.error("redis is away, going on without", extra={"reason": reason, "running": len(self.flights)})
            self._scout.want(0)
            self._beat.hasten()  # it is back when it takes a write
        else:
            if self.away:
                _log.warning("redis is back", extra={"undelivered": len(self.flights)})
                self.away.end()


class _Every:
    """True once per interval."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._next = 0.0

    def due(self) -> bool:
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self._seconds
        return True

    def hasten(self) -> None:
        self._next = 0.0
