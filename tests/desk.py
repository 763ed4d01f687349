"""A worker without a running engine, for tests that take jobs, decide them and look at what is delivered."""

from __future__ import annotations

from typing import Any

from redis import Redis
from rq import Queue
from rq.job import Job
from rq.registry import StartedJobRegistry
from rq.results import Result as RqResult

from common import keys
from common.errors import (
    RadixqError,
)
from common.messages import Usage
from common.serializer import JobSerializer
from common.settings import Settings
from tests.test_drain import Brittle
from worker.app import BatchWorker
from worker.drain import Drain
from worker.flight import Clock, Flight
from worker.pump import Pump
from worker.runner import Runner
from worker.scout import Candidate, Scout
from worker.sequence import Finished

RESULT_TTL_S, PROMPT_TTL_S = 5000, 700


USAGE = Usage(prompt_tokens=9, cached_tokens=4, prefill_tokens=5, completion_tokens=3)


CALLS: list[tuple[str, str]] = []


def listed(job: Job, connection: Redis, *_: object) -> None:
    CALLS.append(("listed", f"{job.id} {job.get_status()}"))


def raising(job: Job, connection: Redis, *_: object) -> None:
    CALLS.append(("raising", job.id))
    raise RuntimeError("a callback of the test")


def foreign(job: Job, connection: Redis, *_: object) -> None:
    CALLS.append(("foreign", job.id))


class Desk:
    """A worker without a running engine: jobs are taken, decided by the test, and delivered."""

    def __init__(self, url: str) -> None:
        client = Brittle.from_url(url)
        assert isinstance(client, Brittle)
        self.client = client
        self.redis = Redis.from_url(url)
        ours = ",".join(f"{__name__}.{function.__name__}" for function in (listed, raising))
        env = {
            "RADIXQ_RESULT_TTL_S": RESULT_TTL_S,
            "RADIXQ_PROMPT_TTL_S": PROMPT_TTL_S,
            "RADIXQ_CALLBACKS": ours,
            "RADIXQ_MAX_JOB_BYTES": "1MB",
        }
        settings = Settings.from_env({name: str(value) for name, value in env.items()})
        self.worker = BatchWorker(["radixq"], connection=client, settings=settings)
        self.worker.register_birth()
        self._scout = Scout(settings, ["radixq"])
        self.pump = Pump(self.worker, settings, "mac", Runner(settings), self._scout)
        self.worker._pump = self.pump
        self.outbox = self.pump.outbox
        self.outbox.model = "tiny"
        self._drain = Drain(self.worker, Clock(), "mac", settings)

    def close(self) -> None:
        self.outbox.close()
        self._scout.close()
        self.redis.close()
        self.client.close()

    def enqueue(self, **options: Any) -> Job:
        body = {"prompt": "once", "custom_id": "mine", "batch_id": "b1", "metadata": {"who": "me"}}
        return Queue("radixq", connection=self.redis, serializer=JobSerializer).enqueue(keys.GENERATE, body, **options)

    def take(self, job: Job) -> Flight:
        ((_, flight),) = self._drain.take([Candidate(job.id, "radixq")], "tiny")
        self.pump.flights[flight.id] = flight
        return flight

    def deliver(self) -> list[Flight]:
        """Flush as the pump does."""
        done = []
        for flight in self.outbox.flush(16):
            done.append(self.pump.flights.pop(flight.id))
        return done

    def finish(self, flight: Flight) -> None:
        self.outbox.put(flight, Finished(flight.id, "a dog", "stop", USAGE, prefill_ms=1.5, decode_ms=20.25))
        self.deliver()

    def fail(self, flight: Flight, error: RadixqError) -> None:
        self.outbox.put(flight, error)
        self.deliver()

    def result(self, job: Job) -> dict[str, str]:
        fields: Any = self.redis.hgetall(keys.result(job.id))
        return {name.decode(): value.decode() for name, value in fields.items()}

    def rq_results(self, job: Job) -> list[Any]:
        return list(RqResult.all(job, serializer=JobSerializer))

    @property
    def waiting(self) -> list[str]:
        listed: Any = self.redis.lrange("rq:queue:radixq", 0, -1)
        return [job_id.decode() for job_id in listed]

    @property
    def leases(self) -> int:
        return self.redis.zcard("rq:wip:radixq")


def expire(desk: Desk, job: Job) -> None:
    """Let the lease of a job end, and RQ's own maintenance find it, as `rq info` does."""
    registry = StartedJobRegistry("radixq", connection=desk.redis, serializer=JobSerializer)
    members: Any = desk.redis.zrange(registry.key, 0, -1)
    desk.redis.zadd(registry.key, dict.fromkeys(members, 1))
    registry.cleanup()
