"""Results that are no longer ours to write, or whose writing breaks off: written once, or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
from pydantic_core import PydanticSerializationError
from redis.exceptions import ConnectionError, OutOfMemoryError
from rq import Retry
from rq.job import Job, JobStatus

from common.errors import (
    InvalidRequest,
    OutOfMemory,
)
from common.serializer import JobSerializer
from tests.desk import USAGE, Desk, expire
from worker.scout import Candidate
from worker.sequence import Finished


def test_a_result_whose_lease_was_lost_is_dropped(desk: Desk) -> None:
    job = desk.enqueue()
    flight = desk.take(job)
    desk.redis.zrem("rq:wip:radixq", flight.execution.composite_key)
    desk.finish(flight)
    assert desk.result(job)["status"] == "running"  # whoever has it now will write
    assert desk.rq_results(job) == []
    assert desk.pump.flights == {}
    assert not desk.redis.exists(flight.execution.key)


@pytest.mark.parametrize("how", ["cancel", "delete"])
def test_a_job_cancelled_in_flight_ends_as_cancelled_in_no_other_registry(desk: Desk, how: str) -> None:
    job = desk.enqueue()
    flight = desk.take(job)
    getattr(job, how)()
    desk.finish(flight)
    fields = desk.result(job)
    assert (fields["status"], fields["error_code"]) == ("cancelled", "cancelled")
    assert "text" not in fields
    assert desk.leases == 0
    assert desk.redis.zscore("rq:finished:radixq", job.id) is None
    assert desk.redis.exists(job.key) == (how == "cancel")
    assert not desk.redis.exists(flight.execution.key)


@pytest.mark.parametrize("answered", [False, True], ids=["before the server ran it", "before its answer came"])
@pytest.mark.parametrize("outcome", ["finish", "fail", "retry"])
def test_a_connection_that_breaks_at_delivery_delivers_once(desk: Desk, outcome: str, answered: bool) -> None:
    job = desk.enqueue(retry=Retry(2))
    flight = desk.take(job)
    error = OutOfMemory("full") if outcome == "retry" else InvalidRequest("wrong")
    desk.client.breaks_at, desk.client.answered = 1, answered
    with contextlib.suppress(ConnectionError):
        desk.finish(flight) if outcome == "finish" else desk.fail(flight, error)
    assert desk.outbox.waits
    desk.deliver()
    assert not desk.outbox.waits
    assert (desk.outbox.jobs_finished, desk.outbox.jobs_failed) == (outcome == "finish", outcome == "fail")
    assert desk.result(job)["status"] == {"finish": "finished", "fail": "failed", "retry": "queued"}[outcome]
    assert len(desk.rq_results(job)) == (outcome != "retry")
    assert desk.waiting == ([job.id] if outcome == "retry" else [])
    job = Job.fetch(job.id, desk.redis, JobSerializer)
    assert job.retries_left == {"finish": 2, "fail": 0, "retry": 1}[outcome]


_MEDDLING: dict[str, Callable[[Desk, Job], object]] = {
    "rq info": expire,
    "cancel": lambda desk, job: job.cancel(),
    "delete": lambda desk, job: job.delete(),
}


@pytest.mark.parametrize("retries", [0, 1])
@pytest.mark.parametrize("outcome", ["finish", "fail"])
@pytest.mark.parametrize("how", _MEDDLING)
def test_a_job_that_is_taken_away_between_the_look_and_the_write_is_not_written(
    desk: Desk, how: str, outcome: str, retries: int
) -> None:
    job = desk.enqueue(retry=Retry(retries) if retries else None)
    flight = desk.take(job)
    if outcome == "finish":  # a job that others wait for: the success of any other is one script, and has no between
        desk.redis.sadd(job.dependents_key, "another")
    desk.client.meddle = lambda: _MEDDLING[how](desk, job)
    desk.finish(flight) if outcome == "finish" else desk.fail(flight, OutOfMemory("full"))
    assert desk.client.meddle is None
    assert not desk.outbox.waits
    assert desk.leases == 0
    assert desk.redis.zscore("rq:finished:radixq", job.id) is None
    if how == "rq info":
        assert job.get_status() == (JobStatus.QUEUED if retries else JobStatus.FAILED)
        assert desk.waiting == [job.id] * retries
        assert len(desk.rq_results(job)) == 1 - retries
    else:
        assert desk.result(job)["status"] == "cancelled"
        assert desk.redis.exists(job.key) == (how == "cancel")
        assert desk.waiting == []
    assert desk.pump.ledger.entries() == []


@pytest.mark.parametrize("how", _MEDDLING)
def test_a_job_that_is_taken_away_while_it_is_handed_back_is_left_alone(desk: Desk, how: str) -> None:
    job, mate = desk.enqueue(retry=Retry(1)), desk.enqueue()
    flight = desk.take(job)
    desk.client.meddle = lambda: _MEDDLING[how](desk, job)
    assert desk._drain.hand_back([flight, desk.take(mate)] if how != "rq info" else [flight]) == (how != "rq info")
    assert desk.waiting.count(job.id) == (how == "rq info")
    assert desk.pump.ledger.entries() == []


@pytest.mark.parametrize("answered", [False, True], ids=["before the server ran it", "before its answer came"])
def test_a_connection_that_breaks_while_many_are_delivered_delivers_each_once(desk: Desk, answered: bool) -> None:
    jobs = [desk.enqueue() for _ in range(4)]
    flights = [desk.take(job) for job in jobs]
    for flight in flights:
        desk.outbox.put(flight, Finished(flight.id, "a dog", "stop", USAGE, prefill_ms=1.5, decode_ms=20.25))
    desk.client.breaks_at, desk.client.answered = 1, answered
    with pytest.raises(ConnectionError):
        desk.deliver()
    assert len(desk.deliver()) == 4
    assert [desk.result(job)["status"] for job in jobs] == ["finished"] * 4
    assert [len(desk.rq_results(job)) for job in jobs] == [1] * 4
    assert desk.outbox.jobs_finished == 4


def test_a_full_server_takes_no_part_of_a_result(desk: Desk) -> None:
    job = desk.enqueue()
    flight = desk.take(job)
    desk.redis.config_set("maxmemory", 1)
    try:
        with pytest.raises(OutOfMemoryError):
            desk.finish(flight)
        assert job.get_status() == JobStatus.STARTED
        assert desk.leases == 1
        assert desk.result(job)["status"] == "running"
    finally:
        desk.redis.config_set("maxmemory", 0)
    assert desk.deliver() == [flight]
    assert desk.result(job)["status"] == "finished"


def test_what_was_touched_does_not_hold_up_what_is_delivered_with_it(desk: Desk) -> None:
    jobs = [desk.enqueue() for _ in range(4)]
    flights = [desk.take(job) for job in jobs]
    jobs[0].cancel()
    desk.redis.zrem("rq:wip:radixq", flights[1].execution.composite_key)
    follower = desk.enqueue(depends_on=jobs[2])
    for flight in flights:
        desk.outbox.put(flight, Finished(flight.id, "a dog", "stop", USAGE, prefill_ms=1.5, decode_ms=20.25))
    assert desk.deliver() == [flights[3], *flights[:3]]
    assert [desk.result(job)["status"] for job in jobs] == ["cancelled", "running", "finished", "finished"]
    assert desk.waiting == [follower.id]
    assert desk.redis.hget(desk.worker.key, "successful_job_count") == b"2"


def test_closing_hands_back_whatever_a_result_raises(desk: Desk) -> None:
    job, mate = desk.enqueue(), desk.enqueue()
    flight, _ = desk.take(job), desk.take(mate)
    desk.outbox.put(flight, Finished(flight.id, "a dog", "stop", USAGE, prefill_ms=1.5, decode_ms=20.25))
    assert flight.result is not None
    flight.result = flight.result.model_copy(update={"custom_id": "\ud800"})
    with pytest.raises(PydanticSerializationError):
        desk.pump.close()
    assert desk.waiting == [job.id, mate.id]
    assert desk.leases == 0


@pytest.mark.parametrize("answered", [False, True], ids=["before the server ran it", "before its answer came"])
def test_what_a_lost_answer_left_in_doubt_waits_again_though_nothing_else_does(desk: Desk, answered: bool) -> None:
    job = desk.enqueue()
    desk.client.breaks_at, desk.client.answered = 1, answered
    with pytest.raises(ConnectionError):
        desk.pump._drain.take([Candidate(job.id, "radixq")], "tiny")
    assert desk.waiting == ([] if answered else [job.id])
    desk.pump._exchange(None)
    assert desk.waiting == [job.id]
    assert desk.leases == 0
