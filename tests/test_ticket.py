"""`producer.Ticket`: every end a job can come to, as the worker or RQ writes it on a real server, and the waiting."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import zlib
from typing import Any

import pytest
from redis import Redis
from rq import Queue
from rq.job import Job
from rq.registry import CanceledJobRegistry, StartedJobRegistry
from rq.utils import as_text

from common import keys
from common.errors import ERROR_CODES, GenerationFailed, InvalidRequest
from common.messages import Result
from common.serializer import JobSerializer
from producer import Ticket, get, submit
from tests.records import failed, finish, rq_status

BOMB = base64.b64encode(zlib.compress(bytes(32 << 20)))


# --- results ---------------------------------------------------------------------------------------------------------


def test_a_finished_job_gives_its_whole_result(redis: Redis) -> None:
    ticket = submit("a", redis=redis)
    written = finish(redis, ticket.id)
    assert ticket.result() == written
    assert ticket.status() == "finished"


def test_an_empty_answer_is_a_result(redis: Redis) -> None:
    ticket = submit("a", redis=redis)
    finish(redis, ticket.id, text="")
    assert ticket.result().text == ""


def test_a_result_of_a_newer_worker_is_read_without_what_is_new(redis: Redis) -> None:
    ticket = submit("a", redis=redis)
    finish(redis, ticket.id)
    json = as_text(redis.hget(keys.result(ticket.id), "json") or "")
    redis.hset(keys.result(ticket.id), "json", json.replace('"text":', '"mood":"fine","text":'))
    assert ticket.result().text == "ok"


@pytest.mark.parametrize(("status", "code"), [("failed", code) for code in ERROR_CODES] + [("expired", "expired")])
def test_a_failure_carries_its_code_and_its_status(status: str, code: str, redis: Redis) -> None:
    ticket = submit("a", redis=redis)
    failed(redis, ticket.id, status, code)
    with pytest.raises(GenerationFailed, match=rf"^job {ticket.id} {status}: why$") as failure:
        ticket.result()
    assert (failure.value.code, failure.value.status) == (code, status)
    assert ticket.status() == status


@pytest.mark.parametrize("json", [b"", b"{", b'{"id": 5}'])
def test_a_result_that_cannot_be_read_is_a_failure_that_names_the_key(json: bytes, redis: Redis) -> None:
    ticket = submit("a", redis=redis)
    finish(redis, ticket.id)
    redis.hset(keys.result(ticket.id), "json", json)
    with pytest.raises(GenerationFailed, match=f"field json of radixq:result:{ticket.id}"):
        ticket.result()


def test_a_result_can_be_read_after_rq_has_forgotten_the_job(redis: Redis) -> None:
    ticket = submit("a", redis=redis)
    finish(redis, ticket.id)
    redis.delete(f"rq:job:{ticket.id}")
    assert ticket.result().text == "ok"


def test_get_finds_a_job_submitted_elsewhere(redis_url: str, redis: Redis) -> None:
    finish(redis, submit("a", redis=redis).id)
    (key,) = redis.keys("radixq:result:*")
    assert get(as_text(key).rpartition(":")[2], redis=redis_url).result().text == "ok"


@pytest.mark.parametrize("call", [Ticket.status, Ticket.result, Ticket.cancel])
def test_an_id_that_nobody_knows_is_said_to_be_unknown(call: Any, redis: Redis) -> None:
    with pytest.raises(InvalidRequest, match=r"^no job 'nobody' on Redis at 127\.0\.0\.1:\d+"):
        call(get("nobody", redis=redis))


def test_what_cannot_be_an_id_is_refused_at_once(redis: Redis) -> None:
    with pytest.raises(InvalidRequest, match="job_id='a:b'"):
        get("a:b", redis=redis)


# --- what only RQ says -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rqs", "ours"),
    [
        ("queued", "queued"),
        ("deferred", "queued"),
        ("scheduled", "queued"),
        ("ready_to_enqueue", "queued"),
        ("started", "running"),
        ("finished", "lost"),
        ("failed", "failed"),
        ("stopped", "cancelled"),
        ("canceled", "cancelled"),
    ],
)
@pytest.mark.parametrize("recorded", ["queued", "running", None])
def test_rqs_status_counts_while_no_end_is_recorded(rqs: str, ours: str, recorded: str | None, redis: Redis) -> None:
    ticket = submit("a", redis=redis)
    rq_status(redis, ticket, rqs)
    if recorded is None:
        redis.delete(keys.result(ticket.id))
    else:
        redis.hset(keys.result(ticket.id), "status", recorded)
    assert ticket.status() == ours


def test_a_job_that_rq_lost_is_lost(redis: Redis) -> None:
    ticket = submit("a", redis=redis)
    Queue("radixq", connection=redis).empty()  # type: ignore[no-untyped-call]
    assert ticket.status() == "lost"
    with pytest.raises(GenerationFailed, match="RQ no longer runs it") as failure:
        ticket.result()
    assert (failure.value.status, failure.value.code) == ("lost", "internal")


def test_a_failed_job_that_was_queued_again_by_hand_is_queued(redis: Redis) -> None:
    ticket = submit("a", redis=redis)
    failed(redis, ticket.id, "failed", "internal")
    rq_status(redis, ticket, "queued")
    assert ticket.status() == "queued"
    finish(redis, ticket.id)
    assert ticket.result().text == "ok"


@pytest.mark.parametrize("options", [[], ["--serializer", "rq.serializers.JSONSerializer"]], ids=["pickle", "json"])
def test_a_job_that_a_foreign_worker_took_fails_with_rqs_reason_and_ours(
    redis_url: str, redis: Redis, options: list[str]
) -> None:
    ticket = submit("a", redis=redis)
    redis.hset(f"rq:job:{ticket.id}", "retries_left", 0)
    command = [sys.executable, "-m", "rq.cli", "worker", "--burst", "-u", redis_url, *options, "radixq"]
    subprocess.run(command, capture_output=True, check=True)
    with pytest.raises(GenerationFailed, match=r"DeserializationError|radixq\.generate|No module named") as failure:
        ticket.result()
    assert (failure.value.status, failure.value.code) == ("failed", "internal")
    assert "start it with --worker-class worker.BatchWorker" in str(failure.value)


def test_a_job_that_rq_gave_up_after_a_crash_failed_with_worker_crashed(redis: Redis) -> None:
    ticket = submit("a", redis=redis)
    queue = Queue("radixq", connection=redis, serializer=JobSerializer)
    redis.hset(f"rq:job:{ticket.id}", mapping={"status": "started", "retries_left": 0})
    redis.zadd("rq:wip:radixq", {f"{ticket.id}:execution": 1})  # a lease that ended long ago
    StartedJobRegistry(queue=queue).cleanup()
    with pytest.raises(GenerationFailed, match="AbandonedJobError") as failure:
        ticket.result()
    assert (failure.value.status, failure.value.code) == ("failed", "worker_crashed")


@pytest.mark.parametrize("exc_string", ["x" * 100_000, "no base64!", BOMB, b"\xff"])
def test_what_stands_in_place_of_rqs_reason_is_read_within_bounds_or_not_at_all(redis: Redis, exc_string: Any) -> None:
    ticket = submit("a", redis=redis)
    rq_status(redis, ticket, "failed")
    redis.xadd(f"rq:results:{ticket.id}", {"type": 2, "exc_string": exc_string})
    with pytest.raises(GenerationFailed) as failure:
        ticket.result()
    assert (failure.value.status, failure.value.code) == ("failed", "internal")
    assert len(str(failure.value)) < 5_000
    redis.delete(f"rq:results:{ticket.id}")
    redis.set(f"rq:results:{ticket.id}", "no stream")
    with pytest.raises(GenerationFailed, match="RQ recorded no reason"):
        ticket.result()


# --- cancel ----------------------------------------------------------------------------------------------------------


def test_a_cancelled_job_leaves_the_queue_and_says_so_everywhere(redis: Redis) -> None:
    keep, ticket = submit("a", redis=redis), submit("b", custom_id="row-7", metadata={"a": "b"}, redis=redis)
    assert ticket.cancel()
    assert redis.lrange("rq:queue:radixq", 0, -1) == [keep.id.encode()]
    assert Job.fetch(ticket.id, connection=redis, serializer=JobSerializer).is_canceled
    assert ticket.id in CanceledJobRegistry("radixq", redis).get_job_ids()
    fields: dict[Any, Any] = redis.hgetall(keys.result(ticket.id))
    assert (fields[b"status"], fields[b"error_code"], fields[b"custom_id"]) == (b"cancelled", b"cancelled", b"row-7")
    assert fields[b"submitted_at"] <= fields[b"finished_at"]
    assert float(fields[b"total_ms"]) >= 0
    with pytest.raises(GenerationFailed) as failure:
        ticket.result()
    assert (failure.value.status, failure.value.code) == ("cancelled", "cancelled")


def test_what_a_cancelled_job_leaves_expires(redis: Redis) -> None:
    ticket = submit("a", redis=redis)
    ticket.cancel()
    assert 3_500 < redis.ttl(f"rq:job:{ticket.id}") <= 3_600
    assert 7 * 86_400 - 100 < redis.ttl(keys.result(ticket.id)) <= 7 * 86_400


def test_a_running_job_is_cancelled_through_rq(redis: Redis) -> None:
    ticket = submit("a", redis=redis)
    rq_status(redis, ticket, "started")
    assert ticket.cancel()
    assert redis.hget(f"rq:job:{ticket.id}", "status") == b"canceled"
    assert ticket.status() == "cancelled"


def test_a_cancelled_record_keeps_what_was_known_of_the_job(redis: Redis) -> None:
    ticket = submit("a", custom_id="row-7", metadata={"a": "b"}, idempotency_key="once", redis=redis)
    rq_status(redis, ticket, "started")
    earlier = [{"attempt": 1, "code": "worker_crashed", "message": "it died"}]
    key = keys.result(ticket.id)
    redis.hdel(key, "json")  # as a worker does when it starts the job
    redis.hset(
        key,
        mapping={
            "attempts": 2,
            "worker": "mac",
            "started_at": "2026-11-22T14:03:05.123Z",
            "errors": json.dumps(earlier),
        },
    )
    assert ticket.cancel()
    result = Result.model_validate_json(redis.hget(key, "json") or b"")
    assert (result.status, result.attempts, result.worker) == ("cancelled", 2, "mac")
    assert (result.custom_id, result.metadata, result.idempotency_key) == ("row-7", {"a": "b"}, "once")
    assert [one.code for one in result.errors] == ["worker_crashed"]
    assert result.timing.started_at == "2026-11-22T14:03:05.123Z"
    assert result.timing.total_ms is not None
    assert 0 < redis.ttl(keys.idempotency("once")) <= 7 * 86_400


def test_a_job_that_has_ended_cannot_be_cancelled(redis: Redis) -> None:
    ticket = submit("a", redis=redis)
    finish(redis, ticket.id)
    assert not ticket.cancel()
    assert ticket.result().text == "ok"


def test_a_job_that_ends_while_it_is_being_cancelled_has_ended(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    ticket = submit("a", redis=redis)
    cancel = Job.cancel

    def cancel_late(*args: Any, **kwargs: Any) -> Any:
        finish(redis, ticket.id)
        return cancel(*args, **kwargs)

    monkeypatch.setattr(Job, "cancel", cancel_late)
    assert not ticket.cancel()
    assert ticket.result().text == "ok"
    assert redis.hget(f"rq:job:{ticket.id}", "status") == b"finished"
