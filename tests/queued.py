"""Jobs that wait in Redis, as a scout finds them."""

from __future__ import annotations

from typing import Any

from redis import Redis
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer

from common import keys


def queue_of(redis: Redis, name: str = keys.DEFAULT_QUEUE) -> Queue:
    return Queue(name, connection=redis, serializer=JSONSerializer)


def enqueue(redis: Redis, *prompts: str, queue: str = keys.DEFAULT_QUEUE, **fields: Any) -> list[Job]:
    jobs = [Queue.prepare_data(keys.GENERATE, ({"prompt": prompt, **fields},)) for prompt in prompts]
    return queue_of(redis, queue).enqueue_many(jobs)


def claim(redis: Redis, job_id: str) -> None:
    assert redis.lrem(queue_of(redis).key, 1, job_id) == 1


def calls(redis: Redis, command: str) -> int:
    """Count how often the server was asked for this."""
    stats: dict[str, dict[str, int]] = redis.info("commandstats")
    return stats.get(f"cmdstat_{command}", {"calls": 0})["calls"]
