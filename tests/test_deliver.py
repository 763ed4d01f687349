"""Results on their way into RQ's transactions, on a real server, in the process of the test; the engine never runs."""

from __future__ import annotations

import json
import tracemalloc
import zlib

import pytest
from rq import Callback, Retry
from rq.job import JobStatus
from rq.results import Result as RqResult

from common import keys
from common.errors import (
    ContextLengthExceeded,
    Expired,
    ImageTooLarge,
    ImageUnreadable,
    InternalError,
    InvalidRequest,
    JobTimeout,
    OutOfMemory,
    PrefixPoisoned,
    RadixqError,
    Unsupported,
)
from common.messages import Failure, Result
from tests.desk import CALLS, PROMPT_TTL_S, RESULT_TTL_S, USAGE, Desk
from tests.processes import wait_until
from worker.deliver import refused
from worker.sequence import Finished


def test_a_finished_job_is_complete_and_readable(desk: Desk) -> None:
    job = desk.enqueue()
    desk.finish(desk.take(job))
    fields = desk.result(job)
    times = {name: fields.pop(name) for name in ("submitted_at", "started_at", "finished_at")}
    durations = {name: float(fields.pop(name)) for name in ("queued_ms", "total_ms")}
    whole = Result.model_validate_json(fields.pop("json"))
    assert fields == {
        "status": "finished", "text": "a dog", "finish_reason": "stop", "prompt_tokens": "9", "cached_tokens": "4",
        "prefill_tokens": "5", "completion_tokens": "3", "model": "tiny", "custom_id": "mine", "batch_id": "b1",
        "attempts": "1", "worker": "mac", "prefill_ms": "1.5", "decode_ms": "20.25",
    }  # fmt: skip
    assert times["submitted_at"] <= times["started_at"] <= times["finished_at"]
    assert 0 <= durations["queued_ms"] <= durations["total_ms"]
    assert (whole.text, whole.usage, whole.metadata) == ("a dog", USAGE, {"who": "me"})


def test_rq_knows_of_a_finished_job_all_that_it_knows_of_any(desk: Desk) -> None:
    job = desk.enqueue()
    desk.finish(desk.take(job))
    assert job.get_status() == JobStatus.FINISHED
    (result,) = desk.rq_results(job)
    assert result.type == RqResult.Type.SUCCESSFUL
    assert Result.model_validate(result.return_value).text == "a dog"
    assert desk.redis.zscore("rq:finished:radixq", job.id) is not None
    assert desk.leases == 0
    assert desk.worker.get_current_executions(refresh=True) == []
    assert desk.redis.hget(desk.worker.key, "successful_job_count") == b"1"
    assert desk.redis.hget(desk.worker.key, "state") == b"idle"


def test_the_result_outlives_the_prompt(desk: Desk) -> None:
    finished, failed = desk.enqueue(), desk.enqueue()
    desk.finish(desk.take(finished))
    desk.fail(desk.take(failed), InvalidRequest("wrong"))
    for job in (finished, failed):
        assert PROMPT_TTL_S - 60 < desk.redis.ttl(job.key) <= PROMPT_TTL_S
        assert RESULT_TTL_S - 60 < desk.redis.ttl(keys.result(job.id)) <= RESULT_TTL_S


def test_the_worker_is_idle_only_when_the_last_job_is_delivered(desk: Desk) -> None:
    first, second = desk.take(desk.enqueue()), desk.take(desk.enqueue())
    desk.finish(first)
    assert desk.redis.hget(desk.worker.key, "state") == b"busy"
    desk.finish(second)
    assert desk.redis.hget(desk.worker.key, "state") == b"idle"


def test_a_permanent_error_is_not_retried_though_retries_are_left(desk: Desk) -> None:
    job = desk.enqueue(retry=Retry(2))
    desk.fail(desk.take(job), JobTimeout("took too long"))
    fields = desk.result(job)
    assert (fields["status"], fields["error_code"], fields["error_message"]) == ("failed", "timeout", "took too long")
    assert "text" not in fields
    assert desk.waiting == []
    assert job.get_status() == JobStatus.FAILED
    (result,) = desk.rq_results(job)
    assert result.exc_string == "timeout: took too long"


def test_a_transient_error_is_retried_and_each_attempt_shows(desk: Desk) -> None:
    job = desk.enqueue(retry=Retry(1))
    desk.fail(desk.take(job), OutOfMemory("full"))
    fields = desk.result(job)
    assert (fields["status"], fields["error_code"], fields["attempts"]) == ("queued", "out_of_memory", "1")
    assert desk.redis.ttl(keys.result(job.id)) == -1
    assert desk.waiting == [job.id]
    assert desk.outbox.jobs_failed == 0
    flight = desk.take(job)
    assert not desk.result(job).keys() & {"error_code", "error_message", "json"}
    desk.fail(flight, OutOfMemory("full again"))
    fields = desk.result(job)
    assert (fields["status"], fields["error_message"], fields["attempts"]) == ("failed", "full again", "2")
    assert desk.outbox.jobs_failed == 1
    assert desk.waiting == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("meta", b'{"score": NaN}'), ("meta", b'{"a": "\\ud800"}'), ("meta", b"5"), ("dependency_ids", b'["\\ud800"]')],
)
def test_a_job_with_a_field_that_nobody_could_write_again_is_retried_and_fails_like_any_other(
    desk: Desk, name: str, value: bytes
) -> None:
    job, mate = desk.enqueue(retry=Retry(1)), desk.enqueue()
    desk.redis.hset(job.key, name, value)
    flight = desk.take(job)
    desk.outbox.put(desk.take(mate), OutOfMemory("full"))
    desk.fail(flight, OutOfMemory("full"))
    assert desk.waiting == [job.id]
    desk.fail(desk.take(job), OutOfMemory("full again"))
    assert [desk.result(one)["status"] for one in (job, mate)] == ["failed", "failed"]
    assert desk.redis.hget(job.key, name) == value


def test_a_result_lists_what_ended_its_earlier_attempts(desk: Desk) -> None:
    job = desk.enqueue(retry=Retry(2))
    desk.fail(desk.take(job), OutOfMemory("full"))
    desk.fail(desk.take(job), InternalError("a defect"))
    waiting = Result.model_validate_json(desk.result(job)["json"])
    assert [(one.attempt, one.code) for one in waiting.errors] == [(1, "out_of_memory"), (2, "internal")]
    desk.finish(desk.take(job))
    fields = desk.result(job)
    whole = Result.model_validate_json(fields["json"])
    assert (whole.status, whole.attempts, whole.error) == ("finished", 3, None)
    assert [(one.attempt, one.message, one.worker) for one in whole.errors] == [
        (1, "full", "mac"),
        (2, "a defect", "mac"),
    ]
    assert all(one.ended_at for one in whole.errors)
    assert json.loads(fields["errors"])[1]["code"] == "internal"


def test_a_lost_worker_is_one_of_the_errors(desk: Desk) -> None:
    job = desk.enqueue(retry=Retry(1))
    flight = desk.take(job)
    del desk.pump.flights[flight.id]
    desk.redis.zadd("rq:wip:radixq", {flight.execution.composite_key: 1})
    desk.worker.run_maintenance_tasks()
    desk.finish(desk.take(job))
    whole = Result.model_validate_json(desk.result(job)["json"])
    assert (whole.attempts, [one.code for one in whole.errors]) == (2, ["worker_crashed"])


ENDS_A_JOB = (
    InvalidRequest, ContextLengthExceeded, Unsupported, ImageUnreadable, ImageTooLarge, JobTimeout, Expired,
    OutOfMemory, PrefixPoisoned, InternalError,
)  # fmt: skip


@pytest.mark.parametrize("error", ENDS_A_JOB)
def test_only_transient_errors_are_tried_again_however_many_retries_a_job_claims(
    desk: Desk, error: type[RadixqError]
) -> None:
    job = desk.enqueue(retry=Retry(5))
    desk.redis.hset(job.key, "retries_left", 10**9)
    desk.fail(desk.take(job), error("for a reason"))
    transient = error.code in ("out_of_memory", "prefix_poisoned", "internal")
    assert bool(desk.waiting) == transient
    assert not transient or int(desk.redis.hget(job.key, "retries_left") or 0) == 24


def test_the_first_outcome_counts(desk: Desk) -> None:
    job = desk.enqueue()
    flight = desk.take(job)
    desk.outbox.put(flight, JobTimeout("took too long"))
    desk.finish(flight)
    assert desk.result(job)["status"] == "failed"
    assert len(desk.rq_results(job)) == 1


def test_results_written_together_leave_the_books_of_results_written_alone(desk: Desk) -> None:
    plain, parent, cancelled, lost, other = (desk.enqueue() for _ in range(5))
    child = desk.enqueue(depends_on=parent)
    flights = [desk.take(job) for job in (plain, parent, cancelled, lost, other)]
    cancelled.cancel()
    desk.redis.zrem("rq:wip:radixq", flights[3].execution.composite_key)
    for flight in flights:
        desk.outbox.put(flight, Finished(flight.id, flight.job.id, "stop", USAGE, prefill_ms=1.5, decode_ms=20.25))
    assert set(desk.deliver()) == set(flights)
    assert not desk.outbox.waits
    statuses = [desk.result(job)["status"] for job in (plain, parent, cancelled, lost, other)]
    assert statuses == ["finished", "finished", "cancelled", "running", "finished"]
    assert [desk.result(job)["text"] for job in (plain, parent, other)] == [plain.id, parent.id, other.id]
    assert [len(desk.rq_results(job)) for job in (plain, parent, cancelled, lost, other)] == [1, 1, 0, 0, 1]
    assert desk.redis.zcard("rq:finished:radixq") == 3
    assert desk.waiting == [child.id]
    assert desk.leases == 0


def test_only_listed_callbacks_run_and_only_after_the_commit(desk: Desk) -> None:
    here = Desk.__module__
    job = desk.enqueue(on_success=Callback(f"{here}.listed"))
    desk.finish(desk.take(job))
    wait_until(lambda: CALLS, "the listed callback ran")
    assert [("listed", f"{job.id} {JobStatus.FINISHED}")] == CALLS
    other = desk.enqueue(on_success=Callback(f"{here}.foreign"), on_failure=Callback("os.getcwd"))
    desk.finish(desk.take(other))
    last = desk.enqueue(on_failure=Callback(f"{here}.listed"))
    desk.fail(desk.take(last), InvalidRequest("wrong"))
    wait_until(lambda: len(CALLS) > 1, "the next listed callback ran")
    assert [name for name, _ in CALLS] == ["listed", "listed"]
    assert desk.result(other)["status"] == "finished"


def test_a_callback_that_raises_does_not_fail_the_job(desk: Desk) -> None:
    job = desk.enqueue(on_success=Callback(f"{Desk.__module__}.raising"), retry=Retry(2))
    desk.finish(desk.take(job))
    wait_until(lambda: CALLS, "the callback ran")
    assert desk.result(job)["status"] == "finished"
    assert job.get_status() == JobStatus.FINISHED


@pytest.mark.parametrize("body", [b"[]", b"not json", b"[1, 2]", json.dumps([keys.GENERATE, None, [7], {}]).encode()])
def test_a_job_that_cannot_be_read_can_still_be_failed(desk: Desk, body: bytes) -> None:
    job = desk.enqueue()
    desk.redis.hset(job.key, "data", body)
    desk.fail(desk.take(job), InvalidRequest("cannot be read"))
    fields = desk.result(job)
    assert (fields["status"], fields["error_code"]) == ("failed", "invalid_request")


def test_labels_that_utf8_cannot_hold_are_left_out(desk: Desk) -> None:
    job = desk.enqueue()
    body = {"prompt": "x", "custom_id": "\ud800", "batch_id": "b1", "metadata": {"\udfff": "v"}}
    desk.redis.hset(job.key, "data", json.dumps([keys.GENERATE, None, [body], {}]))
    desk.fail(desk.take(job), InvalidRequest("no Unicode"))
    fields = desk.result(job)
    assert (fields["status"], fields["batch_id"]) == ("failed", "b1")
    assert not fields.keys() & {"custom_id", "metadata"}


def test_an_id_that_rq_refuses_does_not_end_the_worker(desk: Desk) -> None:
    desk.redis.rpush("rq:queue:radixq:intermediate", "my.job")
    desk.redis.zadd("rq:wip:radixq", {"my.job:0": 1})
    desk.worker.run_maintenance_tasks()
    assert not desk.worker.should_run_maintenance_tasks


def test_a_payload_is_neither_unpacked_without_bound_nor_written_again(desk: Desk) -> None:
    job = desk.enqueue()
    bomb = zlib.compress(b"[" + b" " * 200_000_000 + b"]")
    desk.redis.hset(job.key, "data", bomb)
    tracemalloc.start()
    desk.fail(desk.take(job), InvalidRequest("too large"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000
    assert desk.redis.hget(job.key, "data") == bomb
    assert desk.result(job)["status"] == "failed"


@pytest.mark.parametrize("code", ["invalid_request", "context_length_exceeded", "unsupported", "expired", "internal"])
def test_a_refusal_keeps_its_code(code: str) -> None:
    error = refused(Failure(code=code, message="because"))
    assert (error.code, str(error)) == (code, "because")


def test_a_candidate_without_prompt_and_reason_is_a_defect_of_ours() -> None:
    assert isinstance(refused(None), InternalError)
