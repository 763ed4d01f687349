"""A job while this worker runs it: RQ's job and execution, when it started, and what became of it.

Knows no Redis commands beyond asking the server for its time.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, ClassVar

from redis import Redis
from rq.executions import Execution
from rq.job import Job, JobStatus
from rq.queue import Queue
from rq.utils import now

from common.errors import RadixqError
from common.messages import Result
from common.serializer import JobSerializer
from worker.suspects import Suspicion

if TYPE_CHECKING:
    from redis.client import Pipeline


class QueuedJob(Job):
    """An RQ job whose hash is not trusted.

    RQ would import any callback it names, post to any webhook, and unpack a payload of any size. Here the payload stays
    as it lies in Redis: it is neither unpacked nor written again.
    """

    callbacks: ClassVar[frozenset[str]] = frozenset()
    packed = b""

    def restore(self, raw_data: Mapping[bytes, bytes]) -> None:
        """Take everything from the hash but the payload."""
        self.packed = raw_data.get(b"data", b"")
        super().restore({**raw_data, b"data": b""})

    def to_dict(self, include_meta: bool = True, include_result: bool = True) -> dict[str, Any]:
        """Return what RQ writes, without the payload."""
        fields = super().to_dict(include_meta, include_result)
        return {name: value for name, value in fields.items() if name != "data"}

    def body(self, max_bytes: int) -> Any:
        """Return the job's argument, the JSON object that its producer wrote; None where there is no such thing."""
        try:
            unpacked = zlib.decompressobj().decompress(self.packed, max_bytes)
        except zlib.error:
            unpacked = self.packed
        try:
            return JobSerializer.loads(unpacked)[2][0]
        except (ValueError, LookupError, TypeError, RecursionError):
            return None

    @property
    def success_callback(self) -> Any:
        """The callback, if the worker's owner listed it."""
        return super().success_callback if self._success_callback_name in self.callbacks else None

    @property
    def failure_callback(self) -> Any:
        """The callback, if the worker's owner listed it."""
        return super().failure_callback if self._failure_callback_name in self.callbacks else None

    @property
    def stopped_callback(self) -> Any:
        """The callback, if the worker's owner listed it."""
        return super().stopped_callback if self._stopped_callback_name in self.callbacks else None

    def retry(self, queue: Queue, pipeline: Pipeline) -> None:
        """Spend a retry: queue the job again, or schedule it. RQ's own writes partly outside the transaction."""
        interval = self.get_retry_interval()
        assert self.retries_left
        self.retries_left -= 1
        if interval:
            self.set_status(JobStatus.SCHEDULED, pipeline=pipeline)
            queue.schedule_job(self, now() + timedelta(seconds=interval), pipeline=pipeline)
        else:
            queue._enqueue_job(self, pipeline=pipeline, at_front=bool(self.enqueue_at_front_on_retry))

    def send_webhooks(self, status: Any, *, exc_string: str | None = None) -> None:
        """Send none."""


class Clock:
    """The Redis server's time: what two machines and their results agree on."""

    def __init__(self) -> None:
        self._offset_s = 0.0

    def sync(self, connection: Redis) -> None:
        """Ask the server once more."""
        before = time.time()
        seconds, microseconds = connection.time()
        self._offset_s = seconds + microseconds / 1e6 - (before + time.time()) / 2

    def now(self) -> float:
        """Return seconds since the epoch."""
        return self.at(time.time())

    def at(self, local: float) -> float:
        """Return what the server's clock said when ours said `local`."""
        return local + self._offset_s


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
        submitted_at, started_at: seconds since the epoch by the server's clock.
        deadline: `time.monotonic()` at which the job has run for its timeout.
        status: RQ's status of the job when it was last looked at; None: RQ has no such job.
        stopped: someone asked RQ to stop it.
        suspicion: what is held against the job because of earlier crashes.
        tokens: how many had been generated when this was last recorded; only of a job that runs alone.
        guilty: it crashed too many workers, and is given up.
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
