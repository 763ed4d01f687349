"""What a submit promises about keys, lengths and parents, on a real server, also when several happen at once."""

from __future__ import annotations

import asyncio
import math
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from redis import ConnectionPool, Redis
from redis import exceptions as redis_errors
from redis.connection import Connection
from rq import Queue
from rq.job import Job, JobStatus

from common import keys
from common.errors import GenerationFailed, InvalidRequest, QueueFull
from common.serializer import JobSerializer
from producer import Ticket, asubmit, asubmit_many, get, submit, submit_many

QUEUE = "rq:queue:radixq"


def end(redis: Redis, ticket: Ticket, status: str) -> None:
    """Let a job end as far as producers can see."""
    redis.lrem(QUEUE, 0, ticket.id)
    redis.hset(f"rq:job:{ticket.id}", "status", {"cancelled": "canceled", "expired": "failed"}.get(status, status))
    redis.hset(keys.result(ticket.id), "status", status)


# --- idempotency -----------------------------------------------------------------------------------------------------


def test_two_submits_with_one_key_are_one_job(redis: Redis) -> None:
    first = submit("a", idempotency_key="k", max_tokens=5, redis=redis)
    second = submit("a", idempotency_key="k", max_tokens=5, timeout_s=9, redis=redis)
    assert first.id == second.id
    assert redis.lrange(QUEUE, 0, -1) == [first.id.encode()]
    assert redis.get("radixq:idempotency:k") == first.id.encode()


def test_a_hundred_submits_at_once_with_one_key_are_one_job(redis_url: str, redis: Redis) -> None:
    gate = threading.Barrier(16)

    def race(number: int) -> str:
        if number < 16:
            gate.wait()
        return submit("a", idempotency_key="k", redis=Redis.from_url(redis_url)).id

    with ThreadPoolExecutor(16) as threads:
        ids = set(threads.map(race, range(100)))
    assert len(ids) == 1
    assert redis.llen(QUEUE) == 1
    assert len(redis.keys("rq:job:*")) == 1


@pytest.mark.parametrize("status", ["finished", "failed", "cancelled", "expired"])
def test_a_key_holds_after_the_job_ended_in_whatever_way(redis: Redis, status: str) -> None:
    first = submit("a", idempotency_key="k", redis=redis)
    end(redis, first, status)
    assert submit("a", idempotency_key="k", redis=redis).id == first.id
    redis.delete(f"rq:job:{first.id}")  # RQ's hash, with the prompt, goes sooner than our result
    assert submit("a", idempotency_key="k", redis=redis).id == first.id
    assert redis.llen(QUEUE) == 0


def test_a_key_is_free_again_once_its_result_is_gone(redis: Redis) -> None:
    first = submit("a", idempotency_key="k", redis=redis)
    redis.lrem(QUEUE, 0, first.id)
    redis.delete(f"rq:job:{first.id}", keys.result(first.id))
    second = submit("b", idempotency_key="k", redis=redis)
    assert second.id != first.id
    assert redis.lrange(QUEUE, 0, -1) == [second.id.encode()]


def test_a_key_ends_with_the_result_of_a_cancelled_job(redis: Redis) -> None:
    ticket = submit("a", idempotency_key="k", redis=redis)
    assert redis.ttl("radixq:idempotency:k") == -1
    assert ticket.cancel()
    assert redis.ttl("radixq:idempotency:k") == redis.ttl(keys.result(ticket.id)) > 0


@pytest.mark.parametrize("other", [{"text": "b"}, {"max_tokens": 5}, {"queue": "q"}, {"metadata": {"a": "b"}}])
def test_one_key_for_two_requests_is_refused(redis: Redis, other: dict[str, Any]) -> None:
    first = submit("a", idempotency_key="k", redis=redis)
    with pytest.raises(
        InvalidRequest, match=f"idempotency_key='k' belongs to job {first.id}, which asks for some"
    ) as e:
        submit(**{"text": "a", **other}, idempotency_key="k", redis=redis)
    assert e.value.field == "idempotency_key"
    assert len(redis.keys("rq:job:*")) == 1


def test_what_may_differ_between_repetitions_is_no_conflict(redis: Redis) -> None:
    def again(**more: Any) -> str:
        return submit("a", idempotency_key="k", redis=redis, **more).id

    ids = {again(expires_at=100), again(expires_at=200), again(), again(timeout_s=7), again(max_queue_length=1)}
    assert len(ids) == 1


def test_keys_in_a_list_make_one_job_each(redis: Redis) -> None:
    jobs = [{"text": text, "idempotency_key": key} for text, key in [("a", "1"), ("b", "2"), ("a", "1")]]
    first, second, again = submit_many(jobs, redis=redis)
    assert (again.id, first.id != second.id) == (first.id, True)
    assert [ticket.id for ticket in submit_many([*jobs, "c"], redis=redis)][:3] == [first.id, second.id, first.id]
    assert redis.llen(QUEUE) == 3


def test_keys_in_a_list_that_disagree_are_refused_with_both_places(redis: Redis) -> None:
    jobs = [{"text": text, "idempotency_key": "k"} for text in ("a", "b")]
    with pytest.raises(InvalidRequest, match=r"^jobs\[1\]: idempotency_key='k' belongs to jobs\[0\]"):
        submit_many(jobs, redis=redis)
    assert redis.dbsize() == 0


class Unreliable(Connection):
    """A connection that loses the answer to one script, or whose script arrives only after its repetition."""

    loses: str | None = None
    late: Callable[[], None] | None = None

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        kind, loses = type(self), type(self).loses
        if loses is None or b"EVAL" not in b"".join(command):
            super().send_packed_command(command, check_health=check_health)  # type: ignore[no-untyped-call]
            return
        kind.loses = None
        if loses == "answer":
            super().send_packed_command(command, check_health=check_health)  # type: ignore[no-untyped-call]
            self.read_response()
        else:
            wire = b"".join(command)
            kind.late = staticmethod(lambda: _deliver(self, wire))
        self.disconnect()  # type: ignore[no-untyped-call]
        raise redis_errors.ConnectionError("the network is gone")


def _deliver(connection: Connection, wire: bytes) -> None:
    other = Connection(  # type: ignore[no-untyped-call]
        host=connection.host, port=connection.port, db=connection.db
    )
    other.connect()  # type: ignore[no-untyped-call]
    other.send_packed_command([wire])  # type: ignore[no-untyped-call]
    other.read_response()
    other.disconnect()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("key", [None, "k"])
@pytest.mark.parametrize("loses", ["answer", "time"])
def test_a_connection_that_breaks_under_a_submit_queues_the_job_once(
    redis_url: str, redis: Redis, loses: str, key: str | None, named: bool
) -> None:
    client = Redis(connection_pool=ConnectionPool.from_url(redis_url, connection_class=Unreliable))
    Unreliable.loses = loses
    jobs: list[Any] = [{"text": "a", "idempotency_key": key, "job_id": "one" if named else None}, "b"]
    tickets = submit_many(jobs, redis=client)
    if loses == "time":
        assert Unreliable.late
        Unreliable.late()  # what the network held back arrives after all
    assert redis.lrange(QUEUE, 0, -1) == [ticket.id.encode() for ticket in tickets]
    assert len(redis.keys("rq:job:*")) == 2
    assert not named or tickets[0].id == "one"


# --- backpressure ----------------------------------------------------------------------------------------------------


def test_a_full_queue_refuses_with_its_length(redis: Redis) -> None:
    submit_many(["a", "b", "c"], redis=redis, max_queue_length=3)
    with pytest.raises(QueueFull, match="'radixq' holds 3 waiting jobs, and max_queue_length is 3") as full:
        submit("d", redis=redis, max_queue_length=3)
    assert (full.value.queue, full.value.length, full.value.retry) == ("radixq", 3, True)
    assert redis.llen(QUEUE) == 3
    submit("d", redis=redis, max_queue_length=4)


def test_a_list_that_would_overflow_is_refused_whole_whatever_its_chunks(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["producer.submit"], "CHUNK_JOBS", 2)
    submit("first", redis=redis)
    with pytest.raises(QueueFull, match="holds 1 waiting job"):
        submit_many(["x"] * 5, redis=redis, max_queue_length=5)
    assert redis.llen(QUEUE) == 1
    submit_many(["x"] * 5, redis=redis, max_queue_length=6)


def test_a_hundred_submits_at_once_never_overfill(redis_url: str, redis: Redis) -> None:
    def one(number: int) -> bool:
        try:
            submit("a", max_queue_length=10, redis=Redis.from_url(redis_url))
        except QueueFull:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(one, range(100))) == 10
    assert redis.llen(QUEUE) == 10


def test_a_repeated_submit_is_answered_though_the_queue_is_full(redis: Redis) -> None:
    ticket = submit("a", idempotency_key="k", max_queue_length=1, redis=redis)
    assert submit("a", idempotency_key="k", max_queue_length=1, redis=redis).id == ticket.id


# --- parents ---------------------------------------------------------------------------------------------------------


def test_a_job_with_a_parent_is_deferred_the_way_rq_does_it(redis: Redis) -> None:
    parent = submit("parent", redis=redis)
    child = submit("child", depends_on=parent, redis=redis)
    assert redis.lrange(QUEUE, 0, -1) == [parent.id.encode()]
    job = Job.fetch(child.id, redis, JobSerializer)
    assert (job.get_status(), job.dependency_ids) == (JobStatus.DEFERRED, [parent.id])
    queue = Queue("radixq", connection=redis, serializer=JobSerializer)
    assert queue.deferred_job_registry.get_job_ids() == [child.id]
    assert redis.zscore(queue.deferred_job_registry.key, child.id) == job.created_at.timestamp()
    assert child.status() == "queued"
    parent_job = Job.fetch(parent.id, redis, JobSerializer)
    assert parent_job.dependent_ids == [child.id]
    parent_job.set_status(JobStatus.FINISHED)
    queue.enqueue_dependents(parent_job)
    assert redis.lrange(QUEUE, 0, -1) == [parent.id.encode(), child.id.encode()]


def test_a_job_whose_parents_are_finished_goes_straight_into_the_queue(redis: Redis) -> None:
    parents = submit_many(["a", "b"], redis=redis)
    for parent in parents:
        end(redis, parent, "finished")
    redis.delete(f"rq:job:{parents[0].id}")  # its prompt is kept for an hour only, its result for a week
    child = submit("child", depends_on=[parent.id for parent in parents], redis=redis)
    assert redis.lrange(QUEUE, 0, -1) == [child.id.encode()]


def test_jobs_of_one_list_may_depend_on_one_another_backwards_only(redis: Redis) -> None:
    submit_many([{"text": "a", "job_id": "a"}, {"text": "b", "job_id": "b", "depends_on": "a"}], redis=redis)
    assert redis.lrange(QUEUE, 0, -1) == [b"a"]
    assert Job.fetch("b", redis, JobSerializer).get_status() == JobStatus.DEFERRED
    with pytest.raises(InvalidRequest, match=r"depends_on='d': no job has this id"):
        submit_many([{"text": "c", "depends_on": "d"}, {"text": "d", "job_id": "d"}], redis=redis)
    assert not redis.exists("rq:job:d")


def test_a_deferred_job_can_be_cancelled(redis: Redis) -> None:
    parent = submit("parent", redis=redis)
    child = submit("child", depends_on=parent, redis=redis)
    assert child.cancel()
    assert child.status() == "cancelled"
    assert redis.zcard("rq:deferred:radixq") == 0


# --- time ------------------------------------------------------------------------------------------------------------


def test_expires_at_is_absolute_on_the_wire_and_raises_v_only_where_it_is_used(redis: Redis) -> None:
    moment = datetime.now(UTC) + timedelta(hours=1)
    tickets = submit_many([{"text": "a", "expires_at": moment}, {"text": "a", "expires_at": 3600}, "a"], redis=redis)
    jobs: list[Any] = [Job.fetch(ticket.id, redis, JobSerializer).args[0] for ticket in tickets]
    assert [job["v"] for job in jobs] == [2, 2, 1]
    assert jobs[0]["expires_at"] == moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    late_s = (datetime.fromisoformat(jobs[1]["expires_at"]) - moment).total_seconds()
    assert math.isclose(late_s, 0, abs_tol=60)
    assert "expires_at" not in jobs[2]


def test_a_waiting_job_reads_as_expired_once_its_time_is_over_though_no_worker_is_there(redis: Redis) -> None:
    late = submit("late", expires_at=datetime.now(UTC) - timedelta(seconds=1), redis=redis)
    parent = submit("parent", redis=redis)
    deferred = submit("child", depends_on=parent, expires_at=datetime.now(UTC) - timedelta(seconds=1), redis=redis)
    early = submit("early", expires_at=3600, redis=redis)
    assert (late.status(), deferred.status(), early.status()) == ("expired", "expired", "queued")
    with pytest.raises(GenerationFailed, match="had not started at its expires_at") as failed:
        late.result(timeout_s=5)
    assert (failed.value.code, failed.value.status) == ("expired", "expired")


def test_the_asyncio_variants_take_the_same_fields(redis: Redis) -> None:
    async def both() -> list[Ticket]:
        parent = await asubmit("a", idempotency_key="k", expires_at=60, redis=redis)
        again = await asubmit("a", idempotency_key="k", redis=redis)
        return [parent, again, *await asubmit_many(["b"], depends_on=parent, max_queue_length=9, redis=redis)]

    parent, again, child = asyncio.run(both())
    assert parent.id == again.id
    assert get(child.id, redis=redis).status() == "queued"
    assert redis.lrange(QUEUE, 0, -1) == [parent.id.encode()]


def test_callback_names_travel_in_rqs_own_fields(redis: Redis) -> None:
    ticket = submit("a", on_success="mine.done", on_failure="mine.failed", on_stopped="mine.ended", redis=redis)
    fields = ["success_callback_name", "failure_callback_name", "stopped_callback_name"]
    assert redis.hmget(f"rq:job:{ticket.id}", fields) == [b"mine.done", b"mine.failed", b"mine.ended"]
