"""Keep what this worker runs in its name: renew leases, notice cancelled jobs, never write for a job that is not ours.

RQ's books only; knows no results and no engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import redis.exceptions
from rq import executions, registry
from rq.job import JobStatus
from rq.worker import BaseWorker
from rq.worker_registration import register

from worker.flight import Clock, Flight
from worker.ledger import Ledger

if TYPE_CHECKING:
    from redis.client import Pipeline

LEASE_S = 90
"""A job whose worker has not renewed its lease for this long is taken for abandoned, by any RQ worker."""


def keep_by(clock: Clock) -> None:
    """Let RQ, in this process, write all leases, and look for those that are over, by this clock.

    By each machine's own, one that is a lease's length off would take jobs from the living, or have its own taken.
    """
    registry.current_timestamp = executions.current_timestamp = lambda: int(clock.now())  # type: ignore[attr-defined]


@contextmanager
def fence(worker: BaseWorker, flights: Sequence[Flight]) -> Iterator[tuple[Pipeline, list[Flight]]]:
    """Give a pipeline and those of the flights whose lease is ours; what is then written fails if that has changed.

    The job and its execution are watched before the lease is looked at: whoever takes a job away, RQ's own maintenance
    included, writes to one of them in the transaction in which it ends the lease.

    Raises:
        redis.exceptions.WatchError: on execute, if so; look again.
    """
    with worker.connection.pipeline() as pipe, worker.connection.pipeline(transaction=False) as questions:
        jobs = [flight.job for flight in flights]
        keys = [key for job in jobs for key in (job.key, job.dependents_key)]
        _ask(questions, flights)
        replies = watch(pipe, [*keys, *(flight.execution.key for flight in flights)], questions)
        yield pipe, _split(flights, replies)[0]


def watch(pipe: Pipeline, keys: Iterable[str], questions: Pipeline) -> list[Any]:
    """Watch the keys and then read what `questions` holds; return the replies.

    One round trip, where redis-py by itself would take one to watch and one for each question.

    Raises:
        redis.exceptions.ResponseError: the server refused one of them; the keys are watched all the same.
    """
    asked = [(("WATCH", *keys), {}), *questions.command_stack]
    connection: Any = pipe.connection_pool.get_connection()
    pipe.connection = connection
    try:
        connection.send_packed_command(connection.pack_commands([words for words, _ in asked]))
        replies = [_reply(pipe, connection, words[0], options) for words, options in asked]
    except redis.exceptions.RedisError:
        connection.disconnect()
        pipe.watching = False  # else the pipeline would connect again to unwatch
        raise
    for reply in replies:
        if isinstance(reply, redis.exceptions.ResponseError):
            raise reply
    return replies[1:]


def _reply(pipe: Pipeline, connection: Any, command: str, options: dict[str, Any]) -> Any:
    try:
        return pipe.parse_response(connection, command, **options)  # type: ignore[no-untyped-call]
    except redis.exceptions.ResponseError as error:
        return error


def split(worker: BaseWorker, flights: Sequence[Flight]) -> tuple[list[Flight], list[Flight]]:
    """Return the flights whose lease is still ours, and the others; note RQ's status of each job."""
    with worker.connection.pipeline(transaction=False) as pipe:
        _ask(pipe, flights)
        return _split(flights, pipe.execute())


def _ask(pipe: Pipeline, flights: Sequence[Flight]) -> None:
    for flight in flights:
        pipe.zscore(flight.job.started_job_registry.key, flight.execution.composite_key)
        pipe.hget(flight.job.key, "status")


def _split(flights: Sequence[Flight], replies: Sequence[Any]) -> tuple[list[Flight], list[Flight]]:
    leases, statuses = replies[::2], replies[1::2]
    for flight, status in zip(flights, statuses, strict=True):
        flight.status = status.decode(errors="replace") if status else None
    found = list(zip(flights, leases, strict=True))
    return [flight for flight, lease in found if lease is not None], [
        flight for flight, lease in found if lease is None
    ]


def renew(worker: BaseWorker, ledger: Ledger, flights: Sequence[Flight]) -> list[Flight]:
    """Say that the worker and all it runs are alive; return the flights that were taken from it meanwhile.

    Everything is written anew: after a long sleep of the machine RQ may have forgotten the worker.
    """
    held, lost = split(worker, flights)
    with worker.connection.pipeline() as pipe:
        register(worker, pipe)
        ledger.open(pipe)
        worker.heartbeat(LEASE_S, pipeline=pipe)
        pipe.hset(worker.key, mapping={**worker.serialize(), "state": worker.get_state()})
        pipe.expire(worker.key, LEASE_S)
        for flight in held:
            flight.execution.save(LEASE_S, pipeline=pipe)
            flight.execution.heartbeat(flight.job.started_job_registry, LEASE_S, pipeline=pipe)
            pipe.sadd(worker.executions_key, flight.execution.composite_key)
        pipe.expire(worker.executions_key, LEASE_S)
        pipe.execute()
    return lost


def cancelled(worker: BaseWorker, flights: Sequence[Flight]) -> list[Flight]:
    """Return the flights whose job was cancelled or deleted while it ran."""
    split(worker, flights)
    return [flight for flight in flights if flight.status in (None, JobStatus.CANCELED)]
