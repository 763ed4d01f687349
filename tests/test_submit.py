"""`producer.submit`: what is written, one job or many, and how others write the same."""

from __future__ import annotations

import json
import re
import shlex
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from redis import ConnectionPool, Redis
from redis.connection import Connection
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.utils import as_text

from common import keys
from common.errors import GenerationFailed, InvalidRequest
from common.messages import GenerateJob, Result
from common.serializer import JobSerializer
from producer import get, submit, submit_many
from producer.request import parse
from producer.submit import CHUNK_JOBS
from tests import documented

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = Draft202012Validator(json.loads((ROOT / "ops/schema/generate_job.json").read_text()))
HELLO = [{"role": "user", "content": "hello"}]


def payload(redis: Redis, job_id: str) -> Any:
    """Return the job's one argument as it lies in Redis."""
    data: Any = redis.hget(f"rq:job:{job_id}", "data")
    name, instance, (argument,), keywords = json.loads(zlib.decompress(data))
    assert (name, instance, keywords) == ("radixq.generate", None, {})
    return argument


def texts(fields: Mapping[Any, Any]) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in fields.items()}


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
