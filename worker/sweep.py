"""Close the records of jobs that ended behind our back: emptied, deleted or cancelled through RQ, or abandoned by it.

And open those of jobs that were queued again through RQ, which would let them expire while they wait. Looks at a slice
of all results at each call, so that 100,000 of them cost no more than 1,000. Knows no worker.
"""

from __future__ import annotations

from typing import Final, cast

from redis import Redis
from redis.client import Pipeline
from redis.exceptions import WatchError
from rq.exceptions import NoSuchJobError
from rq.job import Job
from rq.results import Result as RqResult

from common import keys, pictures, reason, record, reopen
from common.log import logger
from common.messages import Failure, Status
from common.serializer import JobSerializer
from common.settings import Settings
from worker.flight import Clock, iso
from worker.job import QueuedJob

SLICE: Final = 1_000
_OPEN: Final = (b"queued", b"running")
_WAITS: Final = (b"queued", b"deferred", b"scheduled")  # for RQ
_MAY_WAIT_AGAIN: Final = (b"failed", b"cancelled", b"expired", b"lost")
_LOST: Final[tuple[Status, str, str]] = (
    "lost",
    "internal",
    "RQ no longer has the job, and no result came; submit it again",
)
_ENDS: Final[dict[bytes, tuple[Status, str, str]]] = {
    b"canceled": ("cancelled", "cancelled", "cancelled through RQ"),
    b"stopped": ("cancelled", "cancelled", "stopped through RQ"),
}

_log = logger("worker.sweep")


class Sweep:
    """One worker's way through the results."""

    def __init__(self, connection: Redis, settings: Settings, clock: Clock) -> None:
        self._connection, self._settings, self._clock = connection, settings, clock
        self._cursor = 0

    def step(self) -> int:
        """Look at the next slice; return how many records were closed."""
        prefix = keys.result("")
        self._cursor, keys_found = self._connection.scan(self._cursor, match=f"{prefix}*", count=SLICE, _type="hash")
        ids = [key.decode(errors="replace").removeprefix(prefix) for key in cast("list[bytes]", keys_found)]
        with self._connection.pipeline(transaction=False) as pipe:
            for job_id in ids:
                pipe.hget(keys.result(job_id), "status")
                pipe.hget(Job.key_for(job_id), "status")
            replies = pipe.execute(raise_on_error=False)
        found = list(zip(ids, replies[::2], replies[1::2], strict=True))
        for job_id, ours, rqs in found:
            if ours in _MAY_WAIT_AGAIN and rqs in _WAITS:
                self._reopen(job_id)
        suspicious = [
            job_id for job_id, ours, rqs in found if ours in _OPEN and (rqs is None or rqs == b"failed" or rqs in _ENDS)
        ]
        return sum(self._close(job_id) for job_id in suspicious)

    def _reopen(self, job_id: str) -> None:
        job = QueuedJob(job_id, connection=self._connection, serializer=JobSerializer)
        with self._connection.pipeline() as pipe:
            try:
                pipe.watch(keys.result(job_id), job.key)  # type: ignore[no-untyped-call]
                job.refresh()
                if self._connection.hget(job.key, "status") not in _WAITS:
                    return
                pipe.multi()
                digests = pictures.named(job.body(self._settings.max_job_bytes))
                reopen.append(pipe, self._connection, job_id, job.key, digests, self._clock.now())
                pipe.execute()
            except (WatchError, NoSuchJobError):  # it moved on
                return
        _log.info("a job waits again", extra={"job": job_id})

    def _close(self, job_id: str) -> bool:
        with self._connection.pipeline() as pipe:
            try:
                pipe.watch(keys.result(job_id), Job.key_for(job_id))  # type: ignore[no-untyped-call]
                ours = self._connection.hget(keys.result(job_id), "status")
                end = self._end(job_id)
                if ours not in _OPEN or end is None:
                    return False
                pipe.multi()
                self._append(pipe, job_id, *end)
                pipe.execute()
            except WatchError:  # somebody is at work on it
                return False
        return True

    def _end(self, job_id: str) -> tuple[Status, str, str] | None:
        """Return how a job ended for RQ, with a code and a reason; None if it did not."""
        key = Job.key_for(job_id)
        if not self._connection.exists(key):
            return _LOST
        status = cast("bytes | None", self._connection.hget(key, "status"))
        if status != b"failed":
            return _ENDS.get(status or b"")
        failure = reason.of(self._connection, RqResult.get_key(job_id))  # type: ignore[no-untyped-call]
        return "failed", failure.code, failure.message

    def _append(self, pipe: Pipeline, job_id: str, status: Status, code: str, message: str) -> None:
        before = record.read(self._connection, job_id)
        result = record.ended(before, status, Failure(code=code, message=message), iso(self._clock.now()))
        record.write(pipe, result, (), self._settings)  # its pictures: see common.pictures.sweep
        pipe.expire(Job.key_for(job_id), self._settings.prompt_ttl_s)
        pipe.hdel(keys.SUSPECTS, job_id)
        _log.warning("closed the record of a job", extra={"job": job_id, "status": status, "reason": message})
