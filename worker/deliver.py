"""Write what became of each job: our readable hash and RQ's own bookkeeping in one script or transaction, once each.

An outbox: a result waits here while Redis is away. Knows nothing of queues, prompts or the engine.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, cast

import redis.exceptions
from rq.job import Job, JobStatus
from rq.utils import now
from rq.worker import BaseWorker

from common import keys, pictures, record
from common.errors import Cancelled, Expired, InternalError, InvalidRequest, RadixqError, WorkerCrashed
from common.history import FIELDS as KEPT
from common.history import History, labels
from common.log import logger
from common.messages import Failure, Result, Status, Timing
from worker import books, groups
from worker.callbacks import Callbacks
from worker.flight import Clock, Flight, enqueued_at, iso
from worker.job import QueuedJob
from worker.leases import fence
from worker.sequence import Finished

if TYPE_CHECKING:
    from redis.client import Pipeline

    from common.settings import Settings

_log = logger("worker.deliver")
_REFUSING: tuple[type[RadixqError], ...] = (InvalidRequest, *InvalidRequest.__subclasses__(), Expired, InternalError)
_NO_SIGN = "the worker that ran the job gave no more sign of life"
_DIED = "the worker process died while it had the job in hand"
_GIVEN_UP = "the worker process died each time it ran this job alone, at the same point"
_MAX_DEAD = 10_000

# Writes the results of jobs that still are this worker's, and that no others wait for; answers which. ARGV, for each:
# the registry and the name of its lease, its hash, the set of who waits for it, the commands.
_SUCCEED: Final = (
    groups.LUA
    + f"""
local written = {{}}
for index = 0, math.huge do
  if at == #ARGV then return written end
  local registry, lease, job, dependents = take(), take(), take(), take()
  local started = redis.call('HGET', job, 'status') == '{JobStatus.STARTED.value}'
  local plain = started and redis.call('ZSCORE', registry, lease) and redis.call('EXISTS', dependents) == 0
  group(plain)
  if plain then written[#written + 1] = index end
end
"""
)
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
        self._succeed_script = worker.connection.register_script(_SUCCEED)
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

    def flush(self, most: int) -> Iterator[Flight]:
        """Deliver as many results, those without consequences in one script; yield each flight that is done with.

        Pictures are released by a script of their own, which cannot run inside another.

        Raises:
            redis.exceptions.RedisError: nothing was lost; go on later.
        """
        first = list(itertools.islice(self._waiting, most))
        for flight in self._succeed_together(
            [flight for flight in first if flight.error is None and not flight.digests]
        ):
            self._waiting.remove(flight)
            first.remove(flight)
            yield flight
        for flight in first:
            self._deliver(flight)
            self._waiting.popleft()
            yield flight

    def write(self, flight: Flight, pipe: Pipeline) -> None:
        """Append our hash to RQ's transaction. A job that RQ will run again has no time to live."""
        if flight.result is not None:
            record.write(pipe, flight.result, flight.digests, self._settings)
            pipe.hdel(keys.SUSPECTS, flight.job.id)  # it ended without a crash

    @property
    def waits(self) -> bool:
        """Whether anything is to be delivered."""
        return bool(self._waiting)

    def abandon(self, job: QueuedJob) -> None:
        """Say in our hash what RQ is about to do with a job whose worker is gone: run it again, or fail it."""
        body = job.body(self._settings.max_job_bytes)
        job.failure_ttl = self._settings.prompt_ttl_s
        ends = not job.should_retry
        result = self._crashed(job, body, "failed" if ends else "queued", WorkerCrashed(_NO_SIGN))
        with self._worker.connection.pipeline() as pipe:
            record.write(pipe, result, pictures.named(body), self._settings)
            pipe.execute()
        if ends:
            self._abandoned.append((job, WorkerCrashed(_NO_SIGN)))

    def maintained(self) -> None:
        """Call back for jobs that were abandoned for good; RQ has committed it by now."""
        while self._abandoned:
            job, error = self._abandoned.pop()
            self.callbacks.call(job, "failure", type(error), error, None)

    def bury(self, flight: Flight, pipe: Pipeline, crashes: int) -> None:
        """Append that a job is given up: failed for RQ and for us, and listed in `radixq:dead`.

        RQ's hash stays as long as the result, so that the owner can queue the job again.
        """
        job, body = flight.job, flight.job.body(self._settings.max_job_bytes)
        job.ended_at = now()
        job.failure_ttl = self._settings.result_ttl_s
        error = WorkerCrashed(f"{_GIVEN_UP}; radixq dead requeue {job.id} tries it again")
        result = self._crashed(job, body, "failed", error)
        books.append_failure(self._worker, flight, pipe, f"{WorkerCrashed.code}: {_GIVEN_UP}", retry=False)
        record.write(pipe, result, pictures.named(body), self._settings, needed_s=self._settings.result_ttl_s)
        fields: dict[Any, Any] = {
            "job_id": job.id, "queue": flight.queue.name, "error_code": WorkerCrashed.code, "reason": _GIVEN_UP,
            "crashes": crashes, "tokens": flight.tokens, "at": iso(self._clock.now()),
        }  # fmt: skip
        pipe.xadd(keys.DEAD, fields, maxlen=_MAX_DEAD, approximate=True)
        _log.error("given up", extra={"job": job.id, "crashes": crashes, "code": WorkerCrashed.code})

    def note_crash(self, flight: Flight, pipe: Pipeline) -> None:
        """Append to the record of a job that will run again how this attempt ended."""
        result = self._crashed(flight.job, None, "queued", WorkerCrashed(_DIED))
        pipe.hset(keys.result(flight.job.id), "errors", result.to_hash()["errors"])

    def buried(self, flight: Flight) -> None:
        """Call back for a job that was given up, once that is committed."""
        books.after_failure(flight, retry=False)
        self.callbacks.call(flight.job, "failure", WorkerCrashed, WorkerCrashed(_GIVEN_UP), None)

    def _crashed(self, job: QueuedJob, body: Any, status: Status, error: RadixqError) -> Result:
        names = ("attempts", "worker", *KEPT)
        attempts, worker, *kept = cast("list[bytes | None]", self._worker.connection.hmget(keys.result(job.id), names))
        at, history, attempt = iso(self._clock.now()), History.read(kept), record.counted(attempts) or 1
        if status == "queued":
            history = history.with_error(attempt, error, (worker or b"").decode(errors="replace"), at)
        return Result(
            id=job.id,
            status=status,
            attempts=attempt,
            error=Failure(code=error.code, message=str(error)),
            **history.fields(),
            timing=Timing(submitted_at=iso(enqueued_at(job)), finished_at=at if status == "failed" else None),
            **labels(body),
        )

    def close(self) -> None:
        """Give the callbacks a moment to end."""
        self.callbacks.close()

    def _succeed_together(self, flights: Sequence[Flight]) -> list[Flight]:
        """Write the successes that are ours and on which nothing depends, in one script; return these.

        The others are for `_deliver`.
        """
        if not flights:
            return []
        starts = []
        with self._worker.connection.pipeline() as pipe:
            for flight in flights:
                starts.append(len(pipe))
                books.append_success(self._worker, self._succeeded(flight), pipe)
            written = groups.cut(pipe, starts)
        words: list[Any] = []
        for flight, group in zip(flights, written, strict=True):
            job = flight.job
            words += (job.started_job_registry.key, flight.execution.composite_key, job.key, job.dependents_key, group)
        plain = [flights[index] for index in cast(list[int], self._succeed_script(args=words))]
        for flight in plain:
            self._delivered(flight)
        return plain

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
        books.succeed(self._worker, self._succeeded(flight), pipe)
        self._delivered(flight)

    def _succeeded(self, flight: Flight) -> Flight:
        job = self._ended(flight.job)
        assert flight.result is not None
        job._result = flight.result.model_dump(mode="json", exclude_none=True)  # RQ has no public way in
        return flight

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
            self.callbacks.call(job, "success", job._result)
            return
        self.jobs_failed += result.status == "failed"
        if flight.stopped:
            self.callbacks.call(job, "stopped")
        elif result.status != "queued":
            self.callbacks.call(job, "failure", type(error), error, None)

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
