"""The process that reads the waiting jobs: what it offers, when, and that it never outlives its worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from common import keys
from common.errors import BrokerUnavailable, InternalError, ModelNotLoaded
from common.settings import Settings
from producer import submit
from tests import lethal
from tests.lethal import POISON
from tests.models import save_tiny
from tests.processes import ROOT, wait_until
from tests.queued import calls, enqueue, queue_of
from worker.scout import POLL_S, Candidate, Scout
from worker.suspects import Suspicion
from worker.watch import LATE_S, Clock
from worker.window import CLIENT_NAME

Start = Callable[..., Scout]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def start(redis_url: str, model: Path) -> Iterator[Start]:
    """Start scouts, and end them with the test."""
    scouts: list[Scout] = []

    def start_one(*queues: str, path: Path = model, clock: Clock = time.monotonic) -> Scout:
        settings = Settings.from_env({"MLX_MODEL_PATH": str(path)})
        scout = Scout(settings, queues or ("radixq",), redis_url=redis_url, clock=clock)
        scouts.append(scout)
        scout.start()
        return scout

    yield start_one
    for scout in scouts:
        scout.close()


def offers(scout: Scout, num: int = 1) -> list[Candidate]:
    """Wait until the scout has offered so many."""
    found: list[Candidate] = []

    def enough() -> bool:
        wait([scout.fileno()], 0.05)
        found.extend(scout.poll())
        return len(found) >= num

    wait_until(enough, f"{num} candidates are offered")
    return found


def wait_until_idle(scout: Scout) -> None:
    def idle() -> bool:
        wait([scout.fileno()], 0.05)
        assert scout.poll() == []
        return scout.idle()

    wait_until(idle, "the scout is idle")


def test_jobs_of_two_queues_wake_the_scout_and_idle_is_proven_anew_after_each(redis: Redis, start: Start) -> None:
    scout = start("radixq", "other")
    scout.want(4)
    wait_until_idle(scout)
    for queue in ("other", "radixq", "other"):
        (job,) = enqueue(redis, "hello", queue=queue)
        (candidate,) = offers(scout)
        assert (candidate.job_id, candidate.queue) == (job.id, queue)
        assert not scout.idle()
        redis.lrem(queue_of(redis, queue).key, 1, job.id)
        scout.settled([job.id])
        wait_until_idle(scout)
        assert not scout.idle()  # said once: the next answer needs a new look


def test_two_thousand_submitted_jobs_are_all_offered_while_the_queue_is_claimed(redis: Redis, start: Start) -> None:
    jobs = enqueue(redis, *[f"Question {number}: why?" for number in range(2_000)])
    scout = start()
    scout.want(50)
    seen: list[str] = []
    while len(seen) < len(jobs):
        found = [candidate.job_id for candidate in offers(scout)]
        with redis.pipeline() as pipe:
            for job_id in found:
                pipe.lrem(queue_of(redis).key, 1, job_id)
            assert pipe.execute() == [1] * len(found)
        scout.settled(found)
        seen += found
    assert sorted(seen) == sorted(job.id for job in jobs)
    wait_until_idle(scout)


def test_a_suspended_worker_gets_nothing_until_it_wants_again(redis: Redis, redis_url: str, start: Start) -> None:
    scout = start()
    ticket = submit("Hello", redis=redis_url)
    wait([scout.fileno()], 1.0)
    assert scout.poll() == []
    assert not scout.idle()
    scout.want(1)
    (candidate,) = offers(scout)
    assert candidate.job_id == ticket.id
    scout.want(0)
    scout.settled([ticket.id])  # left: it still waits
    wait([scout.fileno()], 0.5)
    assert scout.poll() == []
    scout.want(1)
    assert [candidate.job_id for candidate in offers(scout)] == [ticket.id]


def test_a_model_that_cannot_be_loaded_is_reported(start: Start, tmp_path: Path) -> None:
    scout = start(path=tmp_path)
    with pytest.raises(ModelNotLoaded, match=r"config\.json"):
        wait_until(scout.poll, "the error is reported")


def test_a_server_that_refuses_us_is_reported(redis: Redis, start: Start) -> None:
    redis.set(queue_of(redis).key, "not a list")
    scout = start()
    with pytest.raises(BrokerUnavailable, match="WRONGTYPE"):
        wait_until(scout.poll, "the error is reported")


def test_a_killed_scout_is_reported_and_a_signal_to_stop_is_not_for_it(start: Start) -> None:
    scout = start()
    wait_until_idle(scout)
    assert scout.pid is not None
    os.kill(scout.pid, signal.SIGINT)
    os.kill(scout.pid, signal.SIGTERM)
    wait_until_idle(scout)
    os.kill(scout.pid, signal.SIGKILL)
    with pytest.raises(InternalError, match="exit status -9"):
        wait_until(scout.poll, "the death is reported")


@pytest.mark.parametrize(("death", "status"), [("os.abort()", -6), ("raise BaseException", 1), ("os._exit(7)", 7)])
def test_the_job_of_which_a_scout_died_is_named_and_the_others_are_offered_by_a_new_one(
    redis: Redis, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, death: str, status: int
) -> None:
    for name, value in lethal.of_tokenising(tmp_path / "lethal", death).items():
        monkeypatch.setenv(name, value)
    first, poisoned, last = enqueue(redis, "one", f"two {POISON}", "three")
    scout = start()
    scout.want(3)
    while (culprit := offers(scout)[-1]).crash is None:
        assert culprit.job_id == first.id  # on a slow machine it is offered before
    assert culprit == Candidate(poisoned.id, keys.DEFAULT_QUEUE, limit=1, crash=status)
    redis.lrem(queue_of(redis).key, 1, poisoned.id)
    assert {candidate.job_id for candidate in offers(scout, 2)} == {first.id, last.id}
    scout.settled([first.id, last.id])
    redis.delete(queue_of(redis).key)
    wait_until_idle(scout)


def test_what_a_scout_died_of_before_is_prepared_when_all_others_are_offered(
    redis: Redis, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in lethal.of_tokenising(tmp_path / "lethal", "os.abort()").items():
        monkeypatch.setenv(name, value)
    poisoned, *others = enqueue(redis, POISON, *"abcd")
    redis.hset(keys.SUSPECTS, poisoned.id, str(Suspicion(limit=1, lone=1)))
    scout = start()
    scout.want(5)
    found = offers(scout, len(others) + 1)
    assert {one.job_id for one in found[:-1]} == {job.id for job in others}
    assert (found[-1].job_id, found[-1].crash) == (poisoned.id, -signal.SIGABRT)


def test_a_tokenizer_that_no_prompt_survives_is_reported_before_any_job_is_blamed(
    redis: Redis, start: Start, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in lethal.of_any_chat(tmp_path / "lethal", "os.abort()").items():
        monkeypatch.setenv(name, value)
    enqueue(redis, "one")
    scout = start()
    scout.want(1)
    with pytest.raises(ModelNotLoaded, match=f"tokenizer .*{model.name} ended its process over a single word"):
        offers(scout)


def test_a_chat_template_that_does_not_end_over_a_job_is_ended_and_the_job_blamed(
    redis: Redis, start: Start, tmp_path: Path
) -> None:
    path = save_tiny(tmp_path / "looping")
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    template = path / "chat_template.jinja"
    template.write_text(f"{{% if '{POISON}' in messages[0]['content'] %}}{endless}{{% endif %}}{template.read_text()}")
    now_s = [0.0]
    hangs, other = (submit(text, redis=redis) for text in (POISON, "Hello"))
    scout = start(path=path, clock=lambda: now_s[0])
    scout.want(2)
    wait_until(lambda: hangs.id in scout._diary.read(), "the job is begun")
    assert scout.poll() == []
    now_s[0] = LATE_S
    assert scout.poll() == []
    now_s[0] += 1
    (culprit,) = offers(scout)
    assert (culprit.job_id, culprit.crash) == (hangs.id, -signal.SIGABRT)
    redis.lrem(queue_of(redis).key, 1, hangs.id)
    assert [candidate.job_id for candidate in offers(scout)] == [other.id]


def test_a_server_that_is_away_is_waited_for(start: Start, redis: Redis) -> None:
    scout = start()
    scout.want(1)
    wait_until_idle(scout)
    for _ in range(3):
        redis.client_kill_filter(_type="normal", skipme=True)
    (job,) = enqueue(redis, "hello")
    assert [candidate.job_id for candidate in offers(scout)] == [job.id]


_PARENT = """
import sys, time
from common.settings import Settings
from worker.scout import Scout
scout = Scout(Settings.from_env({"MLX_MODEL_PATH": sys.argv[1]}), ["radixq"], redis_url=sys.argv[2])
scout.start()
while not scout.idle():
    scout.poll()
    time.sleep(0.02)
print("reads", flush=True)
time.sleep(600)
"""


def test_the_scout_ends_when_its_worker_is_killed(model: Path, redis: Redis, redis_url: str) -> None:
    command = [sys.executable, "-c", _PARENT, str(model), redis_url]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"reads\n"
        assert clients(redis)
        parent.kill()
    wait_until(lambda: not clients(redis), "the scout's connections are closed")


def clients(redis: Redis) -> list[Any]:
    return [client for client in redis.client_list() if client["name"] == CLIENT_NAME]


def test_a_scout_that_waits_does_no_work(redis: Redis, start: Start) -> None:
    scout = start("radixq", "other")
    wait_until_idle(scout)
    read = calls(redis, "hget")  # by the tests before this one, on the same server
    enqueue(redis, "x", model="other")  # a job that stays: it must not make the scout spin
    wait_until(lambda: calls(redis, "hget") > read, "the job was read")
    time.sleep(2 * POLL_S)
    before = {command: calls(redis, command) for command in ("hget", "lrange", "llen")}
    began = time.monotonic()
    time.sleep(1.0)
    asked = {command: calls(redis, command) - num for command, num in before.items()}
    num_polls = (time.monotonic() - began) / POLL_S + 2
    assert asked["hget"] == asked["lrange"] == 0
    assert asked["llen"] <= 2 * num_polls  # two queues
