"""RQ's bookkeeping at the end of an execution, in a transaction that the caller has fenced. Knows no results of ours.

RQ's own methods open the transaction themselves, so nothing could be watched before it, and they log a failed one
instead of raising. These leave the same behind. Of a job that finished RQ writes the whole hash once more; these write
what changed.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rq.job import Job, JobStatus
from rq.results import Result
from rq.utils import now, utcformat
from rq.worker import BaseWorker

from worker.flight import Flight

if TYPE_CHECKING:
    from redis.client import Pipeline


def succeed(worker: BaseWorker, flight: Flight, pipe: Pipeline) -> None:
    """Finish a job, whose `_result` is set, and execute the transaction."""
    job, queue = flight.job, flight.queue
    ready = queue.move_dependents_to_ready(job, pipeline=pipe)
    if not pipe.explicit_transaction:  # it begins the transaction only if there are dependents
        pipe.multi()
    append_success(worker, flight, pipe)
    pipe.execute()
    queue.enqueue_ready_jobs_by_queue(ready)


def append_success(worker: BaseWorker, flight: Flight, pipe: Pipeline) -> None:
    """Append what `succeed` writes for the job itself."""
    job = flight.job
    ttl = job.get_result_ttl(worker.default_result_ttl)
    _finish(worker, flight, ttl, pipe)
    job.cleanup(ttl, pipeline=pipe, remove_from_queue=False)
    job._status = JobStatus.FINISHED
    worker.cleanup_execution(job, pipeline=pipe, execution=flight.execution)
    pipe.hincrby(worker.key, "successful_job_count", 1)
    worker.increment_total_working_time(_took(job), pipe)


def _finish(worker: BaseWorker, flight: Flight, ttl: int, pipe: Pipeline) -> None:
    job = flight.job
    job._status = JobStatus.FINISHED
    ended_at = utcformat(job.ended_at or now())
    pipe.hset(job.key, mapping={"status": job._status, "ended_at": ended_at})
    result = Result(
        job.id, Result.Type.SUCCESSFUL, job.connection, return_value=job._result, **_execution(worker, flight)
    )
    result.serializer = job.serializer  # given to `Result` it would be looked at anew, as in `JsonJob`
    result.save(ttl, pipe)  # type: ignore[no-untyped-call]
    if ttl != 0:
        job.finished_job_registry.add(job, ttl, pipe)


def fail(worker: BaseWorker, flight: Flight, pipe: Pipeline, reason: str, *, retry: bool) -> None:
    """Fail or stop a job, or queue it again, and execute the transaction."""
    pipe.multi()
    worker.increment_failed_job_count(pipe)
    worker.increment_total_working_time(_took(flight.job), pipe)
    append_failure(worker, flight, pipe, reason, retry=retry)
    pipe.execute()
    after_failure(flight, retry=retry)


def append_failure(worker: BaseWorker, flight: Flight, pipe: Pipeline, reason: str, *, retry: bool) -> None:
    """Append what becomes of the job; for a worker that did not run it."""
    job = flight.job
    worker.cleanup_execution(job, pipeline=pipe, execution=flight.execution)
    if retry:
        job.retry(flight.queue, pipe)
        return
    job.set_status(JobStatus.STOPPED if flight.stopped else JobStatus.FAILED, pipeline=pipe)
    job._handle_failure(reason, pipeline=pipe, **_execution(worker, flight))


def after_failure(flight: Flight, *, retry: bool) -> None:
    """Do what RQ does once a failure is written."""
    if not retry:
        flight.queue.enqueue_dependents(flight.job)


def _took(job: Job) -> timedelta:
    return job.ended_at - job.started_at if job.started_at and job.ended_at else timedelta()


def _execution(worker: BaseWorker, flight: Flight) -> dict[str, Any]:
    return {
        "worker_name": worker.name,
        "execution_id": flight.execution.id,
        "execution_started_at": flight.execution.created_at,
        "execution_ended_at": flight.job.ended_at,
    }
