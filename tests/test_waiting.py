"""Waiting for answers: how long, how often, for how many at once, through outages, and while nobody works."""

from __future__ import annotations

import asyncio
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from redis import ConnectionPool, Redis
from redis.connection import Connection
from rq import SimpleWorker

from common import keys
from common.errors import BrokerUnavailable, InvalidRequest
from common.messages import Result
from common.serializer import JobSerializer
from common.settings import Settings
from producer import NoWorkerWarning, Ticket, get, submit, submit_many, waiting
from producer.broker import connect
from tests.records import failed, finish
from worker import server


def later(delay_s: float, action: Any, *arguments: Any) -> threading.Timer:
    timer = threading.Timer(delay_s, action, arguments)
    timer.start()
    return timer


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


@pytest.mark.parametrize("timeout_s", [float("nan"), "5", True])
def test_a_wait_for_what_is_no_time_is_refused(timeout_s: Any, redis: Redis) -> None:
    ticket = submit("a", redis=redis)
    with pytest.raises(InvalidRequest, match=f"timeout_s={timeout_s!r} must be a number of seconds"):
        ticket.result(timeout_s)
    with pytest.raises(InvalidRequest, match="must be a number of seconds"):
        asyncio.run(ticket.aresult(timeout_s))


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
    assert "no live worker listens to queue 'radixq.m' (seen in the last 120 s: mac-mini)" in said
    assert "start one that serves this model (MLX_MODEL_PATH, RADIXQ_MODEL_ALIASES) with `" in said
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
