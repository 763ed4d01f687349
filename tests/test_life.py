"""A job's life beyond one good run: its time, its attempts, its callbacks and its parents, with a real worker."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from rq import Callback, Queue, Retry
from rq.command import send_stop_job_command
from rq.job import Job, JobStatus
from rq.suspension import resume, suspend

from common import keys
from common.errors import GenerationFailed, InvalidRequest
from common.messages import Result
from common.serializer import JobSerializer
from producer import Ticket, get, submit, submit_many
from tests.models import save_endless
from tests.processes import Process, Processes, wait_until
from worker import server

ENDLESS = 90_000
HELPERS = """
import os, time
def note(job, connection, *rest):
    connection.rpush("calls", f"{job.id} {job.get_status()} {len(rest)}")
def args(job, connection, *rest):
    connection.rpush("calls", f"{job.id} {job.args[0]['prompt']}")
def enqueue(job, connection, *rest):
    from rq import Queue
    from rq.serializers import JSONSerializer
    Queue("other", connection=connection, serializer=JSONSerializer).enqueue("mine.work", 1)
def bad(job, connection, *rest):
    connection.rpush("calls", f"{job.id} bad")
    raise SystemExit("a callback of the test")
def hang(job, connection, *rest):
    connection.rpush("calls", f"{job.id} hangs")
    time.sleep(1000)
def unlisted(job, connection, *rest):
    connection.rpush("calls", f"{job.id} unlisted")
"""
LISTED = ",".join(f"helpers_of_the_test.{name}" for name in ("note", "args", "enqueue", "bad", "hang", "missing"))


class House:
    """One worker and its server, shared by the tests of this file."""

    def __init__(self, url: str, start: Callable[[], Process]) -> None:
        self.url = url
        self.redis = Redis.from_url(url)
        self._start = start
        self.worker = start()

    def submit(self, text: str = "a secret", tokens: int = 4, **options: Any) -> Ticket:
        return submit(prompt=text, max_tokens=tokens, redis=self.url, **options)

    def enqueue(self, tokens: int = 4, **options: Any) -> Ticket:
        """Queue a job with rq alone."""
        body = {"prompt": "a secret", "sampling": {"max_tokens": tokens}}
        queue = Queue("radixq", connection=self.redis, serializer=JobSerializer)
        return get(queue.enqueue(keys.GENERATE, body, **options).id, redis=self.url)

    def job(self, ticket: Ticket) -> Job:
        return Job.fetch(ticket.id, self.redis, JobSerializer)

    def fields(self, ticket: Ticket) -> dict[str, str]:
        found: Any = self.redis.hgetall(keys.result(ticket.id))
        return {name.decode(): value.decode() for name, value in found.items()}

    def wait_for(self, status: str, *tickets: Ticket) -> None:
        def reached() -> bool:
            assert self.worker.running, self.worker.log
            return all(self.fields(ticket).get("status") == status for ticket in tickets)

        wait_until(reached, f"{len(tickets)} jobs are {status}")

    def failure(self, ticket: Ticket) -> GenerationFailed:
        with pytest.raises(GenerationFailed) as failed:
            ticket.result(timeout_s=90)
        return failed.value

    def calls(self, ticket: Ticket) -> list[str]:
        found: Any = self.redis.lrange("calls", 0, -1)
        return [words.decode().partition(" ")[2] for words in found if words.decode().startswith(ticket.id)]

    @property
    def waiting(self) -> list[str]:
        found: Any = self.redis.lrange("rq:queue:radixq", 0, -1)
        return [job_id.decode() for job_id in found]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    directory = tmp_path_factory.mktemp("life")
    (directory / "helpers_of_the_test.py").write_text(HELPERS)
    model = save_endless(directory / "tiny")
    running = server.start(directory / "server", persistent=False)
    path = f"{Path(__file__).parents[1]}:{directory}"
    env = {"RADIXQ_MAX_ROWS": "2", "RADIXQ_WORKER_NAME": "mac", "RADIXQ_CALLBACKS": LISTED, "PYTHONPATH": path}
    try:
        with Processes(directory) as processes:
            house = House(running.url, lambda: processes.rq_worker(running.url, "radixq", model=model, env=env))
            house.worker.wait_for_log("ready")
            yield house
            began = time.monotonic()
            house.worker.stop()
            assert house.worker.popen.returncode == 0
            assert time.monotonic() - began < 60  # a callback hangs since one of the tests
            assert "a secret" not in house.worker.log
            house.redis.close()
    finally:
        running.stop()


@pytest.fixture
def busy(house: House) -> Iterator[House]:
    """The worker with as many jobs as it can run."""
    tickets = [house.submit(tokens=ENDLESS) for _ in range(2)]
    house.wait_for("running", *tickets)
    yield house
    for ticket in tickets:
        ticket.cancel()


def in_s(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


# --- time ------------------------------------------------------------------------------------------------------------


def test_a_mate_of_a_job_that_ran_too_long_gives_the_answer_it_gives_alone(house: House) -> None:
    alone = house.submit("the mate", tokens=400).result(timeout_s=90)
    late, mate = house.submit("slow", tokens=ENDLESS, timeout_s=1), house.submit("the mate", tokens=400)
    assert house.failure(late).code == "timeout"
    assert mate.result(timeout_s=90).text == alone.text
    assert house.fields(late)["attempts"] == "1"  # the same job would run as long again


def test_a_job_expires_in_its_queue_though_there_is_no_room(busy: House) -> None:
    ticket = busy.submit(expires_at=1, metadata={"who": "me"}, on_failure="helpers_of_the_test.note")
    mate = busy.submit(tokens=3, expires_at=3600)
    busy.wait_for("expired", ticket)
    fields = busy.fields(ticket)
    assert (fields["error_code"], fields["attempts"]) == ("expired", "0")
    assert not fields.keys() & {"started_at", "text", "prefill_ms"}
    assert Result.model_validate_json(fields["json"]).metadata == {"who": "me"}
    assert busy.failure(ticket).status == "expired"
    assert busy.job(ticket).get_status() == JobStatus.FAILED
    assert busy.waiting == [mate.id]
    wait_until(lambda: busy.calls(ticket), "its callback ran")


def test_a_job_expires_though_it_is_of_another_model_and_though_rq_is_suspended(house: House) -> None:
    suspend(house.redis)
    try:
        wait_until(lambda: house.redis.hget("radixq:metrics:mac", "state") == b"suspended", "the worker knows")
        other = house.submit(queue="radixq", model="another", expires_at=in_s(1))
        ours = house.submit(expires_at=in_s(1))
        lasting = house.submit()
        house.wait_for("expired", other, ours)
        waiting = set(house.waiting)  # other tests' jobs may wait there too
        assert waiting & {lasting.id, other.id, ours.id} == {lasting.id}
    finally:
        resume(house.redis)
    house.wait_for("finished", lasting)


def test_a_job_whose_time_is_over_is_never_started_and_one_in_time_is(house: House) -> None:
    late, early = house.submit(expires_at=in_s(-5)), house.submit(expires_at=in_s(60))
    assert house.failure(late).code == "expired"
    assert early.result(timeout_s=90).text is not None


def test_a_retry_with_an_interval_waits_and_runs_again_without_another_process(house: House) -> None:
    body = {"prompt": "x", "sampling": {"max_tokens": 3}}
    queue = Queue("radixq", connection=house.redis, serializer=JobSerializer)
    ticket = house.enqueue(tokens=ENDLESS, retry=Retry(2, interval=[1, 1]))
    house.wait_for("running", ticket)
    (execution,) = house.job(ticket).get_executions()
    house.redis.zadd("rq:wip:radixq", {execution.composite_key: 1})  # as when its worker had been silent for long
    house.redis.hset(f"rq:job:{ticket.id}", "data", json.dumps([keys.GENERATE, None, [body], {}]))
    queue.started_job_registry.cleanup()
    assert house.job(ticket).get_status() == JobStatus.SCHEDULED
    house.wait_for("finished", ticket)
    assert house.redis.zcard("rq:scheduled:radixq") == 0


def test_jobs_put_aside_come_when_it_is_time_once(house: House) -> None:
    queue = Queue("radixq", connection=house.redis, serializer=JobSerializer)
    body = {"prompt": "x", "sampling": {"max_tokens": 3}}
    jobs = [queue.enqueue_in(timedelta(seconds=1), keys.GENERATE, body) for _ in range(20)]
    later = queue.enqueue_in(timedelta(hours=1), keys.GENERATE, body)
    wait_until(lambda: all(job.get_status() == JobStatus.FINISHED for job in jobs), "they ran")
    assert {house.redis.hget(keys.result(job.id), "attempts") for job in jobs} == {b"1"}
    assert later.get_status() == JobStatus.SCHEDULED
    later.cancel()


def test_a_job_without_times_of_its_own_gets_ours(house: House) -> None:
    ticket = house.enqueue(tokens=ENDLESS)  # rq wrote a timeout of 180 s, and would keep a failure for a year
    house.wait_for("running", ticket)
    assert house.redis.hmget(f"rq:job:{ticket.id}", "result_ttl", "failure_ttl") == [b"3600", b"3600"]
    ticket.cancel()
    quick = house.enqueue()
    house.wait_for("finished", quick)
    assert 0 < house.redis.ttl(f"rq:job:{quick.id}") <= 3600
    assert 3600 < house.redis.ttl(keys.result(quick.id)) <= 7 * 86_400


# --- callbacks -------------------------------------------------------------------------------------------------------


def test_callbacks_run_after_the_commit_once_and_only_if_listed(house: House) -> None:
    name = "helpers_of_the_test"
    done = house.submit(on_success=f"{name}.note", on_failure=f"{name}.note", on_stopped=f"{name}.note")
    failed = house.submit(tokens=ENDLESS, timeout_s=1, on_failure=f"{name}.note", on_success=f"{name}.note")
    stopped = house.enqueue(ENDLESS, on_stopped=Callback(f"{name}.note"), on_failure=Callback(f"{name}.note"))
    house.wait_for("running", stopped)
    send_stop_job_command(house.redis, stopped.id, JobSerializer)
    others = [house.submit(on_success=function) for function in (f"{name}.unlisted", "os.getcwd", f"{name}.missing")]
    reads = house.submit("what I asked", on_success=f"{name}.args")
    house.wait_for("finished", done, reads, *others)
    house.wait_for("failed", failed)
    wait_until(lambda: house.calls(failed) and house.calls(stopped) and house.calls(reads), "they ran")
    time.sleep(0.5)
    assert house.calls(done) == ["JobStatus.FINISHED 1"]
    assert house.calls(failed) == ["JobStatus.FAILED 3"]
    assert house.calls(stopped) == ["JobStatus.STOPPED 0"]
    assert house.calls(reads) == ["what I asked"]
    assert [house.calls(other) for other in others] == [[], [], []]


def test_callbacks_that_hang_or_end_their_thread_hold_up_nobody(house: House) -> None:
    name = "helpers_of_the_test"
    tickets = [house.submit(on_success=f"{name}.{function}") for function in ("hang", "bad", "bad")]
    house.wait_for("finished", *tickets)
    after = house.submit(on_success=f"{name}.note")
    house.wait_for("finished", after)
    wait_until(lambda: house.calls(after) and all(map(house.calls, tickets)), "the others ran")
    assert house.fields(tickets[1])["status"] == "finished"
    assert house.worker.running


def test_a_callback_may_queue_other_jobs_with_rq(house: House) -> None:
    house.submit(on_success="helpers_of_the_test.enqueue").result(timeout_s=90)
    wait_until(lambda: house.redis.llen("rq:queue:other") == 1, "it was queued")
    found: Any = house.redis.lrange("rq:queue:other", 0, -1)
    assert Job.fetch(found[0].decode(), house.redis, JobSerializer).args == [1]


# --- parents ---------------------------------------------------------------------------------------------------------


def test_a_child_runs_after_its_parents(house: House) -> None:
    parents = [house.submit(tokens=300) for _ in range(2)]
    child = house.submit(depends_on=parents)
    house.wait_for("finished", child)
    assert house.fields(child)["started_at"] >= max(house.fields(parent)["finished_at"] for parent in parents)


def end_by_failing(house: House, parent: Ticket) -> None:
    house.wait_for("failed", parent)


def end_by_ticket(house: House, parent: Ticket) -> None:
    assert parent.cancel()


def end_by_rq(house: House, parent: Ticket) -> None:
    house.job(parent).cancel()


def end_by_stop(house: House, parent: Ticket) -> None:
    house.wait_for("running", parent)
    send_stop_job_command(house.redis, parent.id, JobSerializer)


def end_by_deletion(house: House, parent: Ticket) -> None:
    house.job(parent).delete()


def end_by_expiry(house: House, parent: Ticket) -> None:
    house.wait_for("expired", parent)


ENDS: dict[Callable[[House, Ticket], None], tuple[dict[str, Any], str]] = {
    end_by_failing: ({"tokens": ENDLESS, "timeout_s": 1}, "failed"),
    end_by_ticket: ({"tokens": ENDLESS}, "cancelled"),
    end_by_rq: ({"tokens": ENDLESS}, "cancelled"),
    end_by_stop: ({"tokens": ENDLESS}, "stopped"),
    end_by_deletion: ({"tokens": ENDLESS}, "was "),  # deleted, or cancelled once its worker has noticed
    end_by_expiry: ({"expires_at": in_s(-1)}, ""),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_job_whose_parent_will_never_finish_is_cancelled_and_says_why(
    house: House, end: Callable[[House, Ticket], None]
) -> None:
    options, says = ENDS[end]
    parent = house.submit(**options)
    # To RQ a deleted parent is as good as a finished one, once another finishes.
    parents = [parent] if end is end_by_deletion else [parent, house.submit(tokens=2)]
    child = house.submit(depends_on=parents, metadata={"who": "me"}, idempotency_key=f"child of {parent.id}")
    grandchild = house.submit(depends_on=child)
    end(house, parent)
    house.wait_for("cancelled", child, grandchild)
    failed = house.failure(child)
    assert (failed.code, failed.status) == ("cancelled", "cancelled")
    assert f"never started: job {parent.id}, which this one depends on, " in str(failed)
    assert says in str(failed)
    assert f"job {child.id}" in str(house.failure(grandchild))
    assert house.job(child).get_status() == JobStatus.CANCELED
    assert Result.model_validate_json(house.fields(child)["json"]).metadata == {"who": "me"}
    assert house.redis.zcard("rq:deferred:radixq") == 0
    assert 0 < house.redis.ttl(f"rq:job:{child.id}") <= 3600
    assert house.redis.ttl(f"radixq:idempotency:child of {parent.id}") > 0
    assert "started_at" not in house.fields(child)


@pytest.mark.parametrize("record", ["queued", "lost"])
def test_a_job_submitted_after_its_parent_was_deleted_through_rq_is_cancelled_and_says_so(
    house: House, record: str
) -> None:
    parent = house.submit(tokens=ENDLESS, queue="nobody-listens")
    house.job(parent).delete()
    house.redis.hset(f"radixq:result:{parent.id}", "status", record)  # lost: the sweep has been there
    child = house.submit(depends_on=parent)
    failed = house.failure(child)
    assert (failed.status, failed.code) == ("cancelled", "cancelled")
    end = "deleted" if record == "queued" else "lost"
    assert f"job {parent.id}, which this one depends on, was {end}" in str(failed)


def test_a_job_whose_parent_nobody_remembers_is_refused(house: House) -> None:
    parent = house.submit(tokens=2)
    house.wait_for("finished", parent)
    house.redis.delete(f"radixq:result:{parent.id}", f"rq:job:{parent.id}")
    with pytest.raises(InvalidRequest, match="no job has this id"):
        house.submit(depends_on=parent)


@pytest.mark.parametrize("ttl", [0, 5, -1])
def test_rqs_time_to_live_of_a_result_is_not_that_of_our_record(house: House, ttl: int) -> None:
    job = Queue("radixq", connection=house.redis, serializer=JobSerializer).enqueue(
        keys.GENERATE, {"prompt": "a secret", "sampling": {"max_tokens": 3}}, result_ttl=ttl, failure_ttl=ttl
    )
    ticket = get(job.id, redis=house.url)
    assert ticket.result(timeout_s=90).usage
    assert house.job(ticket).get_status() == JobStatus.FINISHED
    assert 0 < house.redis.ttl(f"rq:job:{ticket.id}") <= 3600 < house.redis.ttl(f"radixq:result:{ticket.id}")
    result = job.latest_result()
    assert result is not None
    assert result.return_value is not None
    assert result.return_value["status"] == "finished"


def test_a_job_submitted_after_its_parent_failed_is_cancelled_too(house: House) -> None:
    parent = house.submit(expires_at=in_s(-1))
    house.wait_for("expired", parent)
    child = house.submit(depends_on=parent)
    assert house.failure(child).status == "cancelled"


def test_keys_of_finished_jobs_expire_with_their_results(house: House) -> None:
    ticket = house.submit(idempotency_key="done")
    house.wait_for("finished", ticket)
    fields = house.fields(ticket)
    assert house.submit(idempotency_key="done").id == ticket.id
    assert fields["idempotency_key"] == "done"
    assert 0 < house.redis.ttl("radixq:idempotency:done") <= 7 * 86_400
    tickets = submit_many([{"prompt": "a secret", "idempotency_key": "done", "max_tokens": 4}], redis=house.url)
    assert [one.id for one in tickets] == [ticket.id]
