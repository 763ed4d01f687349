"""Taking over from dead workers, in the process of the test: which are dead, and what becomes of what they had."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from rq import Queue, Retry, executions, registry
from rq.job import Job, JobStatus
from rq.worker import Worker

from common import keys
from common.errors import SettingsError
from common.serializer import JobSerializer
from common.settings import Settings
from tests.processes import ROOT
from worker import leases, life
from worker.app import BatchWorker
from worker.flight import Flight
from worker.leases import LEASE_S
from worker.life import Life
from worker.pump import Pump
from worker.runner import Runner
from worker.scout import Candidate, Scout
from worker.suspects import LONE_SILENT, LONE_SPOKE, Suspicion


class Host:
    """A worker without an engine on a machine of its own, which is its home directory."""

    def __init__(self, url: str, home: Path, *queues: str) -> None:
        self.redis = Redis.from_url(url)
        self.settings = Settings.from_env({"RADIXQ_HOME": str(home)})
        self.worker = BatchWorker(list(queues or ("radixq",)), connection=self.redis, settings=self.settings)
        self.scout = Scout(self.settings, ["radixq"])
        self.pump = Pump(self.worker, self.settings, "mac", Runner(self.settings), self.scout)
        self.worker._pump = self.pump
        self.life = self.worker._life
        self.life.begin()
        self.worker.register_birth()

    def take(self, *jobs: Job, limit: int = 0) -> list[Flight]:
        offers = [Candidate(job.id, job.origin, limit=limit) for job in jobs]
        return [flight for _, flight in self.pump._drain.take(offers, "tiny")]

    def die(self, words: str = "") -> None:
        """Let go of the lock, as the end of the process does, whatever was written before."""
        assert self.life._file is not None
        self.life._file.write(words)
        self.life._file.close()

    def close(self) -> None:
        self.life.end()
        self.scout.close()
        self.redis.close()


@pytest.fixture
def host(redis_url: str, tmp_path: Path) -> Iterator[Callable[..., Host]]:
    hosts: list[Host] = []

    def host(home: str = "here", *queues: str) -> Host:
        hosts.append(Host(redis_url, tmp_path / home, *queues))
        return hosts[-1]

    yield host
    for each in hosts:
        each.close()


@pytest.fixture
def enqueue(redis: Redis) -> Callable[..., list[Job]]:
    def enqueue(number: int, queue: str = "radixq", **options: Any) -> list[Job]:
        named = Queue(queue, connection=redis, serializer=JobSerializer)
        return [named.enqueue(keys.GENERATE, {"prompt": f"a secret {i}"}, **options) for i in range(number)]

    return enqueue


def waiting(redis: Redis, queue: str = "radixq") -> list[str]:
    listed: Any = redis.lrange(f"rq:queue:{queue}", 0, -1)
    return [job_id.decode() for job_id in listed]


def suspicion(redis: Redis, job: Job) -> Suspicion | None:
    text: Any = redis.hget(keys.SUSPECTS, job.id)
    return Suspicion.parse(text)


def codes(redis: Redis, job: Job) -> list[str]:
    """Return how the attempts before the last one ended, as the record says."""
    written: Any = redis.hget(keys.result(job.id), "errors")
    return [attempt["code"] for attempt in json.loads(written or b"[]")]


def expire(redis: Redis, *flights: Flight) -> None:
    for flight in flights:
        redis.zadd(flight.job.started_job_registry.key, {flight.execution.composite_key: 1})


def test_what_a_dead_process_of_this_machine_ran_is_back_at_once_in_order_and_no_retry_is_spent(
    host: Callable[..., Host], redis: Redis, enqueue: Callable[..., list[Job]]
) -> None:
    jobs = enqueue(4, retry=Retry(2))
    dead, next_one = host(), host()
    dead.take(*jobs[:3])
    assert next_one.pump._takeover.look() == 0
    dead.die()
    assert next_one.pump._takeover.look() == 3
    assert waiting(redis) == [job.id for job in jobs]
    assert {Job.fetch(job.id, redis, JobSerializer).retries_left for job in jobs} == {2}
    assert {suspicion(redis, job) for job in jobs[:3]} == {Suspicion(limit=2)}
    assert [codes(redis, job) for job in jobs] == [["worker_crashed"]] * 3 + [[]]
    assert suspicion(redis, jobs[3]) is None
    assert redis.zcard("rq:wip:radixq") == 0
    assert [worker.name for worker in Worker.all(redis)] == [next_one.worker.name]
    assert redis.smembers(keys.FLIGHTS) == {next_one.worker.name.encode()}
    assert list((next_one.settings.home / "workers").iterdir()) == [next_one.life._path]


def test_a_worker_of_another_machine_is_waited_for_until_its_leases_end(
    host: Callable[..., Host], redis: Redis, enqueue: Callable[..., list[Job]]
) -> None:
    jobs = enqueue(2)
    far, near = host("there"), host("here")
    flights = far.take(*jobs)
    far.die()  # nobody here can know
    assert near.pump._takeover.look() == 0
    expire(redis, *flights)
    assert near.pump._takeover.look() == 2
    assert waiting(redis) == [job.id for job in jobs]
    redis.delete(far.worker.key)  # as time does
    near.pump._takeover.look()
    assert waiting(redis) == [job.id for job in jobs]
    assert redis.smembers(keys.FLIGHTS) == {near.worker.name.encode()}


def test_leases_are_kept_by_the_servers_clock_whatever_the_machines_clocks_say(
    host: Callable[..., Host], redis: Redis, enqueue: Callable[..., list[Job]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (executions, registry):  # put back after the test
        monkeypatch.setattr(module, "current_timestamp", module.current_timestamp)
    (job,) = enqueue(1)
    far, near = host("there"), host("here")
    for pump in (far.pump, near.pump):
        pump.clock.ahead_s = -2 * LEASE_S  # the clocks of both machines are ahead of the server's
    leases.keep_by(near.pump.clock)
    (flight,) = far.take(job)
    leases.renew(far.worker, far.pump.ledger, [flight])
    assert near.pump._takeover.look() == 0
    near.worker.queues[0].started_job_registry.cleanup()
    assert flight.job.get_status() == JobStatus.STARTED
    near.pump.clock.ahead_s += LEASE_S + 5  # so much time passes
    assert near.pump._takeover.look() == 1
    assert waiting(redis) == [job.id]


def test_a_worker_that_only_slept_finds_its_jobs_taken_and_leaves_them_alone(
    host: Callable[..., Host], redis: Redis, enqueue: Callable[..., list[Job]]
) -> None:
    (job,) = enqueue(1)
    asleep, other = host(), host()
    (flight,) = asleep.take(job)
    asleep.pump.flights[flight.id] = flight
    expire(redis, flight)
    assert other.pump._takeover.look() == 1
    (again,) = other.take(job, limit=1)
    asleep.pump.renew()
    asleep.pump._deliver_all()
    assert asleep.pump.flights == {}
    assert asleep.pump.ledger.entries() == []
    assert [entry.execution for entry in other.pump.ledger.entries()] == [again.id]
    assert job.get_status() == JobStatus.STARTED
    assert redis.hget(keys.result(job.id), "status") == b"running"


def test_two_who_come_upon_the_same_dead_worker_hand_its_jobs_back_once(
    host: Callable[..., Host], redis: Redis, enqueue: Callable[..., list[Job]]
) -> None:
    jobs = enqueue(3)
    dead, first, second = host(), host(), host()
    dead.take(*jobs)
    dead.die()
    entries = dead.pump.ledger.entries()
    late = second.pump._takeover
    orphans = late._orphans(dead.pump.ledger, entries)
    assert first.pump._takeover.look() == 3
    assert late._hand_back(dead.pump.ledger, orphans, 3, spoke=False) == 0
    assert waiting(redis) == [job.id for job in jobs]


@pytest.mark.parametrize(("words", "times"), [("Fatal Python error: Aborted\n", LONE_SPOKE), ("", LONE_SILENT)])
def test_a_job_that_kills_its_process_alone_is_given_up_with_its_prompt_kept_for_its_owner_only(
    host: Callable[..., Host], redis: Redis, enqueue: Callable[..., list[Job]], words: str, times: int
) -> None:
    (job,) = enqueue(1, retry=Retry(2))
    for crash in range(times):
        assert waiting(redis) == [job.id]
        dead = host()
        dead.take(job, limit=1 if crash else 0)
        dead.die(words)
        host().pump._takeover.look()
    assert waiting(redis) == []
    assert job.get_status() == JobStatus.FAILED
    assert suspicion(redis, job) is None
    fields: Any = redis.hgetall(keys.result(job.id))
    assert (fields[b"status"], fields[b"error_code"]) == (b"failed", b"worker_crashed")
    assert fields[b"attempts"] == str(times).encode()
    assert codes(redis, job) == ["worker_crashed"] * (times - 1)  # and the last one is the error itself
    listed: Any = redis.xrange(keys.DEAD)
    ((_, entry),) = listed
    assert (entry[b"job_id"], entry[b"crashes"]) == (job.id.encode(), str(times).encode())
    assert b"secret" not in b"".join(entry.values())
    assert redis.ttl(job.key) > Settings.from_env({}).prompt_ttl_s
    reports = list((dead.settings.home / "crashes").glob("*"))
    assert [report.read_text() for report in reports] == [words] * (times if words else 0)


def test_jobs_of_queues_that_are_not_ours_go_back_there(
    host: Callable[..., Host], redis: Redis, enqueue: Callable[..., list[Job]]
) -> None:
    (ours,), (theirs,) = enqueue(1), enqueue(1, "other")
    dead, next_one = host("here", "radixq", "other"), host()
    dead.take(ours, theirs)
    dead.die()
    assert next_one.pump._takeover.look() == 2
    assert (waiting(redis), waiting(redis, "other")) == ([ours.id], [theirs.id])
    assert {suspicion(redis, job) for job in (ours, theirs)} == {Suspicion(limit=1)}


@pytest.mark.parametrize("field", [b"{}:e1", b"no id!:e1", b"\xff:e1"])
@pytest.mark.parametrize(
    "text", ["junk", "[]", '{"queue": "radixq", "tokens": Infinity}', '{"queue": "radixq", "new": 1}']
)
def test_a_ledger_that_no_worker_wrote_does_not_end_who_reads_it(
    host: Callable[..., Host], enqueue: Callable[..., list[Job]], redis: Redis, field: bytes, text: str
) -> None:
    (job,) = enqueue(1)
    redis.sadd(keys.FLIGHTS, "other", b"\xff")
    redis.hset(keys.flights("other"), field.replace(b"{}", job.id.encode()), text)
    redis.hset(keys.flights("other"), b"no id!:e2", '{"queue": "radixq", "tokens": 0}')
    host().pump.recover()
    assert not redis.exists(keys.flights("other"))
    assert not redis.sismember(keys.FLIGHTS, "other")


def test_a_process_is_alive_while_it_holds_its_file_and_leaves_words_only_if_it_crashed(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from worker.life import Life;"
        "life = Life(Path(sys.argv[1]), 'one/two'); life.begin(); print('begun', flush=True); sys.stdin.readline();"
        "{death}"
    )
    for death, said in (("os.abort()", "Aborted"), ("os._exit(1)", "")):
        words = [sys.executable, "-c", program.format(death=death), str(tmp_path)]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stdout.readline() == b"begun\n"
            assert life.last_words(tmp_path, "one/two") is None
            with pytest.raises(SettingsError, match="runs on this machine already"):
                Life(tmp_path, "one/two").begin()
            process.stdin.write(b"\n")
        last = life.last_words(tmp_path, "one/two")
        assert last is not None
        assert said in last
        assert bool(last) == bool(said)
        life.bury(tmp_path, "one/two")
        assert life.last_words(tmp_path, "one/two") is None
    assert len(list((tmp_path / "crashes").iterdir())) == 1


@pytest.mark.parametrize("words", ["", "Fatal Python error: Aborted"])
def test_several_workers_may_bury_the_same_dead_at_once(tmp_path: Path, words: str) -> None:
    names = [f"mac.{number}" for number in range(400)]
    (tmp_path / "workers").mkdir()
    for name in names:
        (tmp_path / "workers" / name).write_text(words)
    with ThreadPoolExecutor(4) as pool:
        for buried in [pool.submit(life.bury, tmp_path, name) for name in names for _ in range(4)]:
            buried.result()
    assert list((tmp_path / "workers").iterdir()) == []


def test_the_next_start_removes_files_of_the_long_dead_and_no_other(tmp_path: Path) -> None:
    directory = tmp_path / "workers"
    alive = Life(tmp_path, "alive")
    alive.begin()
    for name, words in (("dead", ""), ("fell", "Aborted"), ("just died", "")):
        (directory / name).write_text(words)
    for name in ("alive", "dead", "fell"):
        os.utime(directory / name, (0, 0))
    new = Life(tmp_path, "new")
    new.begin()
    assert {path.name for path in directory.iterdir()} == {"alive", "fell", "just died", "new"}
    alive.beat()
    alive._file.close()  # type: ignore[union-attr]  # killed, a moment after its last sign of life
    new.end()
    new.begin()
    assert "alive" in {path.name for path in directory.iterdir()}
    new.end()


def test_who_begins_while_others_clear_away_holds_the_file_of_its_name(tmp_path: Path) -> None:
    ours = tmp_path / "workers" / "mac"
    ours.parent.mkdir()

    def clear(name: str) -> None:
        other = Life(tmp_path, name)
        other.begin()
        other.end()

    with ThreadPoolExecutor(2) as pool:
        others = [pool.submit(clear, f"other.{number}") for number in range(800)]
        for _ in range(400):
            with contextlib.suppress(FileNotFoundError):  # it is cleared away already
                ours.touch()
                os.utime(ours, (0, 0))
            mine = Life(tmp_path, "mac")
            mine.begin()
            assert ours.exists()
            assert life.last_words(tmp_path, "mac") is None
            mine.end()
        for other in others:
            other.result()


def test_a_home_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="RADIXQ_HOME cannot be used: .*Not a directory"):
        Life(tmp_path / "file" / "home", "w").begin()
