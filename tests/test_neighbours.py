"""Several workers on one server: each keeps to a subtree of the queue, and all of them are busy to the end."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

import pytest
from redis import Redis
from rq.suspension import resume, suspend

from common import keys
from common.errors import SettingsError
from producer import submit_many
from tests.models import save_tiny
from tests.processes import Process, Processes, wait_until
from worker import label
from worker.group import Neighbours
from worker.neighbours import Neighbourhood, ask_who

NUM_PREFIXES, NUM_WORKERS, NUM_JOBS = 8, 4, 2_000
Join = Callable[..., Neighbourhood]
CLAIM = "import sys, time, pathlib, worker.label; print(worker.label.claim('mac', pathlib.Path(sys.argv[1])))"


@pytest.fixture
def neighbourhood(redis: Redis, redis_url: str) -> Join:
    def join(name: str, model: str = "tiny") -> Neighbourhood:
        redis.zadd(keys.WORKERS, {name: 0.0})
        return Neighbourhood(redis, name, model)

    return join


def heard(redis: Redis, worker: Neighbourhood) -> Neighbours | None:
    with redis.pipeline(transaction=False) as pipe:
        ask_who(pipe)
        return worker.read(*pipe.execute())


def test_a_worker_alone_has_no_neighbours(redis: Redis, neighbourhood: Join) -> None:
    alone = neighbourhood("a")
    alone.tell(frozenset({1}))
    assert heard(redis, alone) is None


def test_neighbours_read_where_a_worker_is_and_where_it_was(redis: Redis, neighbourhood: Join) -> None:
    first, second = neighbourhood("a"), neighbourhood("b")
    first.tell(frozenset({1, 2}))
    first.tell(frozenset({1, 3}))
    second.tell(frozenset({4}))
    expected = Neighbours(frozenset({1, 3}), senior=frozenset({1, 3}), held=frozenset({2}), own=frozenset({4}))
    assert heard(redis, second) == expected
    assert heard(redis, first) == Neighbours(frozenset({4}), own=frozenset({1, 2, 3}))


def test_a_worker_that_ran_out_of_jobs_is_nowhere(redis: Redis, neighbourhood: Join) -> None:
    first, second = neighbourhood("a"), neighbourhood("b")
    first.tell(frozenset({1}))
    first.tell(frozenset())
    assert heard(redis, second) == Neighbours(frozenset(), held=frozenset({1}))


def test_workers_of_another_model_are_no_neighbours(redis: Redis, neighbourhood: Join) -> None:
    first, second = neighbourhood("a", "llama"), neighbourhood("b", "llama.2")
    first.tell(frozenset({1}))
    assert heard(redis, second) == Neighbours(frozenset())


def test_what_a_worker_told_vanishes_with_it(redis: Redis, neighbourhood: Join) -> None:
    neighbourhood("a").tell(frozenset({1}))
    assert 0 < redis.ttl(keys.prefixes("a")) <= keys.PREFIXES_TTL_S


def test_a_worker_publishes_a_bounded_number_of_prefixes(redis: Redis, neighbourhood: Join) -> None:
    worker = neighbourhood("a")
    for mark in range(1_000):
        worker.tell(frozenset({mark, mark + 1}))
    assert redis.scard(keys.prefixes("a")) <= 200


def test_a_label_that_a_live_process_has_gets_a_number(tmp_path: Path, processes: Processes) -> None:
    other = processes.python("-c", f"{CLAIM}; time.sleep(600)", tmp_path)
    other.wait_for_log("mac\n")
    assert label.claim("mac", tmp_path) == "mac-2"
    assert label.claim("mac", tmp_path) == "mac-3"
    other.kill()
    assert label.claim("mac", tmp_path) == "mac"


def test_a_home_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "labels").write_text("in the way")
    with pytest.raises(SettingsError, match="RADIXQ_HOME cannot be used.*name a directory that can be written"):
        label.claim("mac", tmp_path)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1_200)
def test_four_workers_share_the_queue_by_prefixes_and_all_are_busy_to_the_end(
    redis: Redis, redis_url: str, processes: Processes, tmp_path: Path
) -> None:
    suspend(redis)
    workers = start_workers(processes, redis_url, tmp_path / "tiny")
    order = random.Random(0).choices(range(NUM_PREFIXES), k=NUM_JOBS)
    family = [f"You are helper number {number}. " + f"{number} is your number. " * 12 for number in range(NUM_PREFIXES)]
    texts = [f"{family[prefix]}Question {number}?" for number, prefix in enumerate(order)]
    before = lengths_asked(redis)
    tickets = submit_many([{"prompt": text} for text in texts], redis=redis_url, max_tokens=16)
    known = before + NUM_WORKERS * NUM_JOBS
    wait_until(lambda: lengths_asked(redis) >= known, "every worker knows all jobs", within_s=500)
    resume(redis)
    wait_until(lambda: num_finished(redis) >= NUM_JOBS, "all jobs are finished", within_s=500, every_s=0.2)
    assert [worker.stop() for worker in workers] == [0] * NUM_WORKERS
    assert num_finished(redis) == NUM_JOBS

    with redis.pipeline(transaction=False) as pipe:
        for ticket in tickets:
            pipe.hmget(keys.result(ticket.id), "started_at", "worker", "status", "attempts")
        results = pipe.execute()
    assert {(status, attempts) for _, _, status, attempts in results} == {(b"finished", b"1")}
    starts = sorted((at, prefix, name) for (at, name, _, _), prefix in zip(results, order, strict=True))
    names = [name for _, _, name in starts]
    assert len(set(names)) == NUM_WORKERS
    for name in set(names):
        assert names.count(name) > NUM_JOBS / NUM_WORKERS / 4
        assert name in names[-NUM_JOBS // 4 :]
        assert distinct_per_16_starts([prefix for _, prefix, worker in starts if worker == name]) <= 3.0
    assert distinct_per_16_starts(order) > 6.0  # the order of arrival


def start_workers(processes: Processes, url: str, model: Path) -> list[Process]:
    save_tiny(model, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    workers = [processes.rq_worker(url, model=model, env={"RADIXQ_MAX_ROWS": "8"}) for _ in range(NUM_WORKERS)]
    for worker in workers:
        worker.wait_for_log("ready", within_s=300)
    return workers


def distinct_per_16_starts(prefixes: Sequence[int]) -> float:
    return mean(len(set(prefixes[at : at + 16])) for at in range(len(prefixes) - 15))


def lengths_asked(redis: Redis) -> int:
    """Count payloads whose length was asked for: once by each worker that reads a job."""
    stats: dict[str, dict[str, int]] = redis.info("commandstats")
    return stats.get("cmdstat_hstrlen", {"calls": 0})["calls"]


def num_finished(redis: Redis) -> int:
    found = [redis.hget(name, "jobs_finished") for name in redis.scan_iter(keys.metrics("*"))]
    return sum(int(number or 0) for number in found)
