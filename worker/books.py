"""RQ's bookkeeping at the end of an execution, in a transaction that the caller has fenced. Knows no results of ours.

RQ's own methods open the transaction themselves, so nothing could be watched before it, and they log a failed one
instead of raising. These do the same, command for command.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rq.job import Job, JobStatus
from rq.rate_limit import release_slot
from rq.repeat import Repeat
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
    release_slot(job)


def append_success(worker: BaseWorker, flight: Flight, pipe: Pipeline) -> None:
    """Append what `succeed` writes for the job itself."""
    job = flight.job
    ttl = job.get_result_ttl(worker.default_result_ttl)
    job._handle_success(ttl, pipeline=pipe, **_execution(worker, flight))
    if job.repeats_left:
        Repeat.schedule(job, flight.queue, pipeline=pipe)
    else:
        job.cleanup(ttl, pipeline=pipe, remove_from_queue=False)
        job._status = JobStatus.FINISHED
    worker.increment_successful_job_count(pipeline=pipe)
    _count_time(worker, job, pipe)
    worker.cleanup_execution(job, pipeline=pipe, execution=flight.execution)


def is_plain(flight: Flight) -> bool:
    """Whether nothing but the job itself changes when it succeeds, as long as no other job depends on it."""
    return not flight.job.repeats_left and not flight.job.has_rate_limit


def fail(worker: BaseWorker, flight: Flight, pipe: Pipeline, reason: str, *, retry: bool) -> None:
    """Fail or stop a job, or queue it again, and execute the transaction."""
    pipe.multi()
    worker.increment_failed_job_count(pipe)
    _count_time(worker, flight.job, pipe)
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
    release_slot(flight.job)


def _count_time(worker: BaseWorker, job: Job, pipe: Pipeline) -> None:
    if job.started_at and job.ended_at:
        worker.increment_total_working_time(job.ended_at - job.started_at, pipe)


def _execution(worker: BaseWorker, flight: Flight) -> dict[str, Any]:
    return {
        "worker_name": worker.name,
        "execution_id": flight.execution.id,
        "execution_started_at": flight.execution.created_at,
        "execution_ended_at": flight.job.ended_at,
    }
