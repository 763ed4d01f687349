"""Write what became of each job: our readable hash and RQ's own bookkeeping in one transaction, once each.

An outbox: a result waits here while Redis is away. Knows nothing of queues, prompts or the engine.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast

import redis.exceptions
from rq.job import Job, JobStatus
from rq.utils import now
from rq.worker import BaseWorker

from common import keys, pictures
from common.errors import Cancelled, Expired, InternalError, InvalidRequest, RadixqError, WorkerCrashed
from common.log import logger
from common.messages import Failure, Result, Status, Timing
from worker import books
from worker.flight import Clock, Flight, QueuedJob, enqueued_at, iso
from worker.leases import fence
from worker.sequence import Finished

if TYPE_CHECKING:
    from redis.client import Pipeline

    from common.settings import Settings

_log = logger("worker.deliver")
_REFUSING: tuple[type[RadixqError], ...] = (InvalidRequest, *InvalidRequest.__subclasses__(), Expired, InternalError)
_NO_SIGN = "the worker that ran the job gave no more sign of life"
_GIVEN_UP = "the worker process died each time it ran this job alone, at the same point"
_MAX_DEAD = 10_000
_SURROGATE = re.compile("[\ud800-\udfff]")
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
        self._callbacks = ThreadPoolExecutor(1, thread_name_prefix="callbacks")
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
            pipe.hdel(keys.SUSPECTS, flight.job.id)  # it ended without a crash

    @property
    def waits(self) -> bool:
        """Whether anything is to be delivered."""
        return bool(self._waiting)

    def abandon(self, job: QueuedJob) -> None:
        """Say in our hash what RQ is about to do with a job whose worker is gone: run it again, or fail it."""
        body = job.body(self._settings.max_job_bytes)
        job.failure_ttl = self._settings.prompt_ttl_s
        result = self._crashed(job, body, "queued" if job.should_retry else "failed", _NO_SIGN)
        with self._worker.connection.pipeline() as pipe:
            self._write(job.id, result, pictures.named(body), pipe)
            pipe.execute()

    def bury(self, flight: Flight, pipe: Pipeline, crashes: int) -> None:
        """Append that a job is given up: failed for RQ and for us, and listed in `radixq:dead`.

        RQ's hash stays as long as the result, so that the owner can queue the job again.
        """
        job, body = flight.job, flight.job.body(self._settings.max_job_bytes)
        job.ended_at = now()
        job.failure_ttl = self._settings.result_ttl_s
        result = self._crashed(job, body, "failed", f"{_GIVEN_UP}; radixq dead requeue {job.id} tries it again")
        books.append_failure(self._worker, flight, pipe, f"{WorkerCrashed.code}: {_GIVEN_UP}", retry=False)
        self._write(job.id, result, pictures.named(body), pipe, needed_s=self._settings.result_ttl_s)
        fields: dict[Any, Any] = {
            "job_id": job.id, "queue": flight.queue.name, "error_code": WorkerCrashed.code, "reason": _GIVEN_UP,
            "crashes": crashes, "tokens": flight.tokens, "at": iso(self._clock.now()),
        }  # fmt: skip
        pipe.xadd(keys.DEAD, fields, maxlen=_MAX_DEAD, approximate=True)
        _log.error("given up", extra={"job": job.id, "crashes": crashes, "code": WorkerCrashed.code})

    def _crashed(self, job: QueuedJob, body: Any, status: Status, message: str) -> Result:
        at = self._clock.now()
        attempts = self._worker.connection.hget(keys.result(job.id), "attempts")
        return Result(
            id=job.id,
            status=status,
            attempts=int(attempts or 1),
            error=Failure(code=WorkerCrashed.code, message=message),
            timing=Timing(submitted_at=iso(enqueued_at(job)), finished_at=iso(at) if status == "failed" else None),
            **_labels(body),
        )

    def close(self) -> None:
        """Let the callbacks that already run end; drop the others."""
        self._callbacks.shutdown(wait=False, cancel_futures=True)

    def _write(
        self, job_id: str, result: Result, digests: tuple[str, ...], pipe: Pipeline, *, needed_s: int | None = None
    ) -> None:
        """Append the hash of a result, and let the job's pictures go: with its prompt, unless that is needed longer."""
        key = keys.result(job_id)
        pipe.delete(key)
        pipe.hset(key, mapping=cast(dict[Any, Any], result.to_hash()))
        if result.status != "queued":
            pipe.expire(key, self._settings.result_ttl_s)
            pictures.release(pipe, job_id, digests, needed_s or self._settings.prompt_ttl_s)

    def _deliver(self, flight: Flight) -> None:
        while True:
            try:
                with fence(self._worker, [flight]) as (pipe, held):
                    self._end(flight, pipe, leased=bool(held))
                return
            except redis.exceptions.WatchError:  # somebody touched the job between our look and our write
                continue

    def _end(self, flight: Flight, pipe: Pipeline, *, leased: bool) -> None:
        if flight.status in (None, JobStatus.CANCELED):
            self._cancel(flight, pipe, deleted=flight.status is None)
        elif not leased:
            self._drop(flight, pipe)
        elif flight.error is None:
            self._succeed(flight, pipe)
        else:
            self._fail(flight, flight.error, pipe)

    def _succeed(self, flight: Flight, pipe: Pipeline) -> None:
        job = self._ended(flight.job)
        assert flight.result is not None
        job._result = flight.result.model_dump(mode="json", exclude_none=True)  # RQ has no public way in
        books.succeed(self._worker, flight, pipe)
        self._delivered(flight)

    def _fail(self, flight: Flight, error: RadixqError, pipe: Pipeline) -> None:
        job = self._ended(flight.job)
        retry = flight.result is not None and flight.result.status == "queued"
        before = job.retries_left
        if not error.retry:
            job.retries_left = 0
        try:
            books.fail(self._worker, flight, pipe, f"{error.code}: {error}", retry=retry)
        except redis.exceptions.RedisError:
            job.retries_left = before
            raise
        _log.warning("failed", extra={"job": job.id, "code": error.code, "retry": job.retries_left if retry else 0})
        self._delivered(flight)

    def _delivered(self, flight: Flight) -> None:
        """Count what is committed, and call back."""
        job, error, result = flight.job, flight.error, flight.result
        assert result is not None
        if error is None:
            self.jobs_finished += 1
            self._call_back(job, "success_callback", job._result)
            return
        self.jobs_failed += result.status == "failed"
        if flight.stopped:
            self._call_back(job, "stopped_callback")
        elif result.status != "queued":
            self._call_back(job, "failure_callback", type(error), error, None)

    def _cancel(self, flight: Flight, pipe: Pipeline, *, deleted: bool) -> None:
        """End a job that was cancelled or deleted while it ran; RQ has taken it out of its registries already."""
        if flight.result is None or flight.result.status != "cancelled":
            flight.result = self._result(flight, Cancelled("the job was cancelled while it ran"))
        job = flight.job
        pipe.multi()
        self._worker.cleanup_execution(job, pipeline=pipe, execution=flight.execution)
        if deleted:
            pipe.delete(job.key)
        else:
            pipe.expire(job.key, self._settings.prompt_ttl_s)
        pipe.execute()

    def _drop(self, flight: Flight, pipe: Pipeline) -> None:
        """Forget a result whose job is somebody else's by now, or which is already written."""
        written = self._is_written(flight)
        if not written:
            _log.warning("lease lost: dropping result", extra={"job": flight.job.id, "rq_status": flight.status})
        result, flight.result = flight.result, None
        pipe.multi()
        self._worker.cleanup_execution(flight.job, pipeline=pipe, execution=flight.execution)
        pipe.execute()
        flight.result = result
        if written:
            self._delivered(flight)

    def _is_written(self, flight: Flight) -> bool:
        """Whether this very result is in Redis: the transaction went through, and its answer was lost."""
        assert flight.result is not None
        json = self._worker.connection.hget(keys.result(flight.job.id), "json")
        return json == flight.result.to_hash()["json"].encode()

    def _ended(self, job: Job) -> Job:
        """Stamp the end; RQ's hash holds the prompt, so it stays for a shorter time than our result."""
        job.ended_at = now()
        job.result_ttl = job.failure_ttl = self._settings.prompt_ttl_s
        return job

    def _result(self, flight: Flight, outcome: Finished | RadixqError) -> Result:
        body = flight.job.body(self._settings.max_job_bytes)
        flight.digests = pictures.named(body)
        common: dict[str, Any] = {
            "id": flight.job.id, "model": self.model, "worker": self._label, "attempts": flight.attempts,
            "timing": self._timing(flight, outcome), **_labels(body),
        }  # fmt: skip
        if isinstance(outcome, Finished):
            return Result(
                status="finished", text=outcome.text, finish_reason=outcome.finish_reason, usage=outcome.usage, **common
            )
        error = Failure(code=outcome.code, message=str(outcome))
        return Result(status=_status(flight, outcome), error=error, **common)

    def _timing(self, flight: Flight, outcome: Finished | RadixqError) -> Timing:
        finished_at = self._clock.now()
        finished = outcome if isinstance(outcome, Finished) else None
        return Timing(
            submitted_at=iso(flight.submitted_at),
            started_at=iso(flight.started_at),
            finished_at=iso(finished_at),
            queued_ms=_milliseconds(flight.started_at - flight.submitted_at),
            prefill_ms=round(finished.prefill_ms, 3) if finished else None,
            decode_ms=round(finished.decode_ms, 3) if finished else None,
            total_ms=_milliseconds(finished_at - flight.submitted_at),
        )

    def _call_back(self, job: Job, kind: str, *args: object) -> None:
        if getattr(job, f"_{kind}_name"):
            self._callbacks.submit(_isolated, job, kind, *args)


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


def _labels(body: Any) -> dict[str, Any]:
    """Pick what the producer wants to find again in the result, as far as it can be read."""
    if not isinstance(body, dict):
        return {}
    labels = {name: body[name] for name in ("custom_id", "batch_id") if _writable(body.get(name))}
    metadata = body.get("metadata")
    if isinstance(metadata, dict) and all(_writable(part) for item in metadata.items() for part in item):
        labels["metadata"] = metadata
    return labels


def _writable(value: object) -> bool:
    """Whether it is a string that UTF-8 can hold: JSON can escape lone surrogates, which it cannot."""
    return isinstance(value, str) and not _SURROGATE.search(value)


def _milliseconds(seconds: float) -> float:
    return round(max(seconds, 0.0) * 1000, 3)


def _isolated(job: Job, kind: str, *args: object) -> None:
    """Run somebody's callback where it can neither fail the job nor hold up the worker."""
    try:
        callback = getattr(job, kind)
        if callback is not None:
            callback(job, job.connection, *args)
    except Exception:  # noqa: BLE001  # not our code
        _log.exception("callback raised", extra={"job": job.id, "callback": kind})
