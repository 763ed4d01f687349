"""A job while this worker runs it: RQ's job and execution, when it started, and what became of it.

Knows no Redis commands beyond asking the server for its time.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime

from redis import Redis
from rq.executions import Execution
from rq.job import Job
from rq.queue import Queue

from common.errors import RadixqError
from common.history import History
from common.messages import Result
from worker.job import QueuedJob
from worker.suspects import Suspicion


class Clock:
    """The Redis server's time: what two machines, their leases and their results agree on.

    Attributes:
        ahead_s: how far the server's clock is ahead of this machine's.
    """

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def sync(self, connection: Redis) -> None:
        """Ask the server once more."""
        before = time.time()
        seconds, microseconds = connection.time()
        self.ahead_s = seconds + microseconds / 1e6 - (before + time.time()) / 2

    def now(self) -> float:
        """Return seconds since the epoch."""
        return self.at(time.time())

    def at(self, local: float) -> float:
        """Return what the server's clock said when ours said `local`."""
        return local + self.ahead_s


def iso(at: float) -> str:
    """Write a time as `2026-11-22T14:03:05.123Z`."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def enqueued_at(job: Job) -> float:
    """Return when the job came into its queue, by its producer's clock."""
    at = job.enqueued_at or job.created_at
    return at.timestamp()


@dataclass(eq=False, slots=True)
class Flight:
    """One execution of a job, from its start until its result is in Redis.

    Attributes:
        submitted_at, started_at: seconds since the epoch by the server's clock; in this order, even where a producer's
            clock is ahead.
        deadline: `time.monotonic()` at which the job has run for its timeout.
        status: RQ's status of the job when it was last looked at; None: RQ has no such job.
        stopped: someone asked RQ to stop it.
        suspicion: what is held against the job because of earlier crashes.
        tokens: how many had been generated when this was last recorded; only of a job that runs alone.
        guilty: it crashed too many workers, and is given up.
        history: what earlier attempts left in its record.
        error: why there is no text, or will be none.
        result: what to write, once it is known.
        digests: pictures that the job needs until then; known with the result.
    """

    job: QueuedJob
    queue: Queue
    execution: Execution
    submitted_at: float = 0.0
    started_at: float = 0.0
    attempts: int = 1
    deadline: float = float("inf")
    status: str | None = None
    stopped: bool = False
    suspicion: Suspicion | None = None
    tokens: int = 0
    guilty: bool = False
    history: History = History()
    error: RadixqError | None = None
    result: Result | None = None
    digests: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """The execution's id: unlike the job's it is new with every attempt."""
        return self.execution.id

    @property
    def limit(self) -> int:
        """How many jobs may run at once while this one does; 0: it is above suspicion."""
        return self.suspicion.limit if self.suspicion else 0
