"""Write what became of each job: our readable hash and RQ's own bookkeeping in one transaction, once each.

An outbox: a result waits here while Redis is away. Knows nothing of queues, prompts or the engine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import redis.exceptions
from rq.job import Job, JobStatus
from rq.utils import now
from rq.worker import BaseWorker

from common import keys, pictures
from common.errors import Cancelled, Expired, InternalError, InvalidRequest, RadixqError, WorkerCrashed
from common.log import logger
from common.messages import Failure, Result, Status, Timing
from worker.callbacks import Callbacks
from worker.flight import Clock, Flight, enqueued_at, iso
from worker.history import FIELDS as KEPT
from worker.history import History, labels
from worker.job import QueuedJob
from worker.sequence import Finished

if TYPE_CHECKING:
    from redis.client import Pipeline

    from common.settings import Settings

_log = logger("worker.deliver")
_REFUSING: tuple[type[RadixqError], ...] = (InvalidRequest, *InvalidRequest.__subclasses__(), Expired, InternalError)
_REFUSALS = {error.code: error for error in _REFUSING}


class Outbox:
    """Results on their way to Redis.

    A job counts as running, and its lease is renewed, until its result is delivered.
    """

    def __init__(self, worker: BaseWorker, settings: Settings, clock: Clock, label: str) -> None:
        self._worker = worker
        self._settings = settings
        self._clock = clock
        self._label = label
        self._waiting: deque[Flight] = deque()
        self.callbacks = Callbacks()
        self._abandoned: list[tuple[QueuedJob, WorkerCrashed]] = []
        self.model = ""
        self.jobs_finished = 0
        self.jobs_failed = 0

    def put(self, flight: Flight, outcome: Finished | RadixqError) -> None:
        """Decide a job; what comes later for the same flight is ignored."""
        if flight.result is None:
            flight.error = outcome if isinstance(outcome, RadixqError) else None
            flight.result = self._result(flight, outcome)
            self._waiting.append(flight)

    def flush(self) -> Iterator[Flight]:
        """Deliver one result after the other and yield each flight that is done with.

        Raises:
            redis.exceptions.RedisError: nothing was lost; go on later.
        """
        while self._waiting:
            flight = self._waiting[0]
            self._deliver(flight)
            self._waiting.popleft()
            yield flight

    def write(self, flight: Flight, pipe: Pipeline) -> None:
        """Append our hash to RQ's transaction. A job that RQ will run again has no time to live."""
        if flight.result is not None:
            self._write(flight.job.id, flight.result, flight.digests, pipe)

    @property
    def waits(self) -> bool:
        """Whether anything is to be delivered."""
        return bool(self._waiting)

    def abandon(self, job: QueuedJob) -> None:
        """Say in our hash what RQ is about to do with a job whose worker is gone: run it again, or fail it."""
        key, now = keys.result(job.id), self._clock.now()
        body = job.body(self._settings.max_job_bytes)
        job.failure_ttl = self._settings.prompt_ttl_s
        ends = not job.should_retry
        attempts, worker, *kept = cast(
            list[bytes | None], self._worker.connection.hmget(key, "attempts", "worker", *KEPT)
        )
        error = WorkerCrashed("the worker that ran the job gave no more sign of life")
        history, attempt = History.read(kept), int(attempts or 1)
        if not ends:
            history = history.with_error(attempt, error, (worker or b"").decode(errors="replace"), iso(now))
        result = Result(
            id=job.id,
            status="failed" if ends else "queued",
            attempts=attempt,
            error=Failure(code=error.code, message=str(error)),
            **history.fields(),
            timing=Timing(submitted_at=iso(enqueued_at(job)), finished_at=iso(now) if ends else None),
            **labels(body),
        )
        with self._worker.connection.pipeline() as pipe:
            self._write(job.id, result, pictures.named(body), pipe)
            pipe.execute()
        if ends:
            self._abandoned.append((job, error))

    def maintained(self) -> None:
        """Call back for jobs that were abandoned for good; RQ has committed it by now."""
        while self._abandoned:
            job, error = self._abandoned.pop()
            self.callbacks.call(job, "failure", type(error), error, None)

    def close(self) -> None:
        """Give the callbacks a moment to end."""
        self.callbacks.close()

    def _write(self, job_id: str, result: Result, digests: tuple[str, ...], pipe: Pipeline) -> None:
        key = keys.result(job_id)
        pipe.delete(key)
        pipe.hset(key, mapping=cast(dict[Any, Any], result.to_hash()))
        if result.status != "queued":
            pipe.expire(key, self._settings.result_ttl_s)
            pictures.release(pipe, job_id, digests, self._settings.prompt_ttl_s)
            if result.idempotency_key:
                pipe.expire(keys.idempotency(result.idempotency_key), self._settings.result_ttl_s)

    def _deliver(self, flight: Flight) -> None:
        status, leased = self._books(flight)
        if status is None or status == JobStatus.CANCELED.value:
            self._cancel(flight, status)
        elif not leased:
            self._drop(flight, status)
        elif flight.error is None:
            self._succeed(flight)
        else:
            self._fail(flight, flight.error)

    def _books(self, flight: Flight) -> tuple[str | None, bool]:
        """Return RQ's status of the job, and whether this execution still holds its lease."""
        with self._worker.connection.pipeline(transaction=False) as pipe:
            pipe.hget(flight.job.key, "status")
            pipe.zscore(flight.job.started_job_registry.key, flight.execution.composite_key)
            status, lease = pipe.execute()
        return (status.decode() if status else None), lease is not None

    def _succeed(self, flight: Flight) -> None:
        job = self._ended(flight.job)
        assert flight.result is not None
        job._result = flight.result.model_dump(mode="json", exclude_none=True)  # RQ has no public way in
        job._status = JobStatus.FINISHED
        self._worker.handle_job_success(job, flight.queue, flight.queue.started_job_registry, flight.execution)
        self.jobs_finished += 1
        self.callbacks.call(flight.job, "success", job._result)

    def _fail(self, flight: Flight, error: RadixqError) -> None:
        job, worker = self._ended(flight.job), self._worker
        before = (job.retries_left, job._status)
        if not error.retry:
            job.retries_left = 0
        worker._stopped_job_id = job.id if flight.stopped else None
        worker.handle_job_failure(job, flight.queue, exc_string=f"{error.code}: {error}", execution=flight.execution)
        if self._books(flight)[1]:  # RQ logs a failed transaction and goes on; the lease shows it
            job.retries_left, job._status = before
            raise redis.exceptions.ConnectionError(f"the failure of job {job.id} was not written")
        self.jobs_failed += flight.result is not None and flight.result.status == "failed"
        _log.warning("failed", extra={"job": job.id, "code": error.code, "retry": job.retries_left or 0})
        if flight.stopped:
            self.callbacks.call(flight.job, "stopped")
        elif flight.result is not None and flight.result.status != "queued":
            self.callbacks.call(flight.job, "failure", type(error), error, None)

    def _cancel(self, flight: Flight, status: str | None) -> None:
        """End a job that was cancelled or deleted while it ran; RQ has taken it out of its registries already."""
        if flight.result is None or flight.result.status != "cancelled":
            flight.result = self._result(flight, Cancelled("the job was cancelled while it ran"))
        job = flight.job
        with self._worker.connection.pipeline() as pipe:
            self._worker.cleanup_execution(job, pipeline=pipe, execution=flight.execution)
            if status is None:
                pipe.delete(job.key)
            else:
                pipe.expire(job.key, self._settings.prompt_ttl_s)
            pipe.execute()

    def _drop(self, flight: Flight, status: str) -> None:
        """Forget a result whose job is somebody else's by now, or which is already written."""
        _log.warning("lease lost: dropping result", extra={"job": flight.job.id, "rq_status": status})
        flight.result = None
        with self._worker.connection.pipeline() as pipe:
            self._worker.cleanup_execution(flight.job, pipeline=pipe, execution=flight.execution)
            pipe.execute()

    def _ended(self, job: Job) -> Job:
        """Stamp the end; RQ's hash holds the prompt, so it stays for a shorter time than our result."""
        job.ended_at = now()
        job.result_ttl = job.failure_ttl = self._settings.prompt_ttl_s
        return job

    def _result(self, flight: Flight, outcome: Finished | RadixqError) -> Result:
        body, started = flight.job.body(self._settings.max_job_bytes), not isinstance(outcome, Expired)
        flight.digests = pictures.named(body)
        common: dict[str, Any] = {
            "id": flight.job.id, "model": self.model or None, "worker": self._label,
            "attempts": flight.attempts if started else flight.attempts - 1,
            "timing": self._timing(flight, outcome), **labels(body), **flight.history.fields(),
        }  # fmt: skip
        if isinstance(outcome, Finished):
            return Result(
                status="finished", text=outcome.text, finish_reason=outcome.finish_reason, usage=outcome.usage, **common
            )
        error, status = Failure(code=outcome.code, message=str(outcome)), _status(flight, outcome)
        if status == "queued":
            at = iso(self._clock.now())
            common |= flight.history.with_error(flight.attempts, outcome, self._label, at).fields()
        return Result(status=status, error=error, **common)

    def _timing(self, flight: Flight, outcome: Finished | RadixqError) -> Timing:
        finished_at = self._clock.now()
        finished = outcome if isinstance(outcome, Finished) else None
        started_at = finished_at if isinstance(outcome, Expired) else flight.started_at
        return Timing(
            submitted_at=iso(flight.submitted_at),
            started_at=None if isinstance(outcome, Expired) else iso(started_at),
            finished_at=iso(finished_at),
            queued_ms=_milliseconds(started_at - flight.submitted_at),
            prefill_ms=round(finished.prefill_ms, 3) if finished else None,
            decode_ms=round(finished.decode_ms, 3) if finished else None,
            total_ms=_milliseconds(finished_at - flight.submitted_at),
        )


def refused(failure: Failure | None) -> RadixqError:
    """Make the error of a job that was refused before it reached the engine."""
    failure = failure or Failure(code=InternalError.code, message="the job was neither prepared nor refused")
    return _REFUSALS.get(failure.code, InvalidRequest)(failure.message)


def _status(flight: Flight, error: RadixqError) -> Status:
    if isinstance(error, Cancelled):
        return "cancelled"
    if isinstance(error, Expired):
        return "expired"
    return "queued" if error.retry and flight.job.should_retry else "failed"


def _milliseconds(seconds: float) -> float:
    return round(max(seconds, 0.0) * 1000, 3)
