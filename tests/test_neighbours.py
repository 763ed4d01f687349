"""Several workers on one server: each keeps to a subtree of the queue, and all of them are busy to the end."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

import pytest
from redis import Redis
from rq.suspension import resume, suspend

from common import keys
from producer import submit_many
from tests.models import save_tiny
from tests.processes import Processes, wait_until
from worker import label
from worker.group import Neighbours
from worker.neighbours import Neighbourhood

NUM_PREFIXES, NUM_WORKERS, ROWS, STARTS = 8, 4, 8, 16


@pytest.fixture
def neighbourhood(redis: Redis, redis_url: str) -> Callable[..., Neighbourhood]:
    def join(name: str, model: str = "tiny") -> Neighbourhood:
        redis.zadd(keys.WORKERS, {name: 0.0})
        return Neighbourhood(redis, name, model)

    return join


def test_a_worker_alone_has_no_neighbours(neighbourhood: Callable[..., Neighbourhood]) -> None:
    alone = neighbourhood("a")
    alone.tell(frozenset({1}))
    assert alone.read() is None


def test_neighbours_read_where_a_worker_is_and_where_it_was(neighbourhood: Callable[..., Neighbourhood]) -> None:
    first, second = neighbourhood("a"), neighbourhood("b")
    first.tell(frozenset({1, 2}))
    first.tell(frozenset({1, 3}))
    second.tell(frozenset({4}))
    expected = Neighbours(frozenset({1, 3}), senior=frozenset({1, 3}), held=frozenset({2}), own=frozenset({4}))
    assert second.read() == expected
    assert first.read() == Neighbours(frozenset({4}), own=frozenset({1, 2, 3}))


def test_a_worker_that_ran_out_of_jobs_is_nowhere(neighbourhood: Callable[..., Neighbourhood]) -> None:
    first, second = neighbourhood("a"), neighbourhood("b")
    first.tell(frozenset({1}))
    first.tell(frozenset())
    assert second.read() == Neighbours(frozenset(), held=frozenset({1}))


def test_workers_of_another_model_are_no_neighbours(neighbourhood: Callable[..., Neighbourhood]) -> None:
    first, second = neighbourhood("a", "llama"), neighbourhood("b", "llama.2")
    first.tell(frozenset({1}))
    assert second.read() == Neighbours(frozenset())


def test_what_a_worker_told_vanishes_with_it(redis: Redis, neighbourhood: Callable[..., Neighbourhood]) -> None:
    neighbourhood("a").tell(frozenset({1}))
    assert 0 < redis.ttl(keys.prefixes("a")) <= keys.PREFIXES_TTL_S


def test_a_worker_publishes_a_bounded_number_of_prefixes(
    redis: Redis, neighbourhood: Callable[..., Neighbourhood]
) -> None:
    worker = neighbourhood("a")
    for mark in range(1_000):
        worker.tell(frozenset({mark, mark + 1}))
    assert redis.scard(keys.prefixes("a")) <= 200


def test_a_label_that_a_live_process_has_gets_a_number(tmp_path: Path, processes: Processes) -> None:
    program = "import sys; from pathlib import Path; from worker import label; print(label.claim('mac', Path(sys.argv[1])))"
    other = processes.python("-c", f"{program}; sys.stdin.close(); import time; time.sleep(600)", tmp_path)
    other.wait_for_log("mac\n")
    assert label.claim("mac", tmp_path) == "mac-2"
    assert label.claim("mac", tmp_path) == "mac-3"
    other.kill()
    assert label.claim("mac", tmp_path) == "mac"


def test_a_home_that_cannot_be_written_gives_a_label_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "labels").write_text("in the way")
    assert label.claim("mac", tmp_path) == f"mac-{os.getpid()}"


def distinct_per_16_starts(prefixes: Sequence[int]) -> float:
    return mean(len(set(prefixes[at : at + STARTS])) for at in range(0, len(prefixes) - STARTS + 1))


@pytest.mark.parametrize(
    "num_jobs", [pytest.param(400, marks=pytest.mark.timeout(600)), pytest.param(2_000, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])]
)
def test_four_workers_share_the_queue_by_prefixes_and_none_of_them_starves(
    redis: Redis, redis_url: str, processes: Processes, tmp_path: Path, num_jobs: int
) -> None:
    model = save_tiny(tmp_path / "tiny", hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    suspend(redis)
    env = {"RADIXQ_MAX_ROWS": str(ROWS)}
    workers = [processes.rq_worker(redis_url, model=model, env=env) for _ in range(NUM_WORKERS)]
    for worker in workers:
        worker.wait_for_log("ready", within_s=300)
    family = [f"You are helper number {number}. " + f"{number} is your number. " * 12 for number in range(NUM_PREFIXES)]
    order = [hash((number * 7919) % num_jobs) % NUM_PREFIXES for number in range(num_jobs)]
    requests = [
        {"prompt": f"{family[prefix]}Question {number}?", "max_tokens": 4} for number, prefix in enumerate(order)
    ]
    tickets = submit_many(requests, redis=redis_url)
    resume(redis)
    wait_until(lambda: done(redis) == num_jobs, "all jobs are finished", within_s=1000, every_s=0.2)
    assert [worker.stop() for worker in workers] == [0] * NUM_WORKERS

    with redis.pipeline(transaction=False) as pipe:
        for ticket in tickets:
            pipe.hmget(keys.result(ticket.id), "worker", "started_at", "status", "attempts")
        results = pipe.execute()
    assert {(status, attempts) for _, _, status, attempts in results} == {(b"finished", b"1")}
    starts = sorted((at, prefix, name) for (name, at, _, _), prefix in zip(results, order, strict=True))
    names = {name for _, _, name in starts}
    assert len(names) == NUM_WORKERS
    for name in names:
        mine = [prefix for _, prefix, worker in starts if worker == name]
        print(name, len(mine), distinct_per_16_starts(mine), max(i for i, s in enumerate(starts) if s[2] == name))
    print("pairs", len({(p, n) for _, p, n in starts}), "all", distinct_per_16_starts([p for _, p, _ in starts]))


def done(redis: Redis) -> int:
    return sum(int(redis.hget(name, "jobs_finished") or 0) for name in redis.scan_iter("radixq:metrics:*"))
