"""Take jobs out of RQ's queues, many at once, and hand them back to the head of their queues.

Everything here is RQ's bookkeeping: it knows no model, no prompt and no result beyond `running` and `queued`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast

from redis.exceptions import WatchError
from rq.executions import Execution, ExecutionRegistry
from rq.job import JobStatus
from rq.queue import Queue
from rq.worker import BaseWorker, WorkerStatus

from common import history, keys
from common.errors import Expired, Unsupported
from common.log import logger
from worker import reject
from worker.flight import Clock, Flight, enqueued_at, iso
from worker.job import DAMAGED, EXPIRED, QueuedJob, answer, ask
from worker.leases import LEASE_S, fence, watch
from worker.ledger import Entry, Ledger, field
from worker.suspects import Suspicion

if TYPE_CHECKING:
    from redis.client import Pipeline

    from common.settings import Settings
    from worker.scout import Candidate

_log = logger("worker.drain")
_ENDED = {status.value for status in (JobStatus.CANCELED, JobStatus.FINISHED, JobStatus.FAILED, JobStatus.STOPPED)}
_OF_AN_ATTEMPT = (
    "text", "finish_reason", "prompt_tokens", "cached_tokens", "prefill_tokens", "completion_tokens", "error_code",
    "error_message", "finished_at", "queued_ms", "prefill_ms", "decode_ms", "total_ms", "json",
)  # fmt: skip

# Claims what still waits near the head, and reports what RQ cannot handle. LPOS first: LREM of an id that is gone would
# scan the whole list.
_CLAIM = (
    reject.WRONG
    + """
local claimed, refused = {}, {}
for i = 3, #ARGV do
  local key, kind = wrong(4 + (i - 3) * #kinds)
  if key then
    refused[#refused + 1] = {ARGV[i], key, kind}
  elseif redis.call('LPOS', KEYS[1], ARGV[i], 'MAXLEN', ARGV[1]) then
    redis.call('LREM', KEYS[1], 1, ARGV[i])
    redis.call('RPUSH', KEYS[2], ARGV[i])
    redis.call('HSET', KEYS[3], ARGV[i] .. ':', ARGV[2])
    claimed[#claimed + 1] = ARGV[i]
  end
end
return {claimed, refused}
"""
)
# Undoes a claim whose answer never came, or whose worker died. A job that somebody runs is in no list.
_UNCLAIM = """
for i = #ARGV, 1, -1 do
  if redis.call('LREM', KEYS[2], 1, ARGV[i]) == 1 then
    redis.call('LPUSH', KEYS[1], ARGV[i])
    redis.call('HDEL', KEYS[3], ARGV[i] .. ':')
  end
end
"""


@dataclass(frozen=True, slots=True)
class _Claimed:
    """A claimed job that may run, as it was read under WATCH."""

    candidate: Candidate
    job: QueuedJob
    suspicion: Suspicion | None


class Drain:
    """What one worker takes out of its queues."""

    def __init__(self, worker: BaseWorker, clock: Clock, label: str, settings: Settings) -> None:
        self._worker = worker
        self._connection = worker.connection
        self._clock = clock
        self._label = label
        self._settings = settings
        self._queues = {queue.name: queue for queue in worker.queues}
        self._claim_script = self._connection.register_script(_CLAIM)
        self._unclaim_script = self._connection.register_script(_UNCLAIM)
        self._unsure: dict[str, list[str]] = {}
        self._unsure_flights: list[Flight] = []
        self.ledger = Ledger(self._connection, worker.name)

    def take(self, candidates: Sequence[Candidate], model: str) -> list[tuple[Candidate, Flight]]:
        """Claim the candidates and start those that nobody else took; one transaction for all of them.

        When a Redis error ends it half way, or somebody moves one of the jobs meanwhile, the next call gives back what
        may have been taken.
        """
        self.settle()
        claimed = self._claim(candidates)
        if claimed:
            try:
                taken = self._start(claimed, model)
            except WatchError:
                return []
        else:
            taken = []
        self._unsure, self._unsure_flights = {}, []
        return taken

    @property
    def unsure(self) -> bool:
        """Whether there is anything to settle."""
        return bool(self._unsure or self._unsure_flights)

    def settle(self) -> None:
        """Give back what a broken connection left in doubt: claimed or started, and never run."""
        if self._unsure_flights:
            self.hand_back(self._unsure_flights)
            self._unsure_flights = []
        for name, ids in self._unsure.items():
            self.unclaim(name, ids, self.ledger)
        self._unsure = {}

    def queue(self, name: str) -> Queue:
        """Return one of this worker's queues, or another one, as a dead worker had it."""
        known = self._queues.get(name)
        return known or Queue(name, self._connection, job_class=QueuedJob, serializer=self._worker.serializer)

    def unclaim(self, queue_name: str, ids: Sequence[str], ledger: Ledger) -> None:
        """Put jobs that were claimed and not started back to the head of their queue."""
        queue = self.queue(queue_name)
        self._unclaim_script(keys=[queue.key, queue.intermediate_queue_key, ledger.key], args=ids)

    def _claim(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Take the candidates that still wait out of their queues; fail those that RQ cannot handle."""
        by_queue: dict[str, list[str]] = {}
        for candidate in candidates:
            if reject.is_id(candidate.job_id):
                by_queue.setdefault(candidate.queue, []).append(candidate.job_id)
            else:
                self._reject(candidate.queue, candidate.job_id, reject.BAD_ID)
        self._unsure = by_queue
        ours: set[str] = set()
        for name, ids in by_queue.items():
            queue = self._queues[name]
            lists = [queue.key, queue.intermediate_queue_key, self.ledger.key]
            named = [key for job_id in ids for key in reject.keys_of(job_id)]
            words: list[Any] = [self._settings.window_jobs, Entry("", "", name).text, *ids]
            claimed, refused = cast(list[Any], self._claim_script(keys=[*lists, *named], args=words))
            ours.update(map(bytes.decode, claimed))
            for job_id, key, kind in refused:
                self._reject(name, job_id.decode(), reject.belongs_not(key, kind))
        return [candidate for candidate in candidates if candidate.job_id in ours]

    def _reject(self, queue_name: str, job_id: str, reason: str) -> None:
        now = iso(self._clock.now())
        reject.reject(self._connection, self._queues[queue_name], job_id, reason, now, self._settings)

    def _start(self, claimed: Sequence[Candidate], model: str) -> list[tuple[Candidate, Flight]]:
        """Start what may run and let go of the rest, unless somebody touches any of these jobs meanwhile."""
        with self._connection.pipeline() as pipe:
            ready = self._look(claimed, pipe)
            pipe.multi()
            for candidate in claimed:
                if candidate.job_id not in ready:
                    self._let_go(candidate, pipe)
            for item in [item for item in ready.values() if item.suspicion and not item.candidate.limit]:
                # It became a suspect after it was offered as a job like any other: let the scout look again.
                self._let_go(item.candidate, pipe)
                self._queues[item.candidate.queue].push_job_id(item.job.id, pipeline=pipe, at_front=True)
                del ready[item.job.id]
            taken, marks = self._begin(ready.values(), model, pipe)
            self._unsure_flights = [flight for _, flight in taken]
            replies = pipe.execute()
        for (_, flight), mark in zip(taken, marks, strict=True):
            self._complete(flight, *replies[mark : mark + 3])
        return taken

    def _look(self, claimed: Sequence[Candidate], pipe: Pipeline) -> dict[str, _Claimed]:
        """Watch and read the claimed jobs and return those that may run, by id."""
        ids = [candidate.job_id for candidate in claimed]
        with self._connection.pipeline(transaction=False) as questions:
            questions.hmget(keys.SUSPECTS, ids)
            questions.hmget(self.ledger.key, [field(job_id) for job_id in ids])
            for job_id in ids:
                ask(questions, job_id)
                questions.zcount(ExecutionRegistry(job_id, self._connection).key, time.time(), "+inf")
            suspicions, entries, *replies = watch(pipe, [self.ledger.key, *map(QueuedJob.key_for, ids)], questions)
        ready: dict[str, _Claimed] = {}
        for candidate, suspicion, entry, reply, executions in zip(
            claimed, suspicions, entries, replies[::2], replies[1::2], strict=True
        ):
            raw = answer(reply)
            why_not = _why_not(raw, executions, ours=entry is not None)
            if why_not:
                _log.warning("not started", extra={"job": candidate.job_id, "reason": why_not})
                continue
            job = self.restore(candidate.job_id, self._queues[candidate.queue], raw)
            ready[job.id] = _Claimed(candidate, job, Suspicion.parse(suspicion))
        return ready

    def _let_go(self, candidate: Candidate, pipe: Pipeline) -> None:
        """Take a job that must not run out of RQ's lists and our hands; its own record stays as it is."""
        pipe.lrem(self._queues[candidate.queue].intermediate_queue_key, 1, candidate.job_id)
        pipe.hdel(self.ledger.key, field(candidate.job_id))

    def restore(self, job_id: str, queue: Queue, raw: Mapping[bytes, bytes]) -> QueuedJob:
        """Make RQ's job of its hash; of a damaged one, a job that can at least be failed."""
        job = QueuedJob(job_id, connection=self._connection, serializer=self._worker.serializer)
        try:
            job.restore(raw)
        except DAMAGED as error:
            _log.warning("job hash is damaged", extra={"job": job_id, "error": type(error).__name__})
            job = QueuedJob(job_id, connection=self._connection, serializer=self._worker.serializer)
            job.packed, job.data = raw.get(b"data", b""), b""
            job.created_at = datetime.now(UTC)
        job.origin = queue.name
        job.redis_server_version = self._worker.get_redis_server_version()  # type: ignore[no-untyped-call]
        return job

    def _begin(
        self, ready: Iterable[_Claimed], model: str, pipe: Pipeline
    ) -> tuple[list[tuple[Candidate, Flight]], list[int]]:
        """Append the start of every job; return them, and where in the transaction each one's begins."""
        taken: list[tuple[Candidate, Flight]] = []
        marks = []
        started_at = self._clock.now()
        running: dict[Any, Any] = {
            "status": "running",
            "started_at": iso(started_at),
            "worker": self._label,
            "model": model,
        }
        for item in ready:
            candidate, job = item.candidate, item.job
            queue, key = self._queues[candidate.queue], keys.result(job.id)
            marks.append(len(pipe))
            pipe.hincrby(key, "attempts", 1)
            pipe.hsetnx(key, "submitted_at", iso(enqueued_at(job)))
            pipe.hmget(key, "submitted_at", *history.FIELDS)
            late = candidate.expires_s <= started_at
            if candidate.refusal is None and not late:
                pipe.hset(key, mapping=running)
            pipe.hdel(key, *_OF_AN_ATTEMPT)
            pipe.persist(key)
            execution = Execution.create(job, LEASE_S, pipeline=pipe, worker_name=self._worker.name)
            job.prepare_for_execution(self._worker.name, pipeline=pipe)
            pipe.persist(job.key)
            pipe.lrem(queue.intermediate_queue_key, 1, job.id)
            flight = Flight(job, queue, execution, started_at=started_at, suspicion=item.suspicion)
            flight.error = Expired(EXPIRED) if late else _unsupported(job)
            taken.append((candidate, flight))
        if taken:
            self.ledger.start([flight for _, flight in taken], pipe)
            self._worker.heartbeat(LEASE_S, pipeline=pipe)
            self._worker.set_state(WorkerStatus.BUSY, pipeline=pipe)
        return taken, marks

    def _complete(self, flight: Flight, attempts: int, _: int, kept: Sequence[bytes | None]) -> None:
        """Fill in what the transaction answered."""
        flight.attempts = attempts
        flight.submitted_at = _parse(kept[0] or b"", flight.started_at)
        flight.history = history.History.read(kept[1:])
        timeout = flight.job.timeout or Queue.DEFAULT_TIMEOUT
        flight.deadline = time.monotonic() + timeout if timeout > 0 else float("inf")
        self._worker.executions[flight.id] = flight.execution

    def hand_back(self, flights: Sequence[Flight]) -> int:
        """Put jobs that did not finish back to the head of their queues, in their order; return how many.

        What was cancelled or given to another worker meanwhile stays where it is. The attempt does not count.
        """
        while flights:
            try:
                with fence(self._worker, flights) as (pipe, held):
                    pipe.multi()
                    for flight in reversed(in_order(held)):
                        pipe.hincrby(keys.result(flight.job.id), "attempts", -1)
                        self.put_back(flight, self.ledger, pipe)
                    for flight in flights:
                        self.ledger.remove(flight, pipe)
                    pipe.execute()
                return len(held)
            except WatchError:
                continue
        return 0

    def put_back(self, flight: Flight, ledger: Ledger, pipe: Pipeline) -> None:
        """Append that a job leaves its worker and waits at the head of its queue."""
        job, key = flight.job, keys.result(flight.job.id)
        self._worker.cleanup_execution(job, pipeline=pipe, execution=flight.execution)
        ledger.remove(flight, pipe)
        job.set_status(JobStatus.QUEUED, pipeline=pipe)
        pipe.hdel(job.key, "started_at", "worker_name")
        flight.queue.push_job_id(job.id, pipeline=pipe, at_front=True)
        pipe.hset(key, "status", "queued")
        pipe.hdel(key, "started_at", "worker", "model")


def in_order(flights: Iterable[Flight]) -> list[Flight]:
    """Return the flights in the order in which their jobs came; equal times stay as they are."""
    return sorted(flights, key=lambda flight: enqueued_at(flight.job))


def _unsupported(job: QueuedJob) -> Unsupported | None:
    asked = job.unsupported
    return Unsupported(f"RQ's {asked} is not supported here; enqueue the job without it") if asked else None


def _why_not(raw: Mapping[bytes, bytes], executions: int, ours: bool) -> str:
    """Say why a claimed job must not be started; nothing if it may."""
    if not ours:
        return "somebody took it back"
    if not raw:
        return "it has no record in RQ"
    status = raw.get(b"status", b"").decode(errors="replace")
    if status == JobStatus.STARTED and executions:
        return "it runs already: its id was queued twice"
    return f"it is {status}" if status in _ENDED else ""


def _parse(written: bytes, default: float) -> float:
    try:
        return datetime.fromisoformat(written.decode()).timestamp()
    except ValueError:
        return default
