"""`producer.submit`: what is refused, what is written, and that nothing is written when anything is wrong."""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from redis import ConnectionPool, Redis
from redis import exceptions as redis_errors
from redis.connection import Connection
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.utils import as_text

from common import keys
from common.errors import BrokerUnavailable, GenerationFailed, InvalidRequest, SettingsError, Unsupported
from common.messages import GenerateJob, Result
from common.serializer import JobSerializer
from producer import get, submit, submit_many
from producer.request import parse
from producer.submit import CHUNK_JOBS
from tests import documented

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = Draft202012Validator(json.loads((ROOT / "ops/schema/generate_job.json").read_text()))
HELLO = [{"role": "user", "content": "hello"}]
NAN, INF = math.nan, math.inf


def payload(redis: Redis, job_id: str) -> Any:
    """Return the job's one argument as it lies in Redis."""
    data: Any = redis.hget(f"rq:job:{job_id}", "data")
    name, instance, (argument,), keywords = json.loads(zlib.decompress(data))
    assert (name, instance, keywords) == ("radixq.generate", None, {})
    return argument


def texts(fields: Mapping[Any, Any]) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in fields.items()}


# --- refused, by name ------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({}, "text", "exactly one of text, messages and prompt"),
    ({"text": "a", "prompt": "b"}, "prompt", "text and prompt"),
    ({"text": ""}, "text", "text is empty"),
    ({"prompt": ""}, "prompt", "prompt is empty"),
    ({"text": 5}, "text", "text=5 must be a string"),
    ({"prompt": b"abc"}, "prompt", "prompt=b'abc' must be a string"),
    ({"text": "a", "system": ""}, "system", "system is empty"),
    ({"text": "a", "system": ["b"]}, "system", "must be a string"),
    ({"prompt": "a", "system": "b"}, "system", "put it into prompt"),
    ({"messages": HELLO, "system": "b"}, "system", "put it into messages"),
    ({"messages": []}, "messages", "messages=[] must not be empty"),
    ({"messages": "hello"}, "messages", "messages='hello' must be a list"),
    ({"messages": [3]}, "messages", "messages[0]=3 must be an object"),
    ({"messages": [{"role": "user", "content": ""}]}, "messages", "hold neither text nor pictures"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages", "messages[0].role='tool'"),
    ({"messages": [{"role": "user"}]}, "messages", "messages[0].content is missing"),
    ({"messages": [*HELLO, {"role": "user", "content": 5}]}, "messages", "messages[1].content=5"),
    ({"messages": [{**HELLO[0], "name": "Ann"}]}, "messages", "messages[0].name is not supported"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages", "content[0].text=5"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages", "content[0].text is missing"),
    ({"messages": [{"role": "user", "content": [{"type": "sound"}]}]}, "messages", "has no known type"),
    ({"text": "a", "max_tokens": -1}, "max_tokens", "max_tokens=-1 should be greater"),
    ({"text": "a", "max_tokens": 0}, "max_tokens", "max_tokens=0"),
    ({"text": "a", "max_tokens": 1.5}, "max_tokens", "max_tokens=1.5"),
    ({"text": "a", "max_tokens": "12"}, "max_tokens", "max_tokens='12' should be a valid integer"),
    ({"text": "a", "max_tokens": True}, "max_tokens", "max_tokens=True"),
    ({"text": "a", "temperature": NAN}, "temperature", "temperature=nan should be a finite number"),
    ({"text": "a", "temperature": INF}, "temperature", "temperature=inf"),
    ({"text": "a", "temperature": -0.1}, "temperature", "temperature=-0.1"),
    ({"text": "a", "temperature": "hot"}, "temperature", "temperature='hot'"),
    ({"text": "a", "top_p": 0.0}, "top_p", "top_p=0.0"),
    ({"text": "a", "top_p": 1.1}, "top_p", "top_p=1.1"),
    ({"text": "a", "top_k": -1}, "top_k", "top_k=-1"),
    ({"text": "a", "min_p": 2}, "min_p", "min_p=2"),
    ({"text": "a", "seed": -1}, "seed", "seed=-1"),
    ({"text": "a", "seed": 2**63}, "seed", "seed="),
    ({"text": "a", "stop": ""}, "stop", "must not be empty"),
    ({"text": "a", "stop": ["b", ""]}, "stop", "stop[1]='' must not be empty"),
    ({"text": "a", "stop": [5]}, "stop", "stop[0]=5 must be a string"),
    ({"text": "a", "stop": ["x"] * 17}, "stop", "at most 16"),
    ({"text": "a", "model": " "}, "model", "must name a model"),
    ({"text": "a", "model": 7}, "model", "model=7 must be a string"),
    ({"text": "a", "queue": ""}, "queue", "queue='' must be"),
    ({"text": "a", "queue": "a\nb"}, "queue", "must be a printable name"),
    ({"text": "a", "job_id": "a b"}, "job_id", "job_id='a b' must be"),
    ({"text": "a", "job_id": "a\n"}, "job_id", "job_id="),
    ({"text": "a", "job_id": ""}, "job_id", "job_id='' must be"),
    ({"text": "a", "job_id": 7}, "job_id", "job_id=7"),
    ({"text": "a", "metadata": {"a": 1}}, "metadata", "metadata.a=1 must be a string"),
    ({"text": "a", "metadata": "a"}, "metadata", "metadata='a' must be an object"),
    ({"text": "a", "custom_id": 7}, "custom_id", "custom_id=7"),
    ({"text": "a", "chat_template_kwargs": {"a": {1}}}, "chat_template_kwargs", "not plain JSON"),
    ({"text": "a", "chat_template_kwargs": {"a": NAN}}, "chat_template_kwargs", "not plain JSON"),
    ({"text": "a", "timeout_s": 0}, "timeout_s", "timeout_s=0 must be a positive number"),
    ({"text": "a", "timeout_s": NAN}, "timeout_s", "timeout_s=nan"),
    ({"text": "a", "timeout_s": "1"}, "timeout_s", "timeout_s='1'"),
    ({"text": "a", "expires_at": 0}, "expires_at", "positive number of seconds from now"),
    ({"text": "a", "expires_at": True}, "expires_at", "expires_at=True"),
    ({"text": "a", "expires_at": INF}, "expires_at", "expires_at=inf"),
    ({"text": "a", "expires_at": "tomorrow"}, "expires_at", "a datetime with a time zone"),
    ({"text": "a", "expires_at": datetime(2026, 1, 1)}, "expires_at", "has no time zone"),
    ({"text": "a", "idempotency_key": ""}, "idempotency_key", "1 to 256 printable"),
    ({"text": "a", "idempotency_key": "a\nb"}, "idempotency_key", "1 to 256 printable"),
    ({"text": "a", "idempotency_key": "\ud800"}, "idempotency_key", "1 to 256 printable"),
    ({"text": "a", "idempotency_key": "x" * 257}, "idempotency_key", "1 to 256 printable"),
    ({"text": "a", "idempotency_key": 7}, "idempotency_key", "idempotency_key=7"),
    ({"text": "a", "max_queue_length": -1}, "max_queue_length", "must be a number of jobs"),
    ({"text": "a", "max_queue_length": 1.5}, "max_queue_length", "must be a number of jobs"),
    ({"text": "a", "depends_on": 7}, "depends_on", "must be a ticket or the id"),
    ({"text": "a", "depends_on": ["a", "b c"]}, "depends_on", "depends_on='b c'"),
    ({"text": "a", "depends_on": ["a"] * 1001}, "depends_on", "names 1,001 jobs"),
    ({"text": "a", "depends_on": "nobody"}, "depends_on", "no job has this id"),
    ({"text": "a", "on_success": len}, "on_success", "must be the name of a function"),
    ({"text": "a", "on_failure": "os"}, "on_failure", "must be the name of a function"),
    ({"text": "a", "on_stopped": "a.b; c"}, "on_stopped", "must be the name of a function"),
    ({"text": "a\ud800"}, "text", "lone surrogate"),
    ({"text": "a", "system": "\udfff"}, "system", "lone surrogate"),
    ({"prompt": "\ud800"}, "prompt", "lone surrogate"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "messages[0].content"),
    ({"text": "a", "stop": "\ud800"}, "stop", "lone surrogate"),
    ({"text": "a", "metadata": {"a": "\ud800"}}, "metadata", "metadata.a"),
    ({"text": "a", "custom_id": "\ud800"}, "custom_id", "lone surrogate"),
    ({"text": "a", "max_token": 3}, "max_token", "did you mean max_tokens?"),
    ({"text": "a", "max_completion_tokens": 3}, "max_completion_tokens", "did you mean max_tokens?"),
    ({"text": "a", "timeout": 3}, "timeout", "did you mean timeout_s?"),
    ({"text": "a", "zzz": 3}, "zzz", "known are text, system, messages"),
    ({"text": "a", "zzz": None}, "zzz", "known are"),
]


@pytest.mark.parametrize(("arguments", "field", "says"), WRONG, ids=[f"{i}-{w[1]}" for i, w in enumerate(WRONG)])
def test_a_bad_argument_is_refused_by_name_before_anything_is_written(
    arguments: dict[str, Any], field: str, says: str, redis: Redis
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        submit(redis=redis, **arguments)
    assert refused.value.field == field
    assert says in str(refused.value)
    assert redis.dbsize() == 0


LATER = (
    "n",
    "stream",
    "response_format",
    "tools",
    "logprobs",
    "batch_id",
)


@pytest.mark.parametrize("field", LATER)
def test_a_field_of_a_later_stage_is_refused_as_unsupported(field: str, redis: Redis) -> None:
    fields: dict[str, Any] = {field: 1}
    with pytest.raises(Unsupported, match=f"^{field} is not supported"):
        submit("hello", redis=redis, **fields)
    assert redis.dbsize() == 0


def test_a_prompt_of_100_megabytes_is_refused_by_its_size(redis: Redis) -> None:
    with pytest.raises(InvalidRequest, match=r"^prompt: the job takes 100,000,000 bytes.*RADIXQ_MAX_JOB_BYTES"):
        submit(prompt="x" * 100_000_000, redis=redis)
    assert redis.dbsize() == 0


def test_the_size_is_counted_in_bytes_and_covers_every_field(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RADIXQ_MAX_JOB_BYTES", "1000")
    submit("x" * 800, redis=redis)
    before = redis.dbsize()
    for arguments in ({"text": "\u00e9" * 800}, {"text": "x", "metadata": {"a": "x" * 1000}}):
        with pytest.raises(InvalidRequest, match="RADIXQ_MAX_JOB_BYTES"):
            submit(redis=redis, **arguments)
    assert redis.dbsize() == before


def test_a_long_value_is_shortened_in_the_error() -> None:
    with pytest.raises(InvalidRequest) as refused:
        submit("a", job_id="x" * 10_000)
    assert len(str(refused.value)) < 200


def test_an_unknown_radixq_setting_stops_a_submit(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RADIXQ_MAX_JOB_BYTE", "1000")
    with pytest.raises(SettingsError, match="did you mean RADIXQ_MAX_JOB_BYTES"):
        submit("hello", redis=redis)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(
        st.sampled_from(
            ["text", "messages", "prompt", "system", "stop", "seed", "metadata", "max_tokens", "top_p", "x"]
        ),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=3),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content"]), inner),
            max_leaves=6,
        ),
    )
)
def test_whatever_is_given_is_a_valid_job_or_an_invalid_request(fields: dict[str, Any]) -> None:
    refused: InvalidRequest | None = None
    try:
        SCHEMA.validate(json.loads(parse(fields, max_bytes=10_000).job.model_dump_json(exclude_none=True)))
    except InvalidRequest as error:
        refused = error
    assert refused is None or refused.field


# --- written ---------------------------------------------------------------------------------------------------------


def test_a_job_is_written_as_redis_cli_shows_it(redis: Redis) -> None:
    ticket = submit(
        "Name three rivers.",
        system="Be brief.",
        max_tokens=64,
        stop="\n",
        custom_id="row-7",
        metadata={"team": "maps"},
        timeout_s=90.5,
        redis=redis,
    )
    job = redis.hgetall(f"rq:job:{ticket.id}")
    del job[b"data"]
    fields = texts(job)
    assert fields["created_at"] == fields["enqueued_at"]
    shown = {name: fields[name] for name in ("status", "origin", "description", "timeout", "retries_left")}
    assert shown == {
        "status": "queued",
        "origin": "radixq",
        "description": "chat, 27 characters",
        "timeout": "91",
        "retries_left": "2",
    }
    assert fields["result_ttl"] == fields["failure_ttl"] == "3600"
    assert payload(redis, ticket.id) == {
        "v": 1,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name three rivers."}],
        "sampling": {"max_tokens": 64, "stop": ["\n"]},
        "metadata": {"team": "maps"},
        "custom_id": "row-7",
    }
    result = texts(redis.hgetall(f"radixq:result:{ticket.id}"))
    whole = json.loads(result.pop("json"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", result.pop("submitted_at"))
    assert result == {"status": "queued", "attempts": "0", "custom_id": "row-7"}
    assert (whole["id"], whole["metadata"]) == (ticket.id, {"team": "maps"})
    assert redis.lrange("rq:queue:radixq", 0, -1) == [ticket.id.encode()]
    assert redis.smembers("rq:queues") == {b"rq:queue:radixq"}


def test_nothing_expires_while_a_job_waits(redis: Redis) -> None:
    submit("hello", redis=redis)
    assert {redis.ttl(key) for key in redis.keys("*")} == {-1}


def test_the_prompt_lies_in_the_compressed_job_and_nowhere_else(redis: Redis) -> None:
    ticket = submit("the quick brown fox", redis=redis)
    everything = b"".join(redis.dump(key) or b"" for key in redis.keys("*"))
    assert b"quick brown" not in everything
    assert payload(redis, ticket.id)["messages"][0]["content"] == "the quick brown fox"


@pytest.mark.parametrize(
    "arguments",
    [
        {"text": "  \n"},
        {"prompt": " "},
        {"prompt": "Once upon a time", "max_tokens": 32},
        {"messages": [*HELLO, {"role": "assistant", "content": ""}, {"role": "user", "content": "go on"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
        {"text": "a", "temperature": 1, "top_p": 0.5, "top_k": 40, "min_p": 0.1, "seed": 0, "stop": ["a", "b"]},
        {"text": "a", "chat_template_kwargs": {"enable_thinking": False}, "metadata": {}, "max_tokens": None},
        {"text": "\U0001f600 \u0000 \u2028", "metadata": {"\u00e9": "\u00fc"}},
    ],
)
def test_what_is_written_fits_the_schema_and_comes_back_the_same(arguments: dict[str, Any], redis: Redis) -> None:
    ticket = submit(redis=redis, **arguments)
    wire = payload(redis, ticket.id)
    SCHEMA.validate(wire)
    assert GenerateJob.model_validate(wire) == parse(arguments, max_bytes=10**6).job


def test_a_model_has_a_queue_of_its_own_unless_a_queue_is_named(redis: Redis) -> None:
    submit("a", model="mlx-community/Qwen3 4B", redis=redis)
    submit("a", model="m", queue="night", redis=redis)
    names = sorted(as_text(name) for name in redis.smembers("rq:queues"))
    assert names == ["rq:queue:night", "rq:queue:radixq.mlx-community/Qwen3-4B"]


def test_an_id_that_is_taken_is_refused_and_the_first_job_stays(redis: Redis) -> None:
    submit("first", job_id="one", redis=redis)
    with pytest.raises(InvalidRequest, match="job_id='one' is taken"):
        submit("second", job_id="one", redis=redis)
    assert payload(redis, "one")["messages"][0]["content"] == "first"
    assert redis.llen("rq:queue:radixq") == 1


def test_an_id_whose_result_is_still_kept_is_taken(redis: Redis) -> None:
    redis.hset(keys.result("one"), mapping=Result(id="one", status="finished", text="kept").to_hash())  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="is taken"):
        submit("again", job_id="one", redis=redis)
    assert redis.hget(keys.result("one"), "text") == b"kept"


class Overtaken(Connection):
    """A connection before whose first transaction somebody else's arrives."""

    first: Any = None

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        if b"EVAL" in b"".join(command) and type(self).first:
            first, type(self).first = type(self).first, None
            first()
        super().send_packed_command(command, check_health=check_health)  # type: ignore[no-untyped-call]


def test_of_two_who_take_one_id_at_once_the_later_is_refused(redis_url: str, redis: Redis) -> None:
    Overtaken.first = lambda: submit("first", job_id="one", redis=redis)
    client = Redis(connection_pool=ConnectionPool.from_url(redis_url, connection_class=Overtaken))
    with pytest.raises(InvalidRequest, match="job_id='one' is taken"):
        submit("second", job_id="one", redis=client)
    assert payload(redis, "one")["messages"][0]["content"] == "first"
    assert redis.llen("rq:queue:radixq") == 1


# --- many ------------------------------------------------------------------------------------------------------------


class Counting(Connection):
    """A connection that counts what it sends."""

    sent = 0

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        type(self).sent += 1
        super().send_packed_command(command, check_health=check_health)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(("named", "most"), [(False, 1), (True, 1)])
def test_1000_jobs_go_in_a_few_round_trips_and_in_order(named: bool, most: int, redis_url: str, redis: Redis) -> None:
    client = Redis(connection_pool=ConnectionPool.from_url(redis_url, connection_class=Counting))
    submit("connect twice, and ask for the time", queue="other", job_id="first", redis=client)
    Counting.sent = 0
    jobs = [{"text": f"job {n}"} | ({"job_id": f"j-{n}"} if named else {}) for n in range(1_000)]
    tickets = submit_many(jobs, system="Be brief.", max_tokens=8, redis=client)
    assert 1 <= Counting.sent <= most
    assert [ticket.id.encode() for ticket in tickets] == redis.lrange("rq:queue:radixq", 0, -1)
    assert payload(redis, tickets[999].id)["messages"][1]["content"] == "job 999"
    assert payload(redis, tickets[999].id)["sampling"] == {"max_tokens": 8}


def test_submit_many_takes_texts_and_lets_a_job_override_the_defaults(redis: Redis) -> None:
    jobs: Iterator[Any] = iter(["a", {"prompt": "b", "seed": 2}])
    first, second = submit_many(jobs, seed=1, redis=redis)
    assert payload(redis, first.id)["sampling"]["seed"] == 1
    assert payload(redis, second.id)["sampling"]["seed"] == 2


def test_no_job_is_no_error(redis: Redis) -> None:
    assert submit_many([], redis=redis) == []
    assert redis.dbsize() == 0


@pytest.mark.parametrize(
    ("jobs", "says"),
    [
        (["a", {"text": "b", "max_tokens": -1}], r"^jobs\[1\]: max_tokens=-1"),
        (["a", 5], r"^jobs\[1\]: is a int"),
        (["a", {"text": "b", "redis": "x"}], r"^jobs\[1\]: unknown field 'redis'"),
        (
            [{"text": "a", "job_id": "x"}, "b", {"text": "c", "job_id": "x"}],
            r"^jobs\[2\]: job_id='x' is also .* jobs\[0\]",
        ),
        ("abc", "must be a list of jobs"),
        ({"text": "a"}, "must be a list of jobs"),
    ],
)
def test_one_bad_job_among_many_is_named_and_none_is_written(jobs: Any, says: str, redis: Redis) -> None:
    with pytest.raises(InvalidRequest, match=says):
        submit_many(jobs, redis=redis)
    assert redis.dbsize() == 0


def test_a_taken_id_far_back_among_many_stops_all_of_them(redis: Redis) -> None:
    submit("first", job_id="taken", redis=redis)
    jobs: list[Any] = [f"job {n}" for n in range(CHUNK_JOBS)]
    with pytest.raises(InvalidRequest, match="job_id='taken'"):
        submit_many([*jobs, {"text": "second", "job_id": "taken"}], redis=redis)
    assert redis.llen("rq:queue:radixq") == 1


# --- connections -----------------------------------------------------------------------------------------------------


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


# --- without us ------------------------------------------------------------------------------------------------------


def _block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", (ROOT / "ops/WIRE.md").read_text(), re.DOTALL)
    assert found
    return found[1]


def _accepted(redis: Redis, job_id: str) -> GenerateJob:
    job = Job.fetch(job_id, connection=redis, serializer=JobSerializer)
    assert (job.func_name, job.origin, job.get_status(), job.retries_left) == ("radixq.generate", "radixq", "queued", 2)
    assert Queue("radixq", connection=redis, serializer=JobSerializer).job_ids == [job_id]
    SCHEMA.validate(job.args[0])
    return GenerateJob.model_validate(job.args[0])


def test_the_documented_job_of_plain_rq_is_one_of_ours(redis_url: str, redis: Redis, tmp_path: Path) -> None:
    job_id = documented.run(_block("python"), redis_url, tmp_path)
    job = _accepted(redis, job_id)
    assert job.messages
    assert job.messages[0].text == "Name three rivers of Europe."
    assert get(job_id, redis=redis_url).status() == "queued"


def test_the_documented_redis_commands_make_one_of_our_jobs(redis_url: str, redis: Redis) -> None:
    with redis.pipeline() as pipe:
        for line in _block("redis").splitlines():
            if line not in ("MULTI", "EXEC"):
                pipe.execute_command(*shlex.split(line))  # type: ignore[no-untyped-call]
        pipe.execute()
    assert _accepted(redis, "rivers-1").prompt == "Once upon a time"
    ticket = get("rivers-1", redis=redis_url)
    assert ticket.status() == "queued"
    assert ticket.cancel()
    with pytest.raises(GenerationFailed, match="cancelled"):
        ticket.result()


def test_our_jobs_can_be_read_with_rqs_own_json_serializer(redis: Redis) -> None:
    ticket = submit("h\u00e9", redis=redis)
    job = Job.fetch(ticket.id, connection=redis, serializer=JSONSerializer)
    assert job.args[0]["messages"][0]["content"] == "h\u00e9"
