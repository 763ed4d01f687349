"""A wrong argument of `submit` is refused by its name and its rule before anything is written."""

from __future__ import annotations

import json
import math
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from redis import Redis

from common.errors import InvalidRequest, SettingsError, Unsupported
from producer import submit, submit_many
from producer.request import parse

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = Draft202012Validator(json.loads((ROOT / "ops/schema/generate_job.json").read_text()))
HELLO = [{"role": "user", "content": "hello"}]
NAN, INF = math.nan, math.inf


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


@pytest.mark.parametrize("jobs", ["abc", b"abc", {"text": "a"}, 3, None])
def test_many_jobs_that_are_no_list_are_refused(jobs: Any) -> None:
    with pytest.raises(InvalidRequest, match="jobs must be a list of jobs; for one job use submit"):
        submit_many(jobs)


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
