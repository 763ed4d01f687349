"""A server that goes away, is small, full or read-only, or refuses its clients: every job ends once all the same."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from redis import Redis
from rq.command import send_stop_job_command
from rq.job import Job

from common.errors import BrokerUnavailable
from common.serializer import JobSerializer
from producer import submit
from tests.broker import ENDLESS, SHORT, Broker
from tests.processes import Process, Processes, wait_until
from worker import server

ROWS = {"RADIXQ_MAX_ROWS": "8", "RADIXQ_WORKER_NAME": "mac"}
pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "server"


def test_jobs_end_once_though_the_server_is_killed_at_random_moments(
    processes: Processes, endless: Path, home: Path
) -> None:
    rng = random.Random(5)
    running = server.start(home)
    broker = Broker(running.url)
    try:
        jobs = [broker.enqueue(rng.choice((5, 300, 1000))) for _ in range(40)]
        wait_until(lambda: broker.redis.info("persistence")["aof_pending_bio_fsync"] == 0, "the file has them")
        time.sleep(1.1)  # it is synced once a second
        worker = processes.rq_worker(running.url, "radixq", model=endless, env=ROWS)
        worker.wait_for_log("ready")
        for _ in range(4):
            time.sleep(rng.uniform(1.2, 2.5))
            assert running.process is not None
            running.process.kill()
            running.process.wait()
            time.sleep(rng.uniform(0, 2))
            running = server.start(home)
        broker.wait_for("finished", *jobs)
        assert {broker.num_results(job) for job in jobs} == {1}
        last = broker.enqueue(ENDLESS)
        broker.wait_for("running", last)
        wait_until(lambda: broker.redis.pubsub_numsub(f"rq:pubsub:{broker.worker.name}")[0][1], "it listens again")
        send_stop_job_command(broker.redis, last.id, JobSerializer)
        broker.wait_for("cancelled", last)
        assert worker.stop() == 0
        broker.assert_settled()
    finally:
        broker.redis.close()
        running.stop()


def test_a_small_server_takes_jobs_until_it_is_full_and_each_ends_once_when_it_has_more(
    processes: Processes, endless: Path, home: Path
) -> None:
    with server.start(home, persistent=False) as running:
        broker = Broker(running.url)
        broker.redis.config_set("maxmemory", "5mb")
        worker = processes.rq_worker(running.url, "radixq", model=endless, env=ROWS)
        worker.wait_for_log("ready model")
        jobs: list[Job] = []
        with pytest.raises(BrokerUnavailable, match=r"is full \(maxmemory\).*CONFIG SET maxmemory"):
            _submit_for_ever(running.url, jobs, broker)
        wait_until(lambda: _says(worker, 0, "redis is away, going on", "memory is full"), "it says so")
        assert worker.running
        assert "Traceback" not in worker.log
        broker.redis.config_set("maxmemory", "50mb")
        broker.wait_for("finished", *jobs, broker.enqueue())
        assert {broker.num_results(job) for job in jobs} == {1}
        assert worker.stop() == 0
        broker.assert_settled()
        broker.redis.close()


def test_a_full_a_read_only_and_a_locked_server_are_waited_for(processes: Processes, endless: Path, home: Path) -> None:
    with server.start(home, persistent=False) as running:
        broker = Broker(running.url)
        admin = broker.redis
        worker = processes.rq_worker(running.url, "radixq", model=endless, env=ROWS)
        worker.wait_for_log("ready")
        faults: list[tuple[str, Callable[[], object], Callable[[], object]]] = [
            ("memory is full", lambda: admin.config_set("maxmemory", 1), lambda: admin.config_set("maxmemory", 0)),
            ("read-only", lambda: admin.replicaof("127.0.0.1", 1), lambda: admin.replicaof("NO", "ONE")),
            ("credentials", lambda: _lock(admin), lambda: admin.config_set("requirepass", "")),
        ]
        for words, break_it, mend_it in faults:
            running_job, waiting_job = broker.enqueue(800), broker.enqueue()
            broker.wait_for("running", running_job)
            said = len(worker.log)
            break_it()
            wait_until(partial(_says, worker, said, "redis is away, going on", words), f"it says: {words}")
            time.sleep(1)
            mend_it()
            broker.wait_for("finished", running_job, waiting_job)
            assert {broker.num_results(job) for job in (running_job, waiting_job)} == {1}
            wait_until(partial(_says, worker, said, "redis is back"), "it says so")
        assert worker.stop() == 0
        assert "Traceback" not in worker.log
        broker.assert_settled()
        broker.redis.close()


def _says(worker: Process, since: int, *words: str) -> bool:
    lines = worker.log[since:].lower().splitlines()
    return any(all(word.lower() in line for word in words) for line in lines)


def _submit_for_ever(url: str, jobs: list[Job], broker: Broker) -> None:
    while True:
        metadata = {"large": os.urandom(2_000).hex()}  # which nothing packs much
        ticket = submit(prompt="a secret", max_tokens=SHORT, metadata=metadata, redis=url)
        jobs.append(Job(ticket.id, connection=broker.redis, serializer=JobSerializer))


def _lock(admin: Redis) -> None:
    """Ask everybody for a password from now on, but the connection of the test."""
    admin.config_set("requirepass", "a new one")
    admin.client_kill_filter(_type="normal", skipme=True)
