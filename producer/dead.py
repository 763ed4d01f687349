"""Jobs that were given up, `radixq:dead`: list them, queue them again, delete them. Knows no worker."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from redis import Redis
from redis import exceptions as errors
from redis.client import Pipeline
from rq import Queue
from rq.job import Job
from rq.registry import FailedJobRegistry
from rq.utils import as_text

from common import keys, pictures, reopen
from common.errors import InvalidRequest
from common.serializer import JobSerializer
from producer.ticket import digests

_ENDED = ("started_at", "ended_at", "worker_name")


def listed(client: Redis) -> list[dict[str, str]]:
    """Return the entries, oldest first; they have no prompts."""
    return [entry for _, entry in _entries(client)]


def requeue(client: Redis, job_ids: Sequence[str], now_s: float, max_bytes: int) -> list[str]:
    """Queue jobs again, without what was held against them, and take them off the list; return their ids.

    Raises:
        InvalidRequest: one of them is not on the list, or its prompt is no longer there. Those before it are queued.
    """
    for job_id in job_ids:
        entries = _of(client, job_id)
        while True:
            with client.pipeline() as pipe:
                try:
                    pipe.watch(Job.key_for(job_id))  # type: ignore[no-untyped-call]
                    if as_text(client.hget(Job.key_for(job_id), "status") or b"") != "failed":
                        raise InvalidRequest(
                            f"job {job_id} cannot be queued again: its prompt is gone, or it was queued meanwhile; "
                            f"radixq dead purge {job_id} takes it off the list",
                            field="id",
                        )
                    pipe.multi()
                    _append_requeue(pipe, client, job_id, now_s, max_bytes)
                    pipe.xdel(keys.DEAD, *entries)
                    pipe.execute()
                    break
                except errors.WatchError:
                    continue
    return list(job_ids)


def purge(client: Redis, job_ids: Sequence[str], max_bytes: int) -> list[str]:
    """Take jobs off the list and delete their prompts; return their ids. Their results stay until they expire.

    Raises:
        InvalidRequest: one of them is not on the list. Those before it are deleted.
    """
    for job_id in job_ids:
        entries = _of(client, job_id)
        with client.pipeline() as pipe:
            if client.hget(Job.key_for(job_id), "status") == b"failed":
                job = Job.fetch(job_id, connection=client, serializer=JobSerializer)
                job.delete(pipeline=pipe)
                pictures.release(pipe, job_id, digests(job, max_bytes), 1)
            pipe.xdel(keys.DEAD, *entries)
            pipe.execute()
    return list(job_ids)


def _append_requeue(pipe: Pipeline, client: Redis, job_id: str, now_s: float, max_bytes: int) -> None:
    job = Job.fetch(job_id, connection=client, serializer=JobSerializer)
    queue = Queue(job.origin, connection=client)
    pipe.zrem(FailedJobRegistry(job.origin, client).key, job_id)
    pipe.hset(job.key, "status", "queued")
    pipe.hdel(job.key, *_ENDED)
    pipe.sadd(Queue.redis_queues_keys, queue.key)
    queue.push_job_id(job_id, pipeline=pipe)
    reopen.append(pipe, client, job_id, job.key, digests(job, max_bytes), now_s)


def _of(client: Redis, job_id: str) -> list[str]:
    """Return the stream's ids of one job's entries."""
    ids = [entry_id for entry_id, entry in _entries(client) if entry.get("job_id") == job_id]
    if not ids:
        raise InvalidRequest(f"no job {job_id!r} was given up; radixq dead list shows those that were", field="id")
    return ids


def _entries(client: Redis) -> Iterator[tuple[str, dict[str, str]]]:
    stream: Any = client.xrange(keys.DEAD)
    for entry_id, fields in stream:
        yield as_text(entry_id), {as_text(name): as_text(value) for name, value in fields.items()}
