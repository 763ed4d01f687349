"""`radixq dead`: what the owner does about jobs that were given up."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from redis import Redis
from rq.job import Job, JobStatus
from rq.registry import FailedJobRegistry

from common import keys
from common.errors import InvalidRequest
from common.serializer import JobSerializer
from producer import get, submit
from producer.cli import main
from tests.test_takeover import Host
from worker.suspects import LONE_SPOKE

Given = list[Job]


@pytest.fixture
def given_up(redis_url: str, redis: Redis, tmp_path: Path) -> Iterator[Given]:
    """Two jobs, each of which crashed its worker alone until it was given up."""
    ids = [submit("a secret", redis=redis_url, job_id=name, max_tokens=3).id for name in ("one", "two")]
    jobs = [Job.fetch(job_id, redis, JobSerializer) for job_id in ids]
    with ExitStack() as hosts:
        for job in jobs:
            give_up(hosts, redis_url, tmp_path, job)
        yield jobs


def give_up(hosts: ExitStack, redis_url: str, home: Path, job: Job) -> Host:
    """Let a job crash workers until it is given up; return the one that did that."""
    for _ in range(LONE_SPOKE):
        crashed, other = Host(redis_url, home), Host(redis_url, home)
        hosts.callback(crashed.close)
        hosts.callback(other.close)
        crashed.take(job, limit=1)
        crashed.die("Fatal Python error: Aborted\n")
        other.pump.recover()
    return other


def waiting(redis: Redis) -> list[bytes]:
    ids: list[bytes] = redis.lrange("rq:queue:radixq", 0, -1)  # type: ignore[assignment]
    return ids


@pytest.fixture
def run(redis_url: str, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def run(*words: str) -> tuple[int, str]:
        code = main(["dead", *words, "--redis", redis_url])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


def test_list_shows_who_was_given_up_and_why_without_any_prompt(
    given_up: Given, run: Callable[..., tuple[int, str]]
) -> None:
    code, text = run("list")
    assert code == 0
    lines = text.splitlines()
    assert [line.split()[0] for line in lines] == ["one", "two"]
    assert all("worker_crashed" in line for line in lines)
    assert "secret" not in text
    entries = json.loads(run("list", "--json")[1])
    assert [entry["crashes"] for entry in entries] == [str(LONE_SPOKE)] * 2


def test_requeue_lets_the_job_run_again_as_if_nothing_had_been(
    given_up: Given, run: Callable[..., tuple[int, str]], redis: Redis, redis_url: str
) -> None:
    assert run("requeue", "two") == (0, "two\n")
    assert [entry["job_id"] for entry in json.loads(run("list", "--json")[1])] == ["one"]
    assert waiting(redis) == [b"two"]
    job = given_up[1]
    assert job.get_status() == JobStatus.QUEUED
    assert redis.ttl(job.key) == redis.ttl(keys.result("two")) == -1
    assert redis.zcard("rq:failed:radixq") == 1
    assert get("two", redis=redis_url).status() == "queued"
    assert json.loads(run("requeue", "--all", "--json")[1]) == [{"job_id": "one"}]
    assert waiting(redis) == [b"two", b"one"]


@pytest.mark.parametrize("ours", [True, False])
def test_a_job_that_is_queued_again_keeps_its_prompt_its_pictures_and_its_record_until_it_ends(
    run: Callable[..., tuple[int, str]], redis: Redis, redis_url: str, tmp_path: Path, ours: bool
) -> None:
    ticket = submit("what?", images=[Image.new("RGB", (9, 9), "red")], redis=redis_url, idempotency_key="once")
    job = Job.fetch(ticket.id, redis, JobSerializer)
    pictures: Any = redis.keys("radixq:image:*")
    (picture,) = [key for key in pictures if not key.endswith(b":jobs")]
    kept = (picture, job.key, keys.result(job.id), keys.idempotency("once"))
    with ExitStack() as hosts:
        host = give_up(hosts, redis_url, tmp_path, job)
        assert all(redis.ttl(key) > 0 for key in kept)
        if ours:
            assert run("requeue", job.id) == (0, f"{job.id}\n")
        else:
            FailedJobRegistry("radixq", redis, serializer=JobSerializer).requeue(job.id)
            host.pump.sweep()
        assert [redis.ttl(key) for key in kept] == [-1] * len(kept)
        assert redis.zrange(f"{picture.decode()}:jobs", 0, -1) == [job.id.encode()]
        assert redis.hget(keys.result(job.id), "status") == b"queued"
        assert redis.hexists(keys.result(job.id), "error_code") is False
        host.pump.sweep()
        (flight,) = host.take(job)
        host.pump.flights[flight.id] = flight
        assert flight.attempts == LONE_SPOKE + 1
        host.pump.outbox.put(flight, InvalidRequest("a reason"))
        list(host.pump.outbox.flush(1))
        assert all(redis.ttl(key) > 0 for key in kept)


def test_purge_deletes_the_prompt_and_keeps_the_result(
    given_up: Given, run: Callable[..., tuple[int, str]], redis: Redis, redis_url: str
) -> None:
    assert run("purge", "--all") == (0, "one\ntwo\n")
    assert run("list") == (0, "")
    assert redis.exists(*(job.key for job in given_up)) == 0
    assert redis.zcard("rq:failed:radixq") == 0
    assert get("one", redis=redis_url).status() == "failed"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["requeue", "three"], "no job 'three' was given up"),
        (["purge"], "requeue and purge take ids, or --all"),
        (["purge", "one", "--all"], "requeue and purge take ids, or --all"),
        (["list", "one"], "list takes nothing more"),
    ],
)
def test_a_wrong_use_is_one_line_and_exit_code_2(
    run: Callable[..., tuple[int, str]], words: list[str], message: str
) -> None:
    code, text = run(*words)
    assert code == 2
    assert message in text
    assert text.count("\n") == 1


def test_a_job_whose_prompt_is_gone_is_not_queued(
    given_up: Given, run: Callable[..., tuple[int, str]], redis: Redis
) -> None:
    redis.delete(given_up[0].key)
    code, text = run("requeue", "one")
    assert code == 2
    assert "its prompt is gone" in text
    assert waiting(redis) == []
    assert run("purge", "one") == (0, "one\n")
