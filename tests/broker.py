"""A database of a real server as producers and onlookers see it.

Knows RQ's and our keys; knows nothing of how a worker works.
"""

from __future__ import annotations

import time
from typing import Any

from redis import Redis
from rq import Queue
from rq.job import Job
from rq.results import Result as RqResult
from rq.worker import Worker

from common import keys
from common.serializer import JobSerializer
from tests.processes import Process, wait_until

ENDLESS = 90_000
SHORT = 6
ROWS = {"RADIXQ_MAX_ROWS": "4", "RADIXQ_WORKER_NAME": "mac"}
Fields = dict[str, str]


class Broker:
    """A database of a real server, with what a producer and an onlooker do there."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.redis = Redis.from_url(url)
        self.workers: list[Process] = []

    def enqueue(self, tokens: int = SHORT, queue: str = keys.DEFAULT_QUEUE, **options: Any) -> Job:
        body = {"prompt": f"a secret {time.monotonic_ns()}", "sampling": {"max_tokens": tokens}}
        return self.enqueue_raw(body | options.pop("body", {}), queue, **options)

    def enqueue_raw(self, body: Any, queue: str = keys.DEFAULT_QUEUE, **options: Any) -> Job:
        return Queue(queue, connection=self.redis, serializer=JobSerializer).enqueue(keys.GENERATE, body, **options)

    def result(self, job: Job) -> Fields:
        fields: Any = self.redis.hgetall(keys.result(job.id))
        return {name.decode(): value.decode() for name, value in fields.items()}

    def status(self, job: Job) -> str:
        return self.result(job).get("status", "")

    def wait_for(self, status: str, *jobs: Job) -> None:
        def reached() -> bool:
            assert not any(worker.popen.poll() for worker in self.workers), "a worker failed, see its log"
            return all(self.status(job) == status for job in jobs)

        wait_until(reached, f"{len(jobs)} jobs are {status}")

    def waiting(self, queue: str = keys.DEFAULT_QUEUE) -> list[str]:
        listed: Any = self.redis.lrange(f"rq:queue:{queue}", 0, -1)
        return [job_id.decode() for job_id in listed]

    def metrics(self, label: str = "mac") -> Fields:
        fields: Any = self.redis.hgetall(keys.metrics(label))
        return {name.decode(): value.decode() for name, value in fields.items()}

    def listed(self) -> list[Fields]:
        """Return what `radixq:dead` holds, oldest first."""
        entries: Any = self.redis.xrange(keys.DEAD)
        return [{name.decode(): value.decode() for name, value in fields.items()} for _, fields in entries]

    def num_results(self, job: Job) -> int:
        return RqResult.count(job)

    def assert_settled(self, *queues: str) -> None:
        """Assert that nobody holds anything any more: no lease, no claim, no suspicion, no ledger."""
        for queue in queues or (keys.DEFAULT_QUEUE,):
            assert self.waiting(queue) == self.waiting(f"{queue}:intermediate") == []
            assert self.redis.zcard(f"rq:wip:{queue}") == 0
        left = [key for name in (keys.FLIGHTS, keys.SUSPECTS) for key in self.redis.scan_iter(f"{name}*")]
        assert left == []

    @property
    def worker(self) -> Worker:
        (worker,) = Worker.all(connection=self.redis)
        assert isinstance(worker, Worker)
        return worker

    def wait_for_state(self, state: str) -> None:
        def states() -> list[str]:
            return [str(worker.get_state().removeprefix("WorkerStatus.")) for worker in Worker.all(self.redis)]

        wait_until(lambda: states() == [state], f"the only worker is {state}")
