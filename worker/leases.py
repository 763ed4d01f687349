"""Keep what this worker runs in its name: renew leases, notice cancelled jobs, take over from a dead predecessor.

RQ's books only; knows no results and no engine.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from rq.executions import Execution
from rq.job import JobStatus
from rq.worker import BaseWorker
from rq.worker_registration import get_keys, register, unregister

from common.log import logger
from worker.drain import LEASE_S, Drain, split
from worker.flight import Flight
from worker.job import read

_log = logger("worker.leases")


def renew(worker: BaseWorker, flights: Sequence[Flight]) -> list[Flight]:
    """Say that the worker and all it runs are alive; return the flights that were taken from it meanwhile.

    Everything is written anew: after a long sleep of the machine RQ may have forgotten the worker.
    """
    held, lost = split(worker, flights)
    with worker.connection.pipeline() as pipe:
        register(worker, pipe)
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
    with worker.connection.pipeline(transaction=False) as pipe:
        for flight in flights:
            pipe.hget(flight.job.key, "status")
        statuses = pipe.execute()
    gone = (None, JobStatus.CANCELED.value.encode())
    return [flight for flight, status in zip(flights, statuses, strict=True) if status in gone]


def recover(worker: BaseWorker, drain: Drain) -> int:
    """Hand back what workers of this machine ran when they died; return how many jobs that were.

    Without it those jobs wait for the end of their lease, and RQ takes the crash for a failed attempt.
    """
    jobs = 0
    for dead in _dead_workers(worker):
        orphans = [_orphan(worker, drain, execution) for execution in dead.get_current_executions(refresh=True)]
        if worker.connection.delete(dead.key):  # one recovering worker of several gets them
            jobs += drain.hand_back([orphan for orphan in orphans if orphan is not None])
            unregister(dead)
            _log.warning("took over from a dead worker", extra={"worker": dead.name, "jobs": jobs})
    return jobs


def _dead_workers(worker: BaseWorker) -> list[BaseWorker]:
    names = {name for queue in worker.queues for name in get_keys(queue)}
    known = (BaseWorker.find_by_key(name, worker.connection, serializer=worker.serializer) for name in sorted(names))
    return [other for other in known if other and other.hostname == worker.hostname and not _alive(other.pid)]


def _orphan(worker: BaseWorker, drain: Drain, execution: Execution) -> Flight | None:
    (raw,) = read(worker.connection, [execution.job_id])
    queue = next((queue for queue in worker.queues if queue.name.encode() == raw.get(b"origin")), None)
    return Flight(drain.restore(execution.job_id, queue, raw), queue, execution) if queue else None


def _alive(pid: int | None) -> bool:
    try:
        os.kill(pid or 0, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
