"""How `rq worker --worker-class worker.BatchWorker` ends: when asked to, when done, and when it cannot start."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rq.command import send_shutdown_command
from rq.job import JobStatus
from rq.worker import Worker

from common import keys
from tests.broker import ENDLESS, ROWS, Broker
from tests.processes import Process, Processes, wait_until


def test_burst_runs_queues_in_priority_order_and_ends(broker: Broker, start: Callable[..., Process]) -> None:
    low = [broker.enqueue(queue="low") for _ in range(4)]
    high = [broker.enqueue(queue="high") for _ in range(4)]
    worker = start("--burst", "high", "low", RADIXQ_MAX_ROWS="1")
    assert worker.wait() == 0
    results = [broker.result(job) for job in (*high, *low)]
    assert [fields["status"] for fields in results] == ["finished"] * 8
    finished = [fields["finished_at"] for fields in results]
    assert max(finished[:4]) <= min(finished[4:])
    assert broker.metrics()["state"] == "stopped"
    assert Worker.all(broker.redis) == []


def test_the_log_has_rqs_news_and_not_its_routine(broker: Broker, start: Callable[..., Process]) -> None:
    worker = start("--burst", "radixq")
    assert worker.wait() == 0
    assert "Listening on radixq" in worker.log
    assert "cleaning" not in worker.log


def test_max_jobs_counts_jobs(broker: Broker, start: Callable[..., Process]) -> None:
    jobs = [broker.enqueue() for _ in range(7)]
    assert start("--max-jobs", "3", "radixq").wait() == 0
    assert sorted(broker.status(job) for job in jobs).count("finished") == 3
    assert len(broker.waiting()) == 4


def test_the_shutdown_command_ends_the_worker_after_what_runs(broker: Broker, start: Callable[..., Process]) -> None:
    job = broker.enqueue(800)
    worker = start(RADIXQ_DRAIN_S="60")
    broker.wait_for("running", job)
    send_shutdown_command(broker.redis, broker.worker.name)
    assert worker.wait() == 0
    assert broker.status(job) == "finished"


@pytest.mark.parametrize(("drain_s", "signals"), [("0.5", 1), ("600", 2)], ids=["after a while", "second signal"])
def test_a_stopping_worker_hands_back_to_the_head_in_order(
    broker: Broker, start: Callable[..., Process], drain_s: str, signals: int
) -> None:
    jobs = [broker.enqueue(ENDLESS) for _ in range(5)]
    worker = start(RADIXQ_DRAIN_S=drain_s)
    broker.wait_for("running", *jobs)
    for _ in range(signals):
        worker.signal(signal.SIGTERM)
        wait_until(lambda: broker.metrics()["state"] == "stopping" or not worker.running, "it stops")
        late = broker.enqueue()  # not started any more
        time.sleep(0.5)
    assert worker.wait() == 0
    assert broker.waiting()[:5] == [job.id for job in jobs]
    assert {broker.status(job) for job in jobs} == {"queued"}
    assert {job.get_status() for job in (*jobs, late)} == {JobStatus.QUEUED}
    assert broker.redis.zcard("rq:wip:radixq") == 0
    assert Worker.all(broker.redis) == []


def test_a_model_that_is_not_there_is_one_line_and_exit_code_3(broker: Broker, processes: Processes) -> None:
    job = broker.enqueue()
    worker = processes.rq_worker(broker.url, "radixq", model="/nowhere/model")
    assert worker.wait() == 3
    (line,) = [line for line in worker.log.splitlines() if line.startswith("radixq: ")]
    assert line.startswith("radixq: model_not_loaded: ")
    assert "/nowhere/model" in line
    assert "Traceback" not in worker.log
    assert broker.waiting() == [job.id]
    assert job.get_status() == JobStatus.QUEUED


@pytest.mark.parametrize("fault", ["nobody listens", "wrong password"])
def test_a_server_that_cannot_be_used_is_one_line_and_exit_code_4(
    broker: Broker, processes: Processes, endless: Path, fault: str
) -> None:
    url = "redis://127.0.0.1:1" if fault == "nobody listens" else broker.url.replace("://", "://who:secret-word@")
    worker = processes.rq_worker(url, "radixq", model=endless)
    assert worker.wait() == 4
    (line,) = [line for line in worker.log.splitlines() if line.startswith("radixq: ")]
    assert "127.0.0.1" in line
    assert "Traceback" not in worker.log
    assert "secret-word" not in worker.log


def test_a_worker_behind_sentinel_says_in_one_line_that_it_cannot_be(processes: Processes, tmp_path: Path) -> None:
    (tmp_path / "watched.py").write_text('SENTINEL = {"INSTANCES": [("127.0.0.1", 1)], "MASTER_NAME": "jobs"}')
    options = ["--worker-class", "worker.BatchWorker", "-c", "watched", "--path", str(tmp_path)]
    worker = processes.python("-m", "rq.cli", "worker", *options, "radixq", env={"MLX_MODEL_PATH": "/any"})
    assert worker.wait() == 2
    assert "radixq: a worker cannot follow Redis Sentinel yet" in worker.log
    assert "Traceback" not in worker.log


def test_a_misspelt_setting_is_one_line_and_exit_code_2(start: Callable[..., Process]) -> None:
    worker = start(RADIXQ_MAX_ROW="4")
    assert worker.wait() == 2
    assert "RADIXQ_MAX_ROWS?" in worker.log
    assert "Traceback" not in worker.log


def test_a_defect_in_the_loop_hands_back_and_does_not_look_like_success(
    broker: Broker, start: Callable[..., Process]
) -> None:
    job = broker.enqueue(ENDLESS)
    worker = start()
    broker.wait_for("running", job)
    with broker.redis.pipeline() as pipe:
        pipe.delete(keys.metrics("mac"))
        pipe.set(keys.metrics("mac"), "not a hash")
        pipe.execute()
    assert worker.wait() == 1
    assert broker.waiting() == [job.id]
    assert "radixq: " in worker.log


def test_a_worker_without_jobs_ends_after_max_idle_time(broker: Broker, start: Callable[..., Process]) -> None:
    job = broker.enqueue()
    worker = start("--max-idle-time", "1", "radixq")
    assert worker.wait() == 0
    assert broker.status(job) == "finished"
    assert Worker.all(broker.redis) == []


@pytest.mark.parametrize("loads", ["slowly", pytest.param("never", marks=pytest.mark.long)])
def test_a_worker_that_is_stopped_while_it_starts_ends_in_order(
    broker: Broker, processes: Processes, endless: Path, tmp_path: Path, loads: str
) -> None:
    job = broker.enqueue()
    path = endless
    if loads == "never":
        path = tmp_path / "tiny"
        shutil.copytree(endless, path)
        (path / "model.safetensors").unlink()
        os.mkfifo(path / "model.safetensors")  # nobody ever writes to it
    worker = processes.rq_worker(broker.url, "radixq", model=path, env=ROWS)
    worker.wait_for_log("Listening on")
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    assert broker.waiting() == [job.id]
    assert job.get_status() == JobStatus.QUEUED
    assert Worker.all(broker.redis) == []
    assert broker.redis.exists(keys.FLIGHTS) == 0
