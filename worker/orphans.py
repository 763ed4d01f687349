"""Cancel jobs that wait for a job which will never finish; RQ leaves them deferred for ever.

Looks at RQ's registry of deferred jobs, so it does not matter how the other job ended, or who wrote that. Knows no
engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple, cast

from redis import Redis
from redis.client import Pipeline
from redis.exceptions import ResponseError, WatchError
from rq.exceptions import NoSuchJobError
from rq.job import Job
from rq.queue import Queue
from rq.registry import CanceledJobRegistry

from common import keys, pictures, record
from common.errors import Cancelled
from common.log import logger
from common.messages import Failure
from common.serializer import JobSerializer
from common.settings import Settings
from worker.job import QueuedJob
from worker.reject import is_id, to_text

MOST: Final = 1_000
"""Deferred jobs of one queue looked at in one go; the next ones come at the next call."""
_DEAD: Final = {b"failed": "failed", b"stopped": "was stopped", b"canceled": "was cancelled"}
_OURS_DEAD: Final = {b"failed": "failed", b"cancelled": "was cancelled", b"expired": "expired", b"lost": "was lost"}
_log = logger("worker.orphans")


class _Parent(NamedTuple):
    job_id: str
    rqs: bytes | None
    ours: bytes | None

    @property
    def gone(self) -> bool:
        """Whether there is no trace of it: deleted, or so long ago that its result has expired."""
        return self.rqs is None and self.ours is None

    def end(self, allowed: bool) -> str | None:
        """Say how it ended, if it did so without finishing."""
        if self.rqs is not None:
            return None if allowed and self.rqs == b"failed" else _DEAD.get(self.rqs)
        if self.ours in (b"queued", b"running"):
            return "was deleted"
        return None if allowed and self.ours == b"failed" else _OURS_DEAD.get(self.ours or b"")


class Orphans:
    """What one worker does for the deferred jobs of its queues."""

    def __init__(self, connection: Redis, queues: Sequence[Queue], settings: Settings) -> None:
        self._connection = connection
        self._queues = queues
        self._settings = settings
        self._at = dict.fromkeys((queue.name for queue in queues), 0)

    def cancel(self, now: str) -> int:
        """Cancel those whose time has come, and say in their results why; return how many."""
        return sum(self._cancel(queue, job_id, now) for queue in self._queues for job_id in self._next(queue))

    def _next(self, queue: Queue) -> Iterable[str]:
        registry = queue.deferred_job_registry.key
        start = self._at[queue.name]
        found: Any = self._connection.zrange(registry, start, start + MOST - 1)
        self._at[queue.name] = start + MOST if len(found) == MOST else 0
        ids = [to_text(raw_id) for raw_id in found]
        strange = [raw_id for raw_id, job_id in zip(found, ids, strict=True) if not is_id(job_id)]
        if strange:
            self._connection.zrem(registry, *strange)
        return self._doomed([job_id for job_id in ids if is_id(job_id)])

    def _doomed(self, job_ids: Sequence[str]) -> list[str]:
        """Return those that have a dead parent, in two round trips."""
        if not job_ids:
            return []
        with self._connection.pipeline(transaction=False) as pipe:
            for job_id in job_ids:
                pipe.smembers(_dependencies_key(job_id))
                pipe.hget(Job.key_for(job_id), "allow_dependency_failures")
            replies = pipe.execute(raise_on_error=False)
        families = list(zip(job_ids, replies[::2], replies[1::2], strict=True))
        families = [family for family in families if isinstance(family[1], set)]
        readable = [
            (job_id, [to_text(one) for one in parents], allowed == b"1") for job_id, parents, allowed in families
        ]
        parents = self._parents(
            self._connection, sorted({one for _, some, _ in readable for one in some if is_id(one)})
        )
        known = {parent.job_id: parent for parent in parents}
        return [
            job_id for job_id, some, allowed in readable if _why([known[one] for one in some if one in known], allowed)
        ]

    @staticmethod
    def _parents(client: Redis, job_ids: Sequence[str]) -> list[_Parent]:
        with client.pipeline(transaction=False) as pipe:
            for job_id in job_ids:
                pipe.hget(Job.key_for(job_id), "status")
                pipe.hget(keys.result(job_id), "status")
            replies = [None if isinstance(one, ResponseError) else one for one in pipe.execute(raise_on_error=False)]
        return [_Parent(*one) for one in zip(job_ids, replies[::2], replies[1::2], strict=True)]

    def _cancel(self, queue: Queue, job_id: str, now: str) -> bool:
        """Look once more, this time so that nothing changes meanwhile, and cancel the job as RQ does it."""
        with self._connection.pipeline() as pipe:
            pipe.watch(Job.key_for(job_id), _dependencies_key(job_id))  # type: ignore[no-untyped-call]
            members = cast(set[bytes], self._connection.smembers(_dependencies_key(job_id)))
            some = [one for one in map(to_text, members) if is_id(one)]
            pipe.watch(*(Job.key_for(one) for one in some))  # type: ignore[no-untyped-call]
            job = QueuedJob(job_id, connection=self._connection, serializer=JobSerializer)
            try:
                job.refresh()
                parents = self._parents(self._connection, some)
                why = _why(parents, bool(job.allow_dependency_failures))
                if not why or not job.is_deferred:
                    return False
                job.origin = queue.name
                pipe.multi()
                self._append(pipe, job, why, now)
                pipe.execute()
            except NoSuchJobError:
                self._connection.zrem(queue.deferred_job_registry.key, job_id)
                return False
            except WatchError:  # something happened to one of them; the next look finds out
                return False
        _log.warning("cancelled with the job it waited for", extra={"job": job_id, "reason": why})
        return True

    def _append(self, pipe: Pipeline, job: QueuedJob, why: str, now: str) -> None:
        job.cancel(pipeline=pipe)
        CanceledJobRegistry(job.origin, self._connection).add(job, ttl=self._settings.prompt_ttl_s, pipeline=pipe)
        pipe.expire(job.key, self._settings.prompt_ttl_s)
        body = job.body(self._settings.max_job_bytes)
        failure = Failure(code=Cancelled.code, message=f"never started: {why}")
        result = record.ended(record.read(self._connection, job.id, body), "cancelled", failure, now)
        record.write(pipe, result, pictures.named(body), self._settings)


def _why(parents: Sequence[_Parent], allowed: bool) -> str | None:
    """Say why a job with these parents will never start, if so."""
    for parent in parents:
        end = parent.end(allowed)
        if end:
            return f"job {parent.job_id}, which this one depends on, {end}"
    if parents and all(parent.gone for parent in parents):
        return f"job {parents[0].job_id}, which this one depends on, is gone"
    return None


def _dependencies_key(job_id: str) -> str:
    return f"{Job.redis_job_namespace_prefix}:{job_id}:dependencies"
