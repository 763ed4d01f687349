"""Jobs whose end nobody wrote down: abandoned, emptied, cancelled through RQ alone."""

from __future__ import annotations

import time

import pytest
from rq import Callback, Queue, Retry
from rq.job import Job, JobStatus

from common import keys
from common.errors import (
    GenerationFailed,
)
from common.serializer import JobSerializer
from producer import submit
from tests.desk import CALLS, PROMPT_TTL_S, RESULT_TTL_S, Desk, expire
from tests.processes import wait_until


def test_a_job_abandoned_for_good_calls_back_once_and_one_that_runs_again_does_not(desk: Desk) -> None:
    for retry in (None, Retry(1)):
        job = desk.enqueue(retry=retry, on_failure=Callback(f"{Desk.__module__}.listed"))
        flight = desk.take(job)
        del desk.pump.flights[flight.id]
        desk.redis.zadd("rq:wip:radixq", {flight.execution.composite_key: 1})
        desk.worker.run_maintenance_tasks()
        wait_until(lambda: CALLS, "the callback ran")
    time.sleep(0.2)
    assert [says.split()[1] for _, says in CALLS] == [str(JobStatus.FAILED)]


def test_a_job_whose_worker_is_gone_says_so(desk: Desk) -> None:
    lost, again = desk.enqueue(), desk.enqueue(retry=Retry(1))
    for job in (lost, again):
        flight = desk.take(job)
        del desk.pump.flights[flight.id]  # as if another process had taken it
        desk.redis.zadd("rq:wip:radixq", {flight.execution.composite_key: 1})
    desk.worker.run_maintenance_tasks()
    fields = desk.result(lost)
    assert (fields["status"], fields["error_code"]) == ("failed", "worker_crashed")
    assert lost.get_status() == JobStatus.FAILED
    assert 0 < desk.redis.ttl(lost.key) <= PROMPT_TTL_S
    assert desk.result(again)["status"] == "queued"
    assert desk.waiting == [again.id]


@pytest.mark.parametrize("attempts", ["abc", "9" * 5000], ids=["no number", "a long one"])
def test_attempts_that_are_no_number_do_not_keep_a_record_open(desk: Desk, attempts: str) -> None:
    job = desk.enqueue()
    flight = desk.take(job)
    del desk.pump.flights[flight.id]
    desk.redis.zadd("rq:wip:radixq", {flight.execution.composite_key: 1})
    desk.redis.hset(keys.result(job.id), "attempts", attempts)
    desk.redis.hset(keys.result("gone"), mapping={"status": "running", "attempts": attempts})
    desk.worker.run_maintenance_tasks()
    _sweep(desk)
    assert desk.result(job)["status"] == "failed"
    assert desk.redis.hget(keys.result("gone"), "status") == b"lost"


def test_a_claimed_job_that_nobody_started_goes_back_instead_of_failing(desk: Desk) -> None:
    first, second = desk.enqueue(), desk.enqueue()
    desk.redis.lmove("rq:queue:radixq", "rq:queue:radixq:intermediate")
    intermediate = Queue("radixq", connection=desk.redis).intermediate_queue
    desk.redis.set(intermediate.get_first_seen_key(first.id), time.time() - 61)  # RQ gives it a minute
    desk.worker.run_maintenance_tasks()
    assert desk.waiting == [first.id, second.id]
    assert intermediate.get_job_ids() == []
    assert first.get_status() == JobStatus.QUEUED


def _sweep(desk: Desk) -> None:
    for _ in range(2):  # the second finds nothing more
        desk.pump.sweep()


def test_a_job_that_left_with_its_queue_is_recorded_as_lost_andexpires(desk: Desk, redis_url: str) -> None:
    ticket = submit("a prompt", redis=redis_url, custom_id="mine", idempotency_key="once")
    kept = submit("a prompt", redis=redis_url, queue="other")
    Queue("radixq", connection=desk.redis).empty()  # type: ignore[no-untyped-call]
    _sweep(desk)
    for key in (keys.result(ticket.id), keys.idempotency("once")):
        assert 0 < desk.redis.ttl(key) <= RESULT_TTL_S
    assert (ticket.status(), kept.status()) == ("lost", "queued")
    assert desk.redis.hget(keys.result(ticket.id), "custom_id") == b"mine"
    with pytest.raises(GenerationFailed, match="no result came") as caught:
        ticket.result(0)
    assert caught.value.status == "lost"


def test_what_became_of_a_job_through_rq_alone_is_recorded(desk: Desk, redis_url: str) -> None:
    cancelled, abandoned = (submit("a prompt", redis=redis_url) for _ in range(2))
    job = Job.fetch(abandoned.id, desk.redis, JobSerializer)
    Job.fetch(cancelled.id, desk.redis, JobSerializer).cancel()
    flight = desk.take(job)
    desk.redis.hset(job.key, "retries_left", 0)
    expire(desk, job)  # by `rq info`, which knows nothing of our record
    assert job.get_status() == JobStatus.FAILED
    _sweep(desk)
    assert cancelled.status() == "cancelled"
    fields = desk.result(job)
    assert (fields["status"], fields["error_code"], fields["attempts"]) == ("failed", "worker_crashed", "1")
    assert 0 < desk.redis.ttl(job.key) <= PROMPT_TTL_S
    desk.finish(flight)
    assert desk.result(job) == fields
