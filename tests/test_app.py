"""`rq worker --worker-class worker.BatchWorker` as a process of its own, on a real server, with a tiny real model."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from rq import Queue
from rq.command import send_stop_execution_command, send_stop_job_command
from rq.job import Job, JobStatus
from rq.results import Result as RqResult
from rq.suspension import resume, suspend
from rq.worker import Worker

from common import keys
from common.messages import Result
from common.serializer import JobSerializer
from tests.broker import ENDLESS, ROWS, SHORT, Broker
from tests.processes import Process, Processes, wait_until
from worker import link, server
from worker.flight import Clock

RESULT_FIELDS = {
    "status", "text", "finish_reason", "prompt_tokens", "cached_tokens", "prefill_tokens", "completion_tokens",
    "model", "custom_id", "attempts", "worker", "submitted_at", "started_at", "finished_at", "queued_ms", "prefill_ms",
    "decode_ms", "total_ms", "json",
}  # fmt: skip


@pytest.fixture(scope="module")
def house(
    _databases: Iterator[str], tmp_path_factory: pytest.TempPathFactory, endless: Path
) -> Iterator[tuple[Broker, Process]]:
    broker = Broker(next(_databases))
    with Processes(tmp_path_factory.mktemp("house")) as processes:
        worker = processes.rq_worker(broker.url, "radixq", model=endless, env=ROWS)
        worker.wait_for_log("ready")
        yield broker, worker
        assert worker.running, "a test ended the shared worker"
        assert worker.stop() == 0
        assert "a secret" not in worker.log
    broker.redis.close()


class TestOneWorker:
    """What one worker does, all in its one process."""

    @pytest.fixture
    def broker(self, house: tuple[Broker, Process]) -> Iterator[Broker]:
        """The worker's database; whatever a test leaves running is stopped."""
        broker, _ = house
        yield broker
        for execution in broker.worker.get_current_executions(refresh=True):
            broker.redis.delete(Job.key_for(execution.job_id))
        wait_until(lambda: not broker.worker.get_current_executions(refresh=True), "nothing runs")

    def test_a_result_is_complete_and_right(self, broker: Broker) -> None:
        job = broker.enqueue(body={"custom_id": "c", "metadata": {"k": "v"}})
        broker.wait_for("finished", job)
        fields = broker.result(job)
        assert set(fields) == RESULT_FIELDS
        assert (fields["finish_reason"], fields["completion_tokens"]) == ("length", str(SHORT))
        assert int(fields["prompt_tokens"]) == int(fields["cached_tokens"]) + int(fields["prefill_tokens"]) > 0
        assert (fields["model"], fields["worker"], fields["attempts"]) == ("tiny", "mac", "1")
        assert fields["submitted_at"] <= fields["started_at"] < fields["finished_at"]
        spent = sum(float(fields[name]) for name in ("queued_ms", "prefill_ms", "decode_ms"))
        assert 0 < spent <= float(fields["total_ms"])
        whole = Result.model_validate_json(fields["json"])
        assert (whole.text, whole.metadata) == (fields["text"], {"k": "v"})
        assert Result.model_validate(job.return_value()) == whole

    def test_rq_info_is_right_while_jobs_run_and_afterwards(self, broker: Broker, processes: Processes) -> None:
        def info() -> tuple[int, str]:
            asked = processes.python("-m", "rq.cli", "info", "-u", broker.url, "--raw", "--interval", "0")
            assert asked.wait() == 0
            executing = re.search(r"queue radixq \d+, (\d+) executing", asked.log)
            state = re.search(r"worker mac\S* \(.*?\) (\S+)", asked.log)
            assert executing
            assert state
            return int(executing[1]), state[1].removeprefix("WorkerStatus.").lower()

        jobs = [broker.enqueue(ENDLESS) for _ in range(3)]
        broker.wait_for("running", *jobs)
        assert info() == (3, "busy")
        assert broker.worker.current_execution_count == 3
        for job in jobs:
            job.cancel()
        broker.wait_for("cancelled", *jobs)
        assert info() == (0, "idle")

    def test_stop_job_stops_any_of_several_running_jobs(self, broker: Broker) -> None:
        first, second, third = jobs = [broker.enqueue(ENDLESS) for _ in range(3)]
        broker.wait_for("running", *jobs)
        send_stop_job_command(broker.redis, second.id, JobSerializer)
        broker.wait_for("cancelled", second)
        assert second.get_status() == JobStatus.STOPPED
        (execution,) = third.get_executions()
        send_stop_execution_command(broker.redis, third.id, execution.id)
        broker.wait_for("cancelled", third)
        assert broker.status(first) == "running"

    @pytest.mark.parametrize("how", ["cancel", "delete"])
    def test_a_job_cancelled_in_flight_stops_and_the_others_go_on(self, broker: Broker, how: str) -> None:
        job, mate = broker.enqueue(ENDLESS), broker.enqueue(ENDLESS)
        broker.wait_for("running", job, mate)
        getattr(job, how)()
        broker.wait_for("cancelled", job)
        assert broker.status(mate) == "running"
        assert broker.redis.zscore("rq:finished:radixq", job.id) is None
        assert "text" not in broker.result(job)

    def test_a_job_over_its_timeout_fails_and_its_mate_finishes(self, broker: Broker) -> None:
        job, mate = broker.enqueue(ENDLESS, job_timeout=1), broker.enqueue(500)
        broker.wait_for("failed", job)
        assert broker.result(job)["error_code"] == "timeout"
        broker.wait_for("finished", mate)

    def test_jobs_of_another_model_or_a_newer_version_stay(self, broker: Broker) -> None:
        other, newer = broker.enqueue(body={"model": "other"}), broker.enqueue(body={"v": 99, "new": 1})
        ours = broker.enqueue(body={"model": "tiny"}, queue=keys.model_queue("tiny"))
        broker.wait_for("finished", ours)
        assert broker.waiting() == [other.id, newer.id]
        assert other.get_status() == newer.get_status() == JobStatus.QUEUED
        other.cancel()
        newer.cancel()

    def test_bad_jobs_fail_with_a_reason_and_nothing_of_them_is_executed(self, broker: Broker, tmp_path: Path) -> None:
        touched = tmp_path / "touched"
        pickled = Queue("radixq", connection=broker.redis).enqueue("pathlib.Path.touch", touched)
        foreign = Queue("radixq", connection=broker.redis, serializer=JobSerializer).enqueue("os.mkdir", str(touched))
        unknown = broker.enqueue_raw({"prompt": "x", "temperatur": 1})
        broker.wait_for("failed", pickled, foreign, unknown)
        codes = {broker.result(job)["error_code"] for job in (pickled, foreign, unknown)}
        assert codes == {"invalid_request"}
        assert "temperatur" in broker.result(unknown)["error_message"]
        assert not touched.exists()

    def test_scheduled_and_dependent_jobs_run_without_a_second_process(self, broker: Broker) -> None:
        queue = Queue("radixq", connection=broker.redis, serializer=JobSerializer)
        body = {"prompt": "x", "sampling": {"max_tokens": SHORT}}
        later = queue.enqueue_in(timedelta(seconds=1), keys.GENERATE, body)
        child = broker.enqueue(depends_on=broker.enqueue())
        broker.wait_for("finished", later, child)

    def test_the_metrics_follow(self, broker: Broker) -> None:
        before = int(broker.metrics()["jobs_finished"])
        jobs = [broker.enqueue() for _ in range(4)]
        broker.wait_for("finished", *jobs)
        wait_until(lambda: int(broker.metrics()["jobs_finished"]) >= before + 4, "the metrics count them")
        wait_until(lambda: broker.metrics()["state"] == "idle", "the worker is idle")
        metrics = broker.metrics()
        assert int(metrics["prompt_tokens"]) == int(metrics["cached_tokens"]) + int(metrics["prefill_tokens"])
        assert float(metrics["decode_tokens_per_s"]) > 0
        assert broker.redis.zscore(keys.WORKERS, "mac") is not None


def test_a_worker_started_while_suspended_waits_and_running_jobs_outlive_a_suspension(
    broker: Broker, start: Callable[..., Process]
) -> None:
    suspend(broker.redis)
    first = broker.enqueue(ENDLESS)
    worker = start()
    broker.wait_for_state("suspended")
    assert broker.waiting() == [first.id]
    resume(broker.redis)
    broker.wait_for("running", first)
    suspend(broker.redis)
    time.sleep(1.5)  # a few looks at the suspension
    second = broker.enqueue()
    time.sleep(1.5)
    assert broker.status(first) == "running"
    assert broker.waiting() == [second.id]
    resume(broker.redis)
    broker.wait_for("finished", second)
    first.cancel()
    assert worker.stop() == 0


def test_a_plain_rq_worker_fails_our_job_with_a_readable_error(broker: Broker, processes: Processes) -> None:
    job = broker.enqueue()
    worker = processes.python("-m", "rq.cli", "worker", "--burst", "-u", broker.url, "--serializer", "json", "radixq")
    assert worker.wait() == 0
    assert job.get_status() == JobStatus.FAILED
    (result,) = RqResult.all(job, serializer=JobSerializer)
    assert keys.GENERATE in result.exc_string


def test_two_workers_give_every_job_exactly_one_result(broker: Broker, start: Callable[..., Process]) -> None:
    jobs = [broker.enqueue() for _ in range(200)]
    workers = [start("--burst", "radixq", RADIXQ_WORKER_NAME=name) for name in ("one", "two")]
    assert [worker.wait() for worker in workers] == [0, 0]
    results = [broker.result(job) for job in jobs]
    assert {fields["status"] for fields in results} == {"finished"}
    assert {fields["attempts"] for fields in results} == {"1"}
    assert {broker.num_results(job) for job in jobs} == {1}
    counted = [int(broker.metrics(name)["jobs_finished"]) for name in ("one", "two")]
    assert sum(counted) == 200


def test_a_restarted_worker_takes_over_what_its_killed_predecessor_ran(
    broker: Broker, start: Callable[..., Process]
) -> None:
    jobs = [broker.enqueue(800) for _ in range(3)]
    first = start()
    broker.wait_for("running", *jobs)
    first.kill()
    broker.workers.clear()
    second = start("--burst", "radixq")
    assert second.wait() == 0
    assert {broker.status(job) for job in jobs} == {"finished"}
    assert {broker.num_results(job) for job in jobs} == {1}
    assert Worker.all(broker.redis) == []


def test_jobs_go_on_while_redis_is_away_and_are_delivered_once(
    processes: Processes, endless: Path, tmp_path: Path
) -> None:
    running = server.start(tmp_path / "server")
    broker = Broker(running.url)
    try:
        jobs = [broker.enqueue(1500) for _ in range(3)]
        worker = processes.rq_worker(running.url, "radixq", model=endless, env=ROWS)
        broker.workers.append(worker)
        broker.wait_for("running", *jobs)
        time.sleep(1.5)  # until the append-only file has it: it is synced once a second
        assert running.process is not None
        running.process.kill()
        running.process.wait()
        worker.wait_for_log("redis is away")
        time.sleep(1.0)
        running = server.start(tmp_path / "server")  # on its last port
        broker.wait_for("finished", *jobs)
        assert {broker.num_results(job) for job in jobs} == {1}
        assert {broker.result(job)["attempts"] for job in jobs} == {"1"}
        broker.wait_for("finished", broker.enqueue())
        away = [line for line in worker.log.splitlines() if "redis is away" in line]
        assert len([line for line in away if "loading" not in line and "in time" not in line]) == 1
        assert worker.log.count("redis is back") == 1
        assert worker.stop() == 0
    finally:
        broker.redis.close()
        running.stop()


def test_reading_about_workers_needs_no_settings(broker: Broker, processes: Processes) -> None:
    words = ["-m", "rq.cli", "info", "-u", broker.url, "--interval", "0", "-w", "worker.BatchWorker"]
    asked = processes.python(*words, env={"RADIXQ_NONSENSE": "1"})
    assert asked.wait() == 0
    assert "0 workers" in asked.log


@pytest.mark.parametrize(
    "url",
    [
        "redis://host:1/2",
        "redis://:a%20secret@[::1]:1/2",
        "unix:///a/socket?db=2",
        "rediss://who:p%40ss@host:1/3?ssl_cert_reqs=none&ssl_check_hostname=False&ssl_ca_certs=%2Fa%2Fb.pem",
    ],
)
def test_the_process_beside_the_worker_connects_in_the_same_way(url: str) -> None:
    def settings(client: Redis) -> dict[str, Any]:
        used = client.connection_pool.connection_kwargs
        return {name: value for name, value in used.items() if isinstance(value, str | int | None)}

    given = Redis.from_url(url)
    assert settings(Redis.from_url(link.url(given))) == settings(given)


def test_options_of_a_tls_connection_that_are_off_stay_off() -> None:
    given = Redis(host="host", ssl=True, ssl_cert_reqs="required", ssl_validate_ocsp=False)
    again = Redis.from_url(link.url(given)).connection_pool.connection_kwargs
    assert (again["ssl_cert_reqs"], again.get("ssl_validate_ocsp", False)) == ("required", False)


def test_a_worker_says_once_that_its_environment_names_another_redis_and_no_password(
    broker: Broker, start: Callable[..., Process]
) -> None:
    place, _, number = broker.url.removeprefix("redis://").rpartition("/")
    other = f"{place}/{int(number) + 1}"
    worker = start("--burst", "radixq", RADIXQ_REDIS_URL=f"redis://who:secret@{other}")
    assert worker.wait() == 0
    (line,) = [line for line in worker.log.splitlines() if "RADIXQ_REDIS_URL" in line]
    assert f"uses Redis at {place}/{number}, and RADIXQ_REDIS_URL or RQ_REDIS_URL names {other}:" in line
    assert "secret" not in worker.log


@pytest.mark.parametrize(
    ("environment", "names"),
    [
        ("redis://{host}:{port}/{db}?protocol=2", None),
        ("redis://localhost:{port}/{db}", None),
        ("redis://who:secret@{host}:1/{db}", "127.0.0.1:1/"),
        ("redis://localhost:{port}/1{db}", "localhost:"),
        ("http://who:secret@there", None),  # producers are refused
    ],
)
def test_an_environment_names_another_redis_only_if_it_is_another(
    redis: Redis, environment: str, names: str | None
) -> None:
    told = list(link.doubts(redis, environment.format(**redis.connection_pool.connection_kwargs), Clock()))
    assert [names in doubt for doubt in told if names] == [True] * len(told)
    assert bool(told) == bool(names)
    assert "secret" not in str(told)
    assert list(link.doubts(redis, None, Clock())) == []


@pytest.mark.parametrize(("ahead_s", "told"), [(80.0, "80.0 s behind"), (-80.0, "80.0 s ahead of"), (3.0, None)])
def test_a_clock_that_is_wrong_is_told_with_what_to_do(redis: Redis, ahead_s: float, told: str | None) -> None:
    clock = Clock()
    clock.ahead_s = ahead_s
    doubts = list(link.doubts(redis, None, clock))
    assert len(doubts) == (1 if told else 0)
    assert all(f"this machine's clock is {told} the Redis server's" in doubt and "NTP" in doubt for doubt in doubts)
