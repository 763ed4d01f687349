"""Results on their way into RQ's transactions, on a real server, in the process of the test; the engine never runs."""

from __future__ import annotations

import contextlib
import json
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pydantic_core import PydanticSerializationError
from redis import Redis
from redis.exceptions import ConnectionError
from rq import Callback, Queue, Retry
from rq.job import Job, JobStatus
from rq.registry import StartedJobRegistry
from rq.results import Result as RqResult

from common import keys
from common.errors import (
    ContextLengthExceeded,
    Expired,
    GenerationFailed,
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
from common.messages import Failure, Result, Usage
from common.serializer import JobSerializer
from common.settings import Settings
from producer import submit
from tests.processes import wait_until
from tests.test_drain import Brittle
from worker.app import BatchWorker
from worker.deliver import refused
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


@pytest.fixture
def desk(redis_url: str) -> Iterator[Desk]:
    CALLS.clear()
    desk = Desk(redis_url)
    yield desk
    desk.close()


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


def test_a_job_abandoned_for_good_calls_back_once_and_one_that_runs_again_does_not(desk: Desk) -> None:
    for retry in (None, Retry(1)):
        job = desk.enqueue(retry=retry, on_failure=Callback(f"{__name__}.listed"))
        flight = desk.take(job)
        del desk.pump.flights[flight.id]
        desk.redis.zadd("rq:wip:radixq", {flight.execution.composite_key: 1})
        desk.worker.run_maintenance_tasks()
        wait_until(lambda: CALLS, "the callback ran")
    time.sleep(0.2)
    assert [says.split()[1] for _, says in CALLS] == [str(JobStatus.FAILED)]


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


def _expire(desk: Desk, job: Job) -> None:
    """Let the lease of a job end, and RQ's own maintenance find it, as `rq info` does."""
    registry = StartedJobRegistry("radixq", connection=desk.redis, serializer=JobSerializer)
    members: Any = desk.redis.zrange(registry.key, 0, -1)
    desk.redis.zadd(registry.key, dict.fromkeys(members, 1))
    registry.cleanup()


_MEDDLING: dict[str, Callable[[Desk, Job], object]] = {
    "rq info": _expire,
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


def test_only_listed_callbacks_run_and_only_after_the_commit(desk: Desk) -> None:
    here = __name__
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
    job = desk.enqueue(on_success=Callback(f"{__name__}.raising"), retry=Retry(2))
    desk.finish(desk.take(job))
    wait_until(lambda: CALLS, "the callback ran")
    assert desk.result(job)["status"] == "finished"
    assert job.get_status() == JobStatus.FINISHED


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


def test_a_claimed_job_that_nobody_started_goes_back_instead_of_failing(desk: Desk) -> None:
    first, second = desk.enqueue(), desk.enqueue()
    desk.redis.lmove("rq:queue:radixq", "rq:queue:radixq:intermediate")
    intermediate = Queue("radixq", connection=desk.redis).intermediate_queue
    desk.redis.set(intermediate.get_first_seen_key(first.id), time.time() - 61)  # RQ gives it a minute
    desk.worker.run_maintenance_tasks()
    assert desk.waiting == [first.id, second.id]
    assert intermediate.get_job_ids() == []
    assert first.get_status() == JobStatus.QUEUED


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


def test_an_id_that_rq_refuses_does_not_end_the_worker(desk: Desk) -> None:
    desk.redis.rpush("rq:queue:radixq:intermediate", "my.job")
    desk.redis.zadd("rq:wip:radixq", {"my.job:0": 1})
    desk.worker.run_maintenance_tasks()
    assert not desk.worker.should_run_maintenance_tasks


@pytest.mark.parametrize("answered", [False, True], ids=["before the server ran it", "before its answer came"])
def test_what_a_lost_answer_left_in_doubt_waits_again_though_nothing_else_does(desk: Desk, answered: bool) -> None:
    job = desk.enqueue()
    desk.client.breaks_at, desk.client.answered = 1, answered
    with pytest.raises(ConnectionError):
        desk.pump._drain.take([Candidate(job.id, "radixq")], "tiny")
    assert desk.waiting == []
    desk.pump._exchange(None)
    assert desk.waiting == [job.id]
    assert desk.leases == 0


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


def _sweep(desk: Desk) -> None:
    for _ in range(2):  # the second finds nothing more
        desk.pump.sweep()


def test_a_job_that_left_with_its_queue_is_recorded_as_lost_and_expires(desk: Desk, redis_url: str) -> None:
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
    _expire(desk, job)  # by `rq info`, which knows nothing of our record
    assert job.get_status() == JobStatus.FAILED
    _sweep(desk)
    assert cancelled.status() == "cancelled"
    fields = desk.result(job)
    assert (fields["status"], fields["error_code"], fields["attempts"]) == ("failed", "worker_crashed", "1")
    assert 0 < desk.redis.ttl(job.key) <= PROMPT_TTL_S
    desk.finish(flight)
    assert desk.result(job) == fields
