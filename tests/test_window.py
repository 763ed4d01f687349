"""What is known of the waiting jobs: which are offered, in which order, and how much is read at a time."""

from __future__ import annotations

import os
import time
import tracemalloc
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from redis import Redis
from rq import Queue

from common import keys
from common.settings import Settings
from tests.models import save_tiny, tiny_tokenizer
from tests.processes import wait_until
from tests.queued import calls, claim, enqueue, queue_of
from worker.reader import LoadedTokenizer, load_tokenizer
from worker.reject import to_bytes
from worker.suspects import Suspicion
from worker.window import Window, connect


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def loaded(model: Path) -> LoadedTokenizer:
    return load_tokenizer(str(model))


@pytest.fixture
def window(redis_url: str, loaded: LoadedTokenizer) -> Iterator[Window]:
    with connect(redis_url) as client:
        yield Window(Settings.from_env({}), loaded, ["radixq"], client)


def read_all(window: Window) -> None:
    window.look()
    while window.busy:
        window.fetch()
        window.prepare(1.0)


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


def test_a_suspect_that_has_no_name_suspects_nobody(redis: Redis, window: Window) -> None:
    (job,) = enqueue(redis, "hello")
    redis.hset(keys.SUSPECTS, b"\xff", str(Suspicion(limit=1)))
    window.look()
    window.fetch()
    window.prepare(1.0)
    assert [(one.job_id, one.limit) for one in window.offer(1)] == [(job.id, 0)]


def test_a_job_that_comes_alone_brings_its_payload_with_its_id(redis: Redis, window: Window) -> None:
    read_all(window)
    (job,) = enqueue(redis, "alone")
    window.look()
    redis.delete(job.key)  # nothing more is asked of the server
    window.fetch()
    window.prepare(1.0)
    (candidate,) = window.offer(5)
    assert candidate.prompt is not None
    assert candidate.prompt.tokens.tolist() == tiny_tokenizer().encode("alone")


def test_what_was_asked_of_empty_queues_is_a_look_and_counts_only_while_they_were(redis: Redis, window: Window) -> None:
    read_all(window)
    pipe = redis.pipeline(transaction=False)
    window.ask(pipe)
    (first,) = enqueue(redis, "alone")
    answers = pipe.execute()
    window.look(list(answers))
    window.fetch()
    window.prepare(1.0)
    assert [candidate.job_id for candidate in window.offer(5)] == [first.id]
    (second,) = enqueue(redis, "another")
    window.look(list(answers))  # the queue holds a job by now: what was known before it is not used
    window.fetch()
    window.prepare(1.0)
    assert [candidate.job_id for candidate in window.offer(5)] == [second.id]


def test_what_was_asked_while_a_queue_held_jobs_is_a_look_once_all_are_empty(redis: Redis, window: Window) -> None:
    (stays,) = enqueue(redis, "alone")
    read_all(window)
    pipe = redis.pipeline(transaction=False)
    window.ask(pipe)
    redis.delete(queue_of(redis).key)
    read_all(window)
    assert window.empty
    (job,) = enqueue(redis, "another")
    window.look(pipe.execute())
    window.fetch()
    window.prepare(1.0)
    assert [candidate.job_id for candidate in window.offer(5)] == [job.id] != [stays.id]
