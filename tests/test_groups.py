"""What a script is given as one text is what redis-py would have sent word by word, on a real server."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from redis import Redis
from rq.job import JobStatus

from common.words import texts
from worker import groups

RUN = groups.LUA + "while at < #ARGV do group(take() == '1') end"
WORDS = some.one_of(
    some.text(some.characters(exclude_categories=["Cs"])),
    some.integers(-(2**63), 2**64),
    some.floats(allow_nan=False),
    some.text(some.characters(exclude_categories=["Cs"])).map(str.encode),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(words=some.lists(WORDS, min_size=1, max_size=20))
def test_a_group_writes_what_its_commands_write(redis: Redis, words: list[Any]) -> None:
    redis.delete("plain", "grouped")
    with redis.pipeline() as pipe:
        pipe.rpush("grouped", *words)
        (group,) = groups.cut(pipe, [0])
        assert not pipe.command_stack
        pipe.rpush("plain", *words)
        pipe.execute()
    redis.eval(RUN, 0, "1", group)
    assert redis.lrange("grouped", 0, -1) == redis.lrange("plain", 0, -1)


def test_groups_are_cut_where_they_start_and_only_those_wanted_run(redis: Redis) -> None:
    with redis.pipeline() as pipe:
        for key, value in {"a": 1, "b": 2, "c": 0.1}.items():
            pipe.set(key, value)
        groups_ = groups.cut(pipe, [0, 2, 2])
    redis.eval(RUN, 0, "0", groups_[0], "1", groups_[1], "1", groups_[2])
    assert [redis.get(key) for key in "abc"] == [None, None, b"0.1"]


@pytest.mark.parametrize("number", [1e-7, 0.1, 1795415682.123, 2**53 + 1, -0.0, math.inf])
def test_numbers_are_those_of_redis_py(redis: Redis, number: float) -> None:
    redis.set("number", number)
    assert redis.get("number") == texts([number])[0].encode()


def test_a_word_of_an_enum_is_its_value() -> None:
    assert "-".join(texts([JobStatus.QUEUED])) == "queued"


@pytest.mark.parametrize("word", [None, True, ["a"]])
def test_what_redis_py_refuses_is_refused(word: Any) -> None:
    with pytest.raises(TypeError, match="make it text, bytes or a number"):
        texts([word])


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(UnicodeDecodeError):
        texts([b"\xff"])
