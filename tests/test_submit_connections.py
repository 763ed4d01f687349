"""`submit` and its connections: whose they are, and what is left of a job when one breaks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import zlib
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from redis import ConnectionPool, Redis
from redis import exceptions as redis_errors
from redis.connection import Connection
from rq.utils import as_text

from common import keys
from common.errors import BrokerUnavailable, InvalidRequest
from producer import get, submit, submit_many

ROOT = Path(__file__).resolve().parent.parent


def payload(redis: Redis, job_id: str) -> Any:
    """Return the job's one argument as it lies in Redis."""
    data: Any = redis.hget(f"rq:job:{job_id}", "data")
    name, instance, (argument,), keywords = json.loads(zlib.decompress(data))
    assert (name, instance, keywords) == ("radixq.generate", None, {})
    return argument


def test_the_callers_way_of_reading_is_not_ours(redis_url: str, redis: Redis) -> None:
    client = Redis.from_url(
        redis_url, decode_responses=True, encoding="utf-16", socket_timeout=0.001, max_connections=1
    )
    ticket = submit("h\u00e9", redis=client)
    assert ticket.status() == "queued"
    assert payload(redis, ticket.id)["messages"][0]["content"] == "h\u00e9"


def test_the_server_comes_from_the_argument_then_our_setting_then_rqs(
    redis_url: str, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RQ_REDIS_URL", "redis://127.0.0.1:1/3")
    assert "127.0.0.1:1" in str(pytest.raises(BrokerUnavailable, submit, "a").value)
    monkeypatch.setenv("RADIXQ_REDIS_URL", "redis://127.0.0.1:2")
    assert "127.0.0.1:2" in str(pytest.raises(BrokerUnavailable, submit, "a").value)
    submit("a", redis=redis_url)
    assert redis.llen("rq:queue:radixq") == 1


def test_one_client_serves_a_url_for_the_whole_process(redis_url: str) -> None:
    assert get("a", redis=redis_url)._broker is get("b", redis=redis_url)._broker
    client = Redis.from_url(redis_url)
    shared = Redis(connection_pool=client.connection_pool)
    assert get("a", redis=client)._broker is get("b", redis=shared)._broker


@pytest.mark.parametrize("redis", [5, object(), "http://localhost", b"redis://localhost"])
def test_what_is_no_url_and_no_client_is_refused(redis: Any) -> None:
    with pytest.raises(InvalidRequest) as refused:
        submit("a", redis=redis)
    assert refused.value.field == "redis"


def test_no_server_is_one_sentence_that_says_where_and_what_to_do() -> None:
    with pytest.raises(BrokerUnavailable) as away:
        submit("a", redis="redis://:secret@127.0.0.1:1/0")
    assert re.search(r"^cannot reach Redis at 127\.0\.0\.1:1 .*refused.*start it.*RADIXQ_REDIS_URL", str(away.value))
    assert "secret" not in str(away.value)
    assert away.value.exit_code == 4


def test_wrong_credentials_are_said_to_be_wrong(redis_url: str) -> None:
    url = redis_url.replace("://", "://nobody:secret@")
    with pytest.raises(BrokerUnavailable, match="refuses the credentials") as refused:
        submit("a", redis=url)
    assert "secret" not in str(refused.value)


def test_a_server_that_refuses_the_write_is_reported(redis_url: str, redis: Redis) -> None:
    redis.set(keys.result("one"), "somebody else's string")
    redis.sadd("rq:queue:radixq", "not a list")
    with pytest.raises(BrokerUnavailable, match="refuses the command.*WRONGTYPE"):
        submit("a", redis=redis_url)


class Breaking(Connection):
    """A connection that breaks once, just before or just after it has sent a transaction."""

    when = "never"
    arrived: Redis

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        when = type(self).when if b"EVAL" in b"".join(command) else "never"
        if when != "never":
            type(self).when = "never"
        if when != "before":
            super().send_packed_command(command, check_health=check_health)  # type: ignore[no-untyped-call]
        if when == "after":
            while not type(self).arrived.exists("rq:queue:radixq"):
                pass
        if when != "never":
            self.disconnect()  # type: ignore[no-untyped-call]
            raise redis_errors.ConnectionError("the network is gone")


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_connection_lost_during_a_submit_leaves_the_job_once(when: str, redis_url: str, redis: Redis) -> None:
    client = Redis(connection_pool=ConnectionPool.from_url(redis_url, connection_class=Breaking))
    Breaking.arrived = redis
    submit("connect", queue="other", redis=client)
    Breaking.when = when
    tickets = submit_many(["a", "b"], redis=client)
    assert [ticket.id.encode() for ticket in tickets] == redis.lrange("rq:queue:radixq", 0, -1)


class Failing(Connection):
    """A connection that carries a few transactions and then no more."""

    left = 0

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        if b"EVAL" in b"".join(command):
            type(self).left -= 1
            if type(self).left < 0:
                raise redis_errors.ConnectionError("the network is gone")
        super().send_packed_command(command, check_health=check_health)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("limit", ["CHUNK_JOBS", "CHUNK_BYTES"])
def test_a_submit_that_breaks_off_says_how_much_is_in_the_queue(
    limit: str, redis_url: str, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Redis(connection_pool=ConnectionPool.from_url(redis_url, connection_class=Failing))
    jobs = ["x" * 100] * 5
    monkeypatch.setattr(sys.modules["producer.submit"], limit, 2 if limit == "CHUNK_JOBS" else 400)  # two jobs each
    Failing.left = 2
    with pytest.raises(BrokerUnavailable, match="network is gone.*the first 4 of 5 jobs are in the queue"):
        submit_many(jobs, redis=client)
    assert redis.llen("rq:queue:radixq") == 4


def test_a_forked_child_submits_on_a_connection_of_its_own(redis_url: str, redis: Redis) -> None:
    script = (
        "import os, sys\nfrom producer import submit\nsubmit('parent', redis=sys.argv[1])\n"
        "pids = [os.fork() for _ in range(2)]\n"
        "for n in range(50): submit('x', redis=sys.argv[1])\n"
        "if 0 not in pids: [os.wait() for _ in pids]"
    )
    done = subprocess.run([sys.executable, "-c", script, redis_url], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert redis.llen("rq:queue:radixq") == 1 + 4 * 50


def test_submitted_at_is_the_servers_time(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 86_400)  # this machine's clock is a day late
    ticket = submit("a", redis=redis)
    at = datetime.fromisoformat(as_text(redis.hget(keys.result(ticket.id), "submitted_at") or ""))
    seconds, _ = redis.time()
    assert abs(at.timestamp() - seconds) < 3_600
