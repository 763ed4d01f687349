"""`producer.Ticket`: every end a job can come to, as the worker or RQ writes it on a real server, and the waiting."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
import threading
import time
import warnings
import zlib
from pathlib import Path
from typing import Any

import pytest
from redis import ConnectionPool, Redis
from redis.connection import Connection
from rq import Queue, SimpleWorker
from rq.job import Job
from rq.registry import CanceledJobRegistry, StartedJobRegistry
from rq.utils import as_text

from common import keys
from common.errors import ERROR_CODES, BrokerUnavailable, GenerationFailed, InvalidRequest
from common.messages import Failure, Result, Timing, Usage
from common.serializer import JobSerializer
from common.settings import Settings
from producer import NoWorkerWarning, Ticket, get, submit, submit_many, waiting
from producer.broker import connect
from worker import server

USAGE = Usage(prompt_tokens=5, cached_tokens=3, prefill_tokens=2, completion_tokens=1)

BOMB = base64.b64encode(zlib.compress(bytes(32 << 20)))


def finish(redis: Redis, job_id: str, **fields: Any) -> Result:
    """Write a job's end as the worker does: its result and RQ's status together."""
    ended: dict[str, Any] = {"status": "finished", "text": "ok", "finish_reason": "stop", "usage": USAGE, **fields}
    result = Result(id=job_id, worker="w", model="tiny", timing=Timing(total_ms=1.5), **ended)
    with redis.pipeline() as pipe:
        pipe.hset(f"rq:job:{job_id}", "status", "finished" if result.status == "finished" else "failed")
        pipe.hset(keys.result(job_id), mapping=result.to_hash())  # type: ignore[arg-type]
        pipe.execute()
    return result


def failed(redis: Redis, job_id: str, status: Any, code: str) -> None:
    finish(
        redis, job_id, status=status, text=None, finish_reason=None, usage=None, error=Failure(code=code, message="why")
    )


def rq_status(redis: Redis, ticket: Ticket, status: str) -> None:
    redis.hset(f"rq:job:{ticket.id}", "status", status)


def later(delay_s: float, action: Any, *arguments: Any) -> threading.Timer:
    timer = threading.Timer(delay_s, action, arguments)
    timer.start()
    return timer


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


def test_a_job_that_a_foreign_worker_took_fails_with_rqs_reason(redis_url: str, redis: Redis) -> None:
    ticket = submit("a", redis=redis)
    redis.hset(f"rq:job:{ticket.id}", "retries_left", 0)
    command = [sys.executable, "-m", "rq.cli", "worker", "--burst", "-u", redis_url, "radixq"]
    subprocess.run([*command, "--serializer", "rq.serializers.JSONSerializer"], capture_output=True, check=True)
    with pytest.raises(GenerationFailed, match=r"radixq\.generate|No module named") as failure:
        ticket.result()
    assert (failure.value.status, failure.value.code) == ("failed", "internal")


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


# --- waiting ---------------------------------------------------------------------------------------------------------


def test_a_wait_ends_when_the_result_comes(redis: Redis) -> None:
    ticket = submit("a", redis=redis)
    later(0.3, finish, redis, ticket.id)
    assert ticket.result(timeout_s=60).text == "ok"


@pytest.mark.parametrize("timeout_s", [0, 0.2])
def test_a_wait_that_is_too_short_says_so_and_can_be_repeated(timeout_s: float, redis: Redis) -> None:
    ticket = submit("a", redis=redis)
    with pytest.raises(TimeoutError, match=f"job {ticket.id} has not ended within {timeout_s} s"):
        ticket.result(timeout_s)
    with pytest.raises(TimeoutError, match=f"job {ticket.id} has not ended"):
        asyncio.run(ticket.aresult(timeout_s))
    finish(redis, ticket.id)
    assert ticket.result(timeout_s).text == "ok"
    assert asyncio.run(ticket.aresult(0)).text == "ok"


def test_asyncio_has_the_same_answers(redis: Redis) -> None:
    async def ask() -> None:
        good, bad, gone = submit_many(["a", "b", "c"], redis=redis)
        finish(redis, good.id)
        failed(redis, bad.id, "failed", "unsupported")
        assert await gone.astatus() == "queued"
        assert await gone.acancel()
        outcomes = await asyncio.gather(good.aresult(), bad.aresult(), gone.aresult(), return_exceptions=True)
        assert isinstance(outcomes[0], Result)
        assert [getattr(error, "code", None) for error in outcomes[1:]] == ["unsupported", "cancelled"]
        with pytest.raises(InvalidRequest, match="no job 'nobody'"):
            await get("nobody", redis=redis).aresult()

    asyncio.run(ask())


def test_a_wait_that_is_given_up_leaves_the_others_waiting(redis: Redis) -> None:
    async def ask() -> str | None:
        ticket = submit("a", redis=redis)
        given_up, waits = asyncio.create_task(ticket.aresult()), asyncio.create_task(ticket.aresult())
        await asyncio.sleep(0.1)
        given_up.cancel()
        await asyncio.sleep(0.1)
        finish(redis, ticket.id)
        return (await waits).text

    assert asyncio.run(ask()) == "ok"


def test_a_thousand_waits_leave_the_processor_and_the_event_loop_free(redis: Redis) -> None:
    async def ask() -> float:
        tickets = submit_many(["a"] * 1_000, redis=redis)
        waits = [asyncio.create_task(ticket.aresult()) for ticket in tickets]
        await asyncio.sleep(1)
        cpu_s, wall_s = time.process_time(), time.monotonic()
        await asyncio.sleep(4)
        share = (time.process_time() - cpu_s) / (time.monotonic() - wall_s)
        for ticket in tickets:
            finish(redis, ticket.id)
        assert {result.text for result in await asyncio.gather(*waits)} == {"ok"}
        return share

    assert asyncio.run(ask()) < 0.25  # of one core


def test_a_wait_polls_less_and_less_often(redis: Redis) -> None:
    ticket = submit("a", redis=redis)
    redis.config_resetstat()
    with pytest.raises(TimeoutError):
        ticket.result(2)
    assert 5 < redis.info("commandstats")["cmdstat_exec"]["calls"] < 60


class Slow(Connection):
    """A connection on which everything takes a while."""

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        time.sleep(0.05)
        super().send_packed_command(command, check_health=check_health)  # type: ignore[no-untyped-call]


def test_a_slow_read_is_followed_by_a_long_pause(redis_url: str) -> None:
    client = Redis(connection_pool=ConnectionPool.from_url(redis_url, connection_class=Slow))
    wait = waiting.Wait(connect(client, Settings.from_env()))
    wait.look(["a"])
    assert wait.pause_s >= 10 * 0.05


def test_a_wait_survives_a_restart_of_the_server(tmp_path: Path) -> None:
    running = server.start(tmp_path / "home")
    port = int(running.url.rpartition(":")[2].partition("/")[0])
    ticket = submit("a", redis=running.url)
    ends: list[Any] = []
    waits = [
        threading.Thread(target=lambda: ends.append(ticket.result(60))),
        threading.Thread(target=lambda: ends.append(asyncio.run(ticket.aresult(60)))),
    ]
    for wait in waits:
        wait.start()
    time.sleep(0.3)
    running.stop()
    time.sleep(0.5)
    running = server.start(tmp_path / "home", port=port)
    try:
        with Redis.from_url(running.url) as client:
            finish(client, ticket.id)
        for wait in waits:
            wait.join()
    finally:
        running.stop()
    assert [result.text for result in ends] == ["ok", "ok"]


def test_a_server_that_never_answered_is_not_waited_for() -> None:
    for wait in (get("a", redis="redis://127.0.0.1:1").result, _async_wait):
        with pytest.raises(BrokerUnavailable, match="cannot reach Redis"):
            wait()


def _async_wait() -> Result:
    return asyncio.run(get("a", redis="redis://127.0.0.1:1").aresult())


def test_an_outage_that_lasts_ends_the_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "OUTAGE_S", 0.5)
    running = server.start(tmp_path / "home", persistent=False)
    ticket = submit("a", redis=running.url)
    running.stop()
    with pytest.raises(BrokerUnavailable, match="cannot reach Redis"):
        ticket.result(60)


# --- nobody listens --------------------------------------------------------------------------------------------------


@pytest.fixture
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "NO_WORKER_AFTER_S", 0.1)


def _waits_in_vain(ticket: Ticket, asynchronous: bool) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(TimeoutError):
            asyncio.run(ticket.aresult(1)) if asynchronous else ticket.result(1)
    return [str(warning.message) for warning in caught if warning.category is NoWorkerWarning]


@pytest.mark.usefixtures("_soon")
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_wait_without_a_worker_warns_once_and_says_how_to_start_one(asynchronous: bool, redis: Redis) -> None:
    redis.zadd(keys.WORKERS, {"mac-mini": redis.time()[0], "long-gone": 1})
    ticket = submit("a", model="m", redis=redis)
    (said,) = _waits_in_vain(ticket, asynchronous)
    assert "no live worker listens to queue 'radixq.m' (alive, but on other queues: mac-mini)" in said
    assert "rq worker --worker-class worker.BatchWorker -u redis://127.0.0.1:" in said
    assert _waits_in_vain(ticket, asynchronous) == []


@pytest.mark.usefixtures("_soon")
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_warning_that_is_an_error_ends_the_wait(asynchronous: bool, redis: Redis) -> None:
    ticket = submit("a", redis=redis)
    with pytest.raises(NoWorkerWarning):
        asyncio.run(ticket.aresult(60)) if asynchronous else ticket.result(60)


@pytest.mark.usefixtures("_soon")
def test_a_wait_with_a_live_worker_does_not_warn(redis: Redis) -> None:
    worker = SimpleWorker(["radixq"], connection=redis, serializer=JobSerializer)
    worker.register_birth()  # type: ignore[no-untyped-call]
    assert _waits_in_vain(submit("a", redis=redis), False) == []


@pytest.mark.usefixtures("_soon")
def test_a_worker_that_died_does_not_count(redis: Redis) -> None:
    worker = SimpleWorker(["radixq"], connection=redis, serializer=JobSerializer)
    worker.register_birth()  # type: ignore[no-untyped-call]
    redis.delete(worker.key)  # it expires when nobody renews it
    assert len(_waits_in_vain(submit("a", redis=redis), False)) == 1
