"""Taking jobs out of RQ's queues and putting them back, on a real server, in the process of the test."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from redis import Redis
from redis.client import Pipeline
from redis.exceptions import ConnectionError, OutOfMemoryError, ResponseError
from rq import Queue, Retry
from rq.job import Job, JobStatus
from rq.registry import StartedJobRegistry

from common import keys
from common.serializer import JobSerializer
from common.settings import Settings
from worker.app import BatchWorker
from worker.drain import Drain
from worker.flight import Clock, Flight
from worker.job import FIELD_BYTES
from worker.leases import cancelled, renew
from worker.scout import Candidate
from worker.suspects import Suspicion

WINDOW = 50
SETTINGS = Settings.from_env({"RADIXQ_WINDOW_JOBS": str(WINDOW)})
Result = dict[str, str]


class Brittle(Redis):
    """A real client that loses its connection at the n-th transaction or script, before or after the server ran it.

    It can also let somebody else act between what a transaction has watched and looked at, and its beginning.
    """

    breaks_at = 0
    answered = False  # the server ran it; only the answer is lost
    meddle: Callable[[], object] | None = None  # done once, when the next transaction begins

    def pipeline(self, transaction: Any = True, shard_hint: Any = None) -> Any:
        return _BrittlePipeline(self, transaction, shard_hint)

    def evalsha(self, sha: str, numkeys: int, *words: Any) -> Any:
        if self.breaks_at != 1 or self.answered:
            answer = super().evalsha(sha, numkeys, *words)  # unless the server does not know the script yet
        self.breaks_at -= 1
        if self.breaks_at == 0:
            raise ConnectionError("cut by the test")
        return answer


class _BrittlePipeline(Pipeline):
    def __init__(self, client: Brittle, transaction: Any, shard_hint: Any) -> None:
        super().__init__(client.connection_pool, client.response_callbacks, transaction, shard_hint)
        self._client = client
        self._breakable = bool(transaction)

    def multi(self) -> None:
        meddle, self._client.meddle = self._client.meddle, None
        if meddle is not None:
            meddle()
        super().multi()

    def execute(self, raise_on_error: bool = True) -> list[Any]:
        self._client.breaks_at -= self._breakable
        if not self._breakable or self._client.breaks_at != 0:
            return super().execute(raise_on_error)
        if self._client.answered:
            super().execute(raise_on_error)
        self.reset()
        raise ConnectionError("cut by the test")


@pytest.fixture
def client(redis_url: str) -> Iterator[Brittle]:
    with Brittle.from_url(redis_url) as client:
        assert isinstance(client, Brittle)
        yield client


@pytest.fixture
def worker(client: Brittle) -> BatchWorker:
    worker = BatchWorker(["first", "second"], connection=client, settings=Settings.from_env({}))
    worker.register_birth()
    return worker


@pytest.fixture
def drain(worker: BatchWorker) -> Drain:
    return Drain(worker, Clock(), "mac", SETTINGS)


@pytest.fixture
def enqueue(redis: Redis) -> Callable[..., list[Job]]:
    def enqueue(number: int, queue: str = "first", **options: Any) -> list[Job]:
        named = Queue(queue, connection=redis, serializer=JobSerializer)
        return [named.enqueue(keys.GENERATE, {"prompt": f"{queue} {i}"}, **options) for i in range(number)]

    return enqueue


def offers(jobs: list[Job]) -> list[Candidate]:
    return [Candidate(job.id, job.origin) for job in jobs]


def take(drain: Drain, jobs: list[Job]) -> list[Flight]:
    return [flight for _, flight in drain.take(offers(jobs), "tiny")]


def waiting(redis: Redis, queue: str = "first") -> list[str]:
    listed: Any = redis.lrange(f"rq:queue:{queue}", 0, -1)
    return [job_id.decode() for job_id in listed]


def result(redis: Redis, job: Job) -> Result:
    fields: Any = redis.hgetall(keys.result(job.id))
    return {name.decode(): value.decode() for name, value in fields.items()}


def started(redis: Redis, queue: str = "first") -> list[str]:
    return StartedJobRegistry(queue, connection=redis).get_job_ids(cleanup=False)


def ids(jobs: list[Job]) -> list[str]:
    return [job.id for job in jobs]


def test_taken_jobs_run_in_rqs_books_and_in_the_readable_hash(
    drain: Drain, worker: BatchWorker, redis: Redis, enqueue: Callable[..., list[Job]]
) -> None:
    jobs = enqueue(3) + enqueue(1, "second")
    flights = take(drain, jobs)
    assert [flight.job.id for flight in flights] == ids(jobs)
    assert waiting(redis) == waiting(redis, "second") == []
    assert sorted(started(redis)) == sorted(ids(jobs[:3]))
    assert started(redis, "second") == [jobs[3].id]
    assert all(job.get_status() == JobStatus.STARTED for job in jobs)
    assert len(worker.get_current_executions(refresh=True)) == 4
    assert redis.hget(worker.key, "state") == b"busy"
    fields = result(redis, jobs[0])
    assert (fields["status"], fields["worker"], fields["model"], fields["attempts"]) == ("running", "mac", "tiny", "1")
    assert fields["submitted_at"] <= fields["started_at"]


def test_the_time_that_the_producer_wrote_is_kept(
    drain: Drain, redis: Redis, enqueue: Callable[..., list[Job]]
) -> None:
    jobs = enqueue(1)
    redis.hset(keys.result(jobs[0].id), "submitted_at", "2026-01-02T03:04:05.678Z")
    (flight,) = take(drain, jobs)
    assert result(redis, jobs[0])["submitted_at"] == "2026-01-02T03:04:05.678Z"
    assert flight.submitted_at == pytest.approx(1767323045.678)


@pytest.mark.parametrize("says", ["the record", "RQ"])
def test_a_job_was_submitted_before_it_started_also_where_its_producers_clock_is_ahead(
    says: str, drain: Drain, redis: Redis, enqueue: Callable[..., list[Job]]
) -> None:
    jobs = enqueue(1)
    if says == "RQ":
        redis.hset(jobs[0].key, "enqueued_at", "2126-01-02T03:04:05.000000Z")
    else:
        redis.hset(keys.result(jobs[0].id), "submitted_at", "2126-01-02T03:04:05.678Z")
    (flight,) = take(drain, jobs)
    assert flight.submitted_at == flight.started_at == pytest.approx(time.time(), abs=60)


def test_a_job_that_another_worker_took_is_not_taken_again(
    drain: Drain, redis: Redis, enqueue: Callable[..., list[Job]]
) -> None:
    jobs = enqueue(3)
    redis.lmove("rq:queue:first", "rq:queue:first:intermediate")
    assert [flight.job.id for flight in take(drain, jobs)] == ids(jobs[1:])
    assert waiting(redis, "first:intermediate") == [jobs[0].id]


def test_a_job_behind_the_window_stays(drain: Drain, redis: Redis, enqueue: Callable[..., list[Job]]) -> None:
    jobs = enqueue(WINDOW + 1)
    assert take(drain, jobs[-1:]) == []
    assert len(waiting(redis)) == WINDOW + 1
    assert len(take(drain, jobs[-2:-1])) == 1


def test_an_id_that_was_queued_twice_runs_once(drain: Drain, redis: Redis, enqueue: Callable[..., list[Job]]) -> None:
    (job,) = enqueue(1)
    redis.rpush("rq:queue:first", job.id)
    (flight,) = take(drain, [job])
    assert take(drain, [job]) == []
    assert len(started(redis)) == 1
    assert waiting(redis) == []
    assert [entry.execution for entry in drain.ledger.entries()] == [flight.id]


@pytest.mark.parametrize("status", ["finished", "failed", "stopped", "canceled"])
def test_an_id_whose_job_has_ended_leaves_the_queue(
    drain: Drain, redis: Redis, enqueue: Callable[..., list[Job]], status: str
) -> None:
    (job,) = enqueue(1)
    redis.hset(job.key, "status", status)
    assert take(drain, [job]) == []
    assert redis.hget(job.key, "status") == status.encode()
    assert waiting(redis) == []
    assert drain.ledger.entries() == []


def test_a_job_that_became_a_suspect_after_it_was_offered_goes_back(
    drain: Drain, redis: Redis, enqueue: Callable[..., list[Job]]
) -> None:
    jobs = enqueue(2)
    redis.hset(keys.SUSPECTS, jobs[0].id, str(Suspicion(limit=1)))
    assert [flight.job.id for flight in take(drain, jobs)] == [jobs[1].id]
    assert waiting(redis) == [jobs[0].id]
    assert started(redis) == [jobs[1].id]
    ((_, flight),) = drain.take([Candidate(jobs[0].id, "first", limit=1)], "tiny")
    assert flight.limit == 1


def test_an_id_whose_job_is_gone_leaves_the_lists(
    drain: Drain, redis: Redis, enqueue: Callable[..., list[Job]]
) -> None:
    jobs = enqueue(2)
    redis.delete(jobs[0].key)
    assert [flight.job.id for flight in take(drain, jobs)] == [jobs[1].id]
    assert waiting(redis) == []


@pytest.mark.parametrize("damage", [{"timeout": "soon"}, {"created_at": "then"}, {"retries_left": "x"}])
def test_a_job_whose_hash_is_damaged_is_taken_nevertheless(
    drain: Drain, redis: Redis, enqueue: Callable[..., list[Job]], damage: dict[Any, Any]
) -> None:
    jobs = enqueue(2)
    redis.hset(jobs[0].key, mapping=damage)
    assert [flight.job.id for flight in take(drain, jobs)] == ids(jobs)


@pytest.mark.parametrize("attempts", ["abc", "1.5", "", "007", "9223372036854775807"])
def test_attempts_that_are_no_number_fail_their_job_and_no_other(
    drain: Drain, redis: Redis, enqueue: Callable[..., list[Job]], attempts: str
) -> None:
    strange, plain = enqueue(2)
    redis.hset(keys.result(strange.id), "attempts", attempts)
    redis.hset(keys.result(plain.id), "attempts", -1)
    assert [flight.job.id for flight in take(drain, [strange, plain])] == [plain.id]
    fields = result(redis, strange)
    assert (fields["status"], fields["attempts"]) == ("failed", "0")
    assert "attempts are no number" in fields["error_message"]


def test_jobs_are_handed_back_to_the_head_in_the_order_they_had(
    drain: Drain, worker: BatchWorker, redis: Redis, enqueue: Callable[..., list[Job]]
) -> None:
    jobs = enqueue(5)
    for _ in range(2):  # the second time too: handing back must not look like enqueueing
        flights = take(drain, [jobs[2], jobs[0], jobs[1]])
        assert drain.hand_back(flights) == 3
        assert waiting(redis) == ids(jobs)
    assert started(redis) == []
    assert worker.get_current_executions(refresh=True) == []
    fields = result(redis, jobs[0])
    assert fields["status"] == "queued"
    assert not fields.keys() & {"started_at", "worker", "model"}
    assert all(job.get_status() == JobStatus.QUEUED for job in jobs)
    assert [flight.attempts for flight in take(drain, jobs[:1])] == [1]  # nothing failed


def test_jobs_enqueued_at_the_same_time_are_handed_back_in_the_order_they_ran(
    drain: Drain, redis: Redis, enqueue: Callable[..., list[Job]]
) -> None:
    jobs = enqueue(3)
    for job in jobs:
        redis.hset(job.key, "enqueued_at", "2026-01-02T03:04:05.000000Z")
    assert drain.hand_back(take(drain, jobs)) == 3
    assert waiting(redis) == ids(jobs)


def test_a_job_that_was_taken_away_or_cancelled_is_not_handed_back(
    drain: Drain, redis: Redis, enqueue: Callable[..., list[Job]]
) -> None:
    jobs = enqueue(3)
    flights = take(drain, jobs)
    redis.zrem("rq:wip:first", flights[0].execution.composite_key)
    jobs[1].cancel()
    assert drain.hand_back(flights) == 1
    assert waiting(redis) == [jobs[2].id]


@pytest.mark.parametrize("answered", [False, True], ids=["before the server ran it", "before its answer came"])
def test_a_connection_that_breaks_while_jobs_are_started_loses_none(
    drain: Drain, client: Brittle, redis: Redis, enqueue: Callable[..., list[Job]], answered: bool
) -> None:
    jobs = enqueue(4)
    client.breaks_at, client.answered = 1, answered
    with pytest.raises(ConnectionError):
        take(drain, jobs[:3])
    assert drain.unsure
    drain.settle()
    assert not drain.unsure
    assert waiting(redis) == ids(jobs)
    assert started(redis) == []
    assert drain.ledger.entries() == []
    assert [flight.job.id for flight in take(drain, jobs)] == ids(jobs)


def test_a_script_that_fails_half_way_leaves_the_jobs_it_did_not_start_in_their_queue(
    drain: Drain, redis: Redis, enqueue: Callable[..., list[Job]]
) -> None:
    jobs = enqueue(3)
    redis.set("rq:wip:first", "no registry")
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        take(drain, jobs)
    assert waiting(redis) == ids(jobs)


def test_a_full_server_starts_nothing(drain: Drain, redis: Redis, enqueue: Callable[..., list[Job]]) -> None:
    jobs = enqueue(3)
    redis.config_set("maxmemory", 1)
    try:
        with pytest.raises(OutOfMemoryError):
            take(drain, jobs)
        assert drain.unsure
        assert [job.get_status() for job in jobs] == [JobStatus.QUEUED] * 3
        assert not redis.exists(*(keys.result(job.id) for job in jobs))
    finally:
        redis.config_set("maxmemory", 0)
    assert waiting(redis) == ids(jobs)
    assert [flight.job.id for flight in take(drain, jobs)] == ids(jobs)


@pytest.mark.parametrize("size", [100, 100_000])  # read at once, or field by field
def test_a_field_of_any_size_leaves_the_others_as_they_are(
    drain: Drain, redis: Redis, enqueue: Callable[..., list[Job]], size: int
) -> None:
    (job,) = enqueue(1, job_timeout=77, description="d" * size)
    (flight,) = take(drain, [job])
    assert flight.job.timeout == 77
    assert flight.job.description == ("d" * size if size < FIELD_BYTES else "")
    assert flight.job.packed == redis.hget(job.key, "data")
    assert flight.job.started_at is not None


def test_the_deadline_of_a_job_is_its_own_timeout(drain: Drain, enqueue: Callable[..., list[Job]]) -> None:
    short, unlimited = enqueue(1, job_timeout=5) + enqueue(1, job_timeout=-1)
    flights = take(drain, [short, unlimited])
    assert flights[0].deadline < float("inf")
    assert flights[1].deadline == float("inf")


def test_renewing_keeps_what_runs_even_after_rq_forgot_the_worker(
    drain: Drain, worker: BatchWorker, redis: Redis, enqueue: Callable[..., list[Job]]
) -> None:
    flights = take(drain, enqueue(2, retry=Retry(1)))
    redis.delete(worker.key, worker.executions_key, flights[0].execution.key)
    redis.srem("rq:workers", worker.key)
    redis.zadd("rq:wip:first", {flight.execution.composite_key: 1 for flight in flights})  # long expired
    assert renew(worker, drain.ledger, flights) == []
    StartedJobRegistry("first", connection=redis).cleanup()
    assert len(started(redis)) == 2
    assert redis.sismember("rq:workers", worker.key)
    assert len(worker.get_current_executions(refresh=True)) == 2
    assert redis.hget(worker.key, "state") == b"busy"


def test_renewing_names_what_was_lost_and_does_not_bring_it_back(
    drain: Drain, worker: BatchWorker, redis: Redis, enqueue: Callable[..., list[Job]]
) -> None:
    flights = take(drain, enqueue(2))
    redis.zrem("rq:wip:first", flights[0].execution.composite_key)
    redis.delete(flights[0].execution.key)
    assert renew(worker, drain.ledger, flights) == flights[:1]
    assert not redis.exists(flights[0].execution.key)


def test_cancelled_and_deleted_jobs_are_noticed_while_they_run(
    drain: Drain, worker: BatchWorker, enqueue: Callable[..., list[Job]]
) -> None:
    jobs = enqueue(3)
    flights = take(drain, jobs)
    jobs[0].cancel()
    jobs[2].delete()
    assert cancelled(worker, flights) == [flights[0], flights[2]]


def test_a_worker_adds_the_queues_of_its_models_names_behind_those_it_was_given(redis: Redis) -> None:
    env = {"MLX_MODEL_PATH": "owner/name", "RADIXQ_MODEL_ALIASES": "small, first"}
    worker = BatchWorker(["urgent", "radixq.small"], connection=redis, settings=Settings.from_env(env))
    assert worker.queue_names() == ["urgent", "radixq.small", "radixq.owner/name", "radixq.first"]
