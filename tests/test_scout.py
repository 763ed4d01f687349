"""The process that reads the waiting jobs: what it offers, when, and that it never outlives its worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer

from common import keys
from common.errors import BrokerUnavailable, InternalError, ModelNotLoaded
from common.settings import Settings
from producer import submit
from tests import lethal
from tests.lethal import POISON
from tests.models import save_tiny, tiny_tokenizer
from tests.processes import ROOT, wait_until
from worker.model import LoadedTokenizer, load_tokenizer
from worker.reject import to_bytes
from worker.scout import POLL_S, Candidate, Scout
from worker.suspects import Suspicion
from worker.window import CLIENT_NAME, Window, connect

Start = Callable[..., Scout]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def loaded(model: Path) -> LoadedTokenizer:
    return load_tokenizer(str(model))


@pytest.fixture
def start(redis_url: str, model: Path) -> Iterator[Start]:
    """Start scouts, and end them with the test."""
    scouts: list[Scout] = []

    def start_one(*queues: str, path: Path = model) -> Scout:
        settings = Settings.from_env({"MLX_MODEL_PATH": str(path)})
        scout = Scout(settings, queues or ("radixq",), redis_url=redis_url)
        scouts.append(scout)
        scout.start()
        return scout

    yield start_one
    for scout in scouts:
        scout.close()


@pytest.fixture
def window(redis_url: str, loaded: LoadedTokenizer) -> Iterator[Window]:
    with connect(redis_url) as client:
        yield Window(Settings.from_env({}), loaded, ["radixq"], client)


def queue_of(redis: Redis, name: str = keys.DEFAULT_QUEUE) -> Queue:
    return Queue(name, connection=redis, serializer=JSONSerializer)


def enqueue(redis: Redis, *prompts: str, queue: str = keys.DEFAULT_QUEUE, **fields: Any) -> list[Job]:
    jobs = [Queue.prepare_data(keys.GENERATE, ({"prompt": prompt, **fields},)) for prompt in prompts]
    return queue_of(redis, queue).enqueue_many(jobs)


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


def read_all(window: Window) -> None:
    window.look()
    while window.busy:
        window.fetch()
        window.prepare(1.0)


def calls(redis: Redis, command: str) -> int:
    """Count how often the server was asked for this."""
    stats: dict[str, dict[str, int]] = redis.info("commandstats")
    return stats.get(f"cmdstat_{command}", {"calls": 0})["calls"]


def claim(redis: Redis, job_id: str) -> None:
    assert redis.lrem(queue_of(redis).key, 1, job_id) == 1


# -- the window, in this process ---------------------------------------------------------------------------------------


def test_jobs_are_offered_in_the_order_of_the_plan_and_once(redis: Redis, window: Window) -> None:
    family = "You are a helpful assistant who answers briefly. "
    first, alone, second = enqueue(redis, family + "one", "alone", family + "two")
    read_all(window)
    one, two, three = window.offer(5)
    assert [one.job_id, two.job_id, three.job_id] == [first.id, second.id, alone.id]
    assert one.prompt is not None
    assert two.prompt is not None
    assert one.prompt.branches == two.prompt.branches != ()
    assert one.prompt.tokens.tolist() == tiny_tokenizer().encode(family + "one")
    read_all(window)
    assert window.offer(5) == []


def test_no_more_than_wanted_is_offered_and_not_settled(redis: Redis, window: Window) -> None:
    enqueue(redis, *"abcde")
    read_all(window)
    first = window.offer(2)
    assert len(first) == 2
    assert window.offer(2) == []
    claim(redis, first[0].job_id)
    window.settle([first[0].job_id])
    assert len(window.offer(2)) == 1
    assert window.offer(0) == []


def test_a_settled_job_that_still_waits_is_new_and_one_that_was_claimed_is_forgotten(
    redis: Redis, window: Window
) -> None:
    claimed, left = enqueue(redis, "one", "two")
    read_all(window)
    assert len(window.offer(2)) == 2
    claim(redis, claimed.id)
    window.settle([claimed.id, left.id])
    assert window.offer(2) == []  # not before the queue was read again
    read_all(window)
    assert [candidate.job_id for candidate in window.offer(2)] == [left.id]


def test_a_short_queue_may_be_read_again_at_once_and_a_long_one_not(redis: Redis, window: Window) -> None:
    enqueue(redis, "one")
    window.look()
    assert window.earliest <= time.monotonic()
    enqueue(redis, *map(str, range(1_000)))

    def has_to_wait() -> bool:
        enqueue(redis, "another")
        window.look()
        return window.earliest > time.monotonic()

    wait_until(has_to_wait, "a look at a long queue puts off the next one")


def test_a_job_cancelled_while_it_waits_is_not_offered(redis: Redis, window: Window) -> None:
    cancelled, stays = enqueue(redis, "one", "two")
    read_all(window)
    cancelled.cancel()
    window.look()
    assert [candidate.job_id for candidate in window.offer(2)] == [stays.id]
    claim(redis, stays.id)
    window.settle([stays.id])
    read_all(window)
    assert window.nothing_to_offer


def test_jobs_of_another_model_or_a_newer_version_stay_and_do_not_keep_the_worker(redis: Redis, window: Window) -> None:
    enqueue(redis, "x", model="other")
    enqueue(redis, "x", v=99, thoughts=["unknown to us"])
    read_all(window)
    assert window.offer(9) == []
    assert window.nothing_to_offer
    assert not window.empty
    (ours,) = enqueue(redis, "x", model="tiny")
    read_all(window)
    assert [candidate.job_id for candidate in window.offer(9)] == [ours.id]


def test_what_cannot_be_run_is_offered_with_the_reason(redis: Redis, window: Window) -> None:
    unknown, long = enqueue(redis, "x", best_of=3), enqueue(redis, "x" * 5_000)
    foreign = queue_of(redis).enqueue("os.getcwd")
    pickled = Queue(keys.DEFAULT_QUEUE, connection=redis).enqueue("os.getcwd")
    redis.rpush(queue_of(redis).key, "ghost")
    read_all(window)
    refused = {candidate.job_id: candidate.refusal for candidate in window.offer(9)}
    codes = {job_id: refusal.code for job_id, refusal in refused.items() if refusal is not None}
    assert codes == {
        unknown[0].id: "invalid_request",
        long[0].id: "context_length_exceeded",
        foreign.id: "invalid_request",
        pickled.id: "invalid_request",
        "ghost": "invalid_request",
    }


def test_an_id_that_rq_refuses_is_offered_as_a_refusal_whatever_its_bytes(redis: Redis, window: Window) -> None:
    strange = [b"my.job", b"", b"a\nb", b"\xff"]
    redis.rpush(f"rq:queue:{keys.DEFAULT_QUEUE}", *strange)
    (job,) = enqueue(redis, "once")
    read_all(window)
    offers = {to_bytes(candidate.job_id): candidate.refusal is None for candidate in window.offer(5)}
    assert offers == dict.fromkeys(strange, False) | {job.id.encode(): True}


def test_a_key_that_is_no_hash_is_a_refusal_and_no_end_of_the_scout(redis: Redis, window: Window) -> None:
    redis.rpush(f"rq:queue:{keys.DEFAULT_QUEUE}", "spoiled")
    redis.rpush("rq:job:spoiled", "a list")
    (job,) = enqueue(redis, "once")
    read_all(window)
    assert {candidate.job_id: candidate.refusal is None for candidate in window.offer(5)} == {
        "spoiled": False,
        job.id: True,
    }


def test_a_job_expires_without_room_and_whosever_it_is(redis: Redis, window: Window) -> None:
    soon = (datetime.now(UTC) + timedelta(seconds=1)).isoformat()
    late = datetime(2020, 1, 1, tzinfo=UTC).isoformat()
    (ours,) = enqueue(redis, "ours", expires_at=soon)
    (others,) = enqueue(redis, "of another model", expires_at=late, model="other")
    (early,) = enqueue(redis, "early", expires_at=datetime(2100, 1, 1, tzinfo=UTC).isoformat())
    read_all(window)
    window.expire()
    (first,) = window.offer(0)
    assert (first.job_id, first.refusal and first.refusal.code) == (others.id, "expired")
    time.sleep(1.1)
    window.expire()
    (second,) = window.offer(0)
    assert (second.job_id, second.refusal and second.refusal.code) == (ours.id, "expired")
    (third,) = [candidate for candidate in window.offer(9) if candidate.prompt]
    assert third.job_id == early.id
    assert third.expires_s == datetime(2100, 1, 1, tzinfo=UTC).timestamp()


def test_a_payload_over_the_limit_is_refused_without_being_fetched(
    redis: Redis, redis_url: str, loaded: LoadedTokenizer
) -> None:
    (job,) = enqueue(redis, os.urandom(2_000).hex())
    before = calls(redis, "hget")
    with connect(redis_url) as client:
        window = Window(Settings.from_env({"RADIXQ_MAX_JOB_BYTES": "200"}), loaded, ["radixq"], client)
        read_all(window)
        (candidate,) = window.offer(1)
    assert candidate.job_id == job.id
    assert candidate.refusal is not None
    assert "RADIXQ_MAX_JOB_BYTES" in candidate.refusal.message
    assert calls(redis, "hget") == before


def test_a_window_reads_no_more_jobs_and_bytes_than_it_may(
    redis: Redis, redis_url: str, loaded: LoadedTokenizer
) -> None:
    enqueue(redis, *[f"{number} " + "x" * 2_000 for number in range(300)])
    with connect(redis_url) as client:
        by_jobs = Window(Settings.from_env({"RADIXQ_WINDOW_JOBS": "10"}), loaded, ["radixq"], client)
        by_bytes = Window(Settings.from_env({"RADIXQ_WINDOW_BYTES": "100000"}), loaded, ["radixq"], client)
        for window in (by_jobs, by_bytes):
            read_all(window)
            assert not window.busy
        assert len(by_jobs.offer(300)) == 10
        assert 10 < len(by_bytes.offer(300)) < 300
        assert by_bytes.busy  # room again, or the worker would starve


def test_stop_strings_count_as_bytes_of_the_window(redis: Redis, redis_url: str, loaded: LoadedTokenizer) -> None:
    enqueue(redis, *[f"{number}" for number in range(100)], sampling={"stop": ["x" * 10_000]})
    with connect(redis_url) as client:
        window = Window(Settings.from_env({"RADIXQ_WINDOW_BYTES": "100000"}), loaded, ["radixq"], client)
        read_all(window)
        first = window.offer(100)
        assert len(first) < 100
        window.settle([candidate.job_id for candidate in first])
        read_all(window)
        assert 0 < len(window.offer(100)) < 100  # what left made room


def test_a_waiting_job_takes_little_memory_beyond_its_own_tokens(
    redis: Redis, redis_url: str, loaded: LoadedTokenizer
) -> None:
    num_jobs, head = 2_000, "You are a helpful assistant who answers briefly. " * 20
    enqueue(redis, *[f"{head} Question {number}?" for number in range(num_jobs)])
    with connect(redis_url) as client:
        window = Window(Settings.from_env({}), loaded, ["radixq"], client)
        tracemalloc.start()
        try:
            read_all(window)
            held, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert len(window.offer(num_jobs)) == num_jobs
    assert held < 4_000 * num_jobs


def test_a_queue_of_higher_priority_is_read_and_offered_first(
    redis: Redis, redis_url: str, loaded: LoadedTokenizer
) -> None:
    low, high = enqueue(redis, "low", queue="low"), enqueue(redis, "high", queue="high")
    with connect(redis_url) as client:
        window = Window(Settings.from_env({}), loaded, ["high", "low"], client)
        read_all(window)
        offered = window.offer(2)
    assert [(candidate.job_id, candidate.queue) for candidate in offered] == [(high[0].id, "high"), (low[0].id, "low")]


# -- the process -------------------------------------------------------------------------------------------------------


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


def test_a_suspect_that_has_no_name_suspects_nobody(redis: Redis, window: Window) -> None:
    (job,) = enqueue(redis, "hello")
    redis.hset(keys.SUSPECTS, b"\xff", str(Suspicion(limit=1)))
    window.look()
    window.fetch()
    window.prepare(1.0)
    assert [(one.job_id, one.limit) for one in window.offer(1)] == [(job.id, 0)]


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
