"""Take jobs out of RQ's queues, many at once, and hand them back to the head of their queues.

Everything here is RQ's bookkeeping: it knows no model, no prompt and no result beyond `running` and `queued`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast

from rq.executions import Execution
from rq.job import JobStatus
from rq.queue import Queue
from rq.worker import BaseWorker, WorkerStatus

from common import keys
from common.errors import Cancelled, Expired
from common.log import logger
from worker import history
from worker.flight import Clock, Flight, enqueued_at, iso
from worker.job import DAMAGED, EXPIRED, QueuedJob, read

if TYPE_CHECKING:
    from worker.scout import Candidate

LEASE_S = 90
"""A job whose worker has not renewed its lease for this long is taken for abandoned, by any RQ worker."""

_log = logger("worker.drain")
_OF_AN_ATTEMPT = (
    "text", "finish_reason", "prompt_tokens", "cached_tokens", "prefill_tokens", "completion_tokens", "error_code",
    "error_message", "finished_at", "queued_ms", "prefill_ms", "decode_ms", "total_ms", "json",
)  # fmt: skip

# Claims what still waits near the head. LPOS first: LREM of an id that is gone would scan the whole list.
_CLAIM = """
local claimed = {}
for i = 2, #ARGV do
  if redis.call('LPOS', KEYS[1], ARGV[i], 'MAXLEN', ARGV[1]) then
    redis.call('LREM', KEYS[1], 1, ARGV[i])
    redis.call('RPUSH', KEYS[2], ARGV[i])
    claimed[#claimed + 1] = ARGV[i]
  end
end
return claimed
"""
# Undoes a claim whose answer never came. A job that somebody runs is in no list.
_UNCLAIM = """
for i = #ARGV, 1, -1 do
  if redis.call('LREM', KEYS[2], 1, ARGV[i]) == 1 then redis.call('LPUSH', KEYS[1], ARGV[i]) end
end
"""


class Drain:
    """What one worker takes out of its queues."""

    def __init__(self, worker: BaseWorker, clock: Clock, label: str, window_jobs: int) -> None:
        self._worker = worker
        self._connection = worker.connection
        self._clock = clock
        self._label = label
        self._window_jobs = window_jobs
        self._queues = {queue.name: queue for queue in worker.queues}
        self._claim_script = self._connection.register_script(_CLAIM)
        self._unclaim_script = self._connection.register_script(_UNCLAIM)
        self._unsure: dict[str, list[str]] = {}
        self._unsure_flights: list[Flight] = []

    def take(self, candidates: Sequence[Candidate], model: str) -> list[tuple[Candidate, Flight]]:
        """Claim the candidates and start those that nobody else took; one transaction for all of them.

        When a Redis error ends it half way, the next call gives back what may have been taken.
        """
        self.settle()
        claimed = self._claim(candidates)
        jobs = self._fetch(claimed)
        taken = self._start([(c, job) for c, job in zip(claimed, jobs, strict=True) if job is not None], model)
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
            queue = self._queues[name]
            self._unclaim_script(keys=[queue.key, queue.intermediate_queue_key], args=ids)
        self._unsure = {}

    def _claim(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        by_queue: dict[str, list[str]] = {}
        for candidate in candidates:
            by_queue.setdefault(candidate.queue, []).append(candidate.job_id)
        self._unsure = by_queue
        ours: set[str] = set()
        for name, ids in by_queue.items():
            queue = self._queues[name]
            answer = self._claim_script(keys=[queue.key, queue.intermediate_queue_key], args=[self._window_jobs, *ids])
            ours.update(job_id.decode() for job_id in cast(list[bytes], answer))
        return [candidate for candidate in candidates if candidate.job_id in ours]

    def _fetch(self, claimed: Sequence[Candidate]) -> list[QueuedJob | None]:
        """Read the jobs; None for one whose hash is gone, which then leaves RQ's lists for good."""
        found = read(self._connection, [candidate.job_id for candidate in claimed])
        jobs: list[QueuedJob | None] = []
        for candidate, raw in zip(claimed, found, strict=True):
            queue = self._queues[candidate.queue]
            jobs.append(self.restore(candidate.job_id, queue, raw) if raw else None)
            if not raw:
                self._connection.lrem(queue.intermediate_queue_key, 1, candidate.job_id)
        return jobs

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

    def _start(self, ready: Sequence[tuple[Candidate, QueuedJob]], model: str) -> list[tuple[Candidate, Flight]]:
        taken: list[tuple[Candidate, Flight]] = []
        if not ready:
            return taken
        started_at = self._clock.now()
        running: dict[Any, Any] = {
            "status": "running",
            "started_at": iso(started_at),
            "worker": self._label,
            "model": model,
        }
        marks = []
        with self._connection.pipeline() as pipe:
            for candidate, job in ready:
                queue, key = self._queues[candidate.queue], keys.result(job.id)
                marks.append(len(pipe))
                pipe.hget(job.key, "status")
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
                flight = Flight(job, queue, execution, started_at=started_at)
                flight.error = Expired(EXPIRED) if late else None
                taken.append((candidate, flight))
            self._worker.heartbeat(LEASE_S, pipeline=pipe)
            self._worker.set_state(WorkerStatus.BUSY, pipeline=pipe)
            self._unsure_flights = [flight for _, flight in taken]
            replies = pipe.execute()
        for (_, flight), mark in zip(taken, marks, strict=True):
            self._complete(flight, *replies[mark : mark + 4])
        return taken

    def _complete(
        self, flight: Flight, status: bytes | None, attempts: int, _: int, kept: Sequence[bytes | None]
    ) -> None:
        """Fill in what the transaction answered; put back the status of a job that was cancelled meanwhile."""
        job = flight.job
        flight.attempts = attempts
        flight.submitted_at = _parse(kept[0] or b"", flight.started_at)
        flight.history = history.History.read(kept[1:])
        timeout = job.timeout or Queue.DEFAULT_TIMEOUT
        flight.deadline = time.monotonic() + timeout if timeout > 0 else float("inf")
        self._worker.executions[flight.id] = flight.execution
        if status is None or status == b"canceled":
            flight.error = Cancelled("the job was cancelled before it started")
            if status is None:
                self._connection.delete(job.key)
            else:
                self._connection.hset(job.key, "status", status)

    def hand_back(self, flights: Sequence[Flight]) -> int:
        """Put jobs that did not finish back to the head of their queues, in their order; return how many."""
        ours, _ = split(self._worker, flights)  # not what was cancelled or given to another worker meanwhile
        with self._connection.pipeline() as pipe:
            for flight in sorted(ours, key=lambda flight: enqueued_at(flight.job))[::-1]:  # equal times stay in order
                job, key = flight.job, keys.result(flight.job.id)
                self._worker.cleanup_execution(job, pipeline=pipe, execution=flight.execution)
                job.set_status(JobStatus.QUEUED, pipeline=pipe)
                pipe.hdel(job.key, "started_at", "worker_name")
                flight.queue.push_job_id(job.id, pipeline=pipe, at_front=True)
                pipe.hset(key, "status", "queued")
                pipe.hdel(key, "started_at", "worker", "model")
            pipe.execute()
        return len(ours)


def split(worker: BaseWorker, flights: Sequence[Flight]) -> tuple[list[Flight], list[Flight]]:
    """Return the flights whose lease is still ours, and the others."""
    with worker.connection.pipeline(transaction=False) as pipe:
        for flight in flights:
            pipe.zscore(flight.job.started_job_registry.key, flight.execution.composite_key)
        leased = [score is not None for score in pipe.execute()]
    held = [flight for flight, ours in zip(flights, leased, strict=True) if ours]
    return held, [flight for flight, ours in zip(flights, leased, strict=True) if not ours]


def _parse(written: bytes, default: float) -> float:
    try:
        return datetime.fromisoformat(written.decode()).timestamp()
    except ValueError:
        return default
