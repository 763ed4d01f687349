"""Workers that die, stall and lose their server: every job ends once, with its result or with a reason.

Real processes, a real server, a tiny model. Leases of 90 s are ended early by moving their scores, as time would.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rq import Retry
from rq.command import send_stop_job_command
from rq.job import Job, JobStatus

from common.errors import ModelNotLoaded
from common.serializer import JobSerializer
from tests import lethal
from tests.broker import ENDLESS, Broker
from tests.lethal import POISON
from tests.models import smollm2_path
from tests.processes import Process, Processes, wait_until
from worker.suspects import LONE_SILENT, LONE_SPOKE
from worker.watch import MOST_CULPRITS

ROWS = {"RADIXQ_MAX_ROWS": "8", "RADIXQ_WORKER_NAME": "mac"}
KILLS = int(os.environ.get("RADIXQ_TEST_KILLS", "8"))  # fifty take half an hour
PATIENCE_S = 400.0  # for a process that starts, runs some jobs and ends, on a busy machine
_SOAK = pytest.mark.skipif(
    "RADIXQ_TEST_KILLS" not in os.environ, reason="seven starts of a worker; runs with RADIXQ_TEST_KILLS"
)
pytestmark = pytest.mark.timeout(900)  # many processes start one after the other


@pytest.fixture
def start(processes: Processes, broker: Broker, endless: Path) -> Callable[..., Process]:
    def start(*arguments: str, **env: str) -> Process:
        return processes.rq_worker(broker.url, *(arguments or ("radixq",)), model=endless, env=ROWS | env)

    return start


def num_with(broker: Broker, jobs: Sequence[Job], status: str) -> int:
    return [broker.status(job) for job in jobs].count(status)


class TestKilled:
    """SIGKILL, at any moment."""

    @pytest.mark.timeout(60 * KILLS + 600)
    def test_every_job_has_one_result_after_kills_at_random_moments(
        self, broker: Broker, start: Callable[..., Process]
    ) -> None:
        kills, jobs = KILLS, 4 * KILLS + 20
        rng = random.Random(kills)
        submitted = [broker.enqueue(rng.choice((3, 10, 40, 150)), rng.choice(("a", "b"))) for _ in range(jobs)]
        for _ in range(kills):
            enough = min(jobs, num_with(broker, submitted, "finished") + rng.randrange(2 * jobs // kills))
            worker = start("a", "b")
            if rng.random() < 0.8:
                worker.wait_for_log("ready")
                wait_until(
                    partial(lambda n: num_with(broker, submitted, "finished") >= n, enough), "some jobs have finished"
                )
            time.sleep(rng.uniform(0, 0.3))
            worker.kill()
        assert start("--burst", "a", "b").wait(PATIENCE_S) == 0
        assert {broker.status(job) for job in submitted} == {"finished"}
        assert {broker.num_results(job) for job in submitted} == {1}
        assert {job.get_status() for job in submitted} == {JobStatus.FINISHED}
        assert {Job.fetch(job.id, broker.redis).retries_left for job in submitted} == {None}
        assert broker.listed() == []
        broker.assert_settled("a", "b")

    @pytest.mark.long
    @pytest.mark.parametrize(("name", "share"), [("tiny", 0.25), ("smollm2", 0.1)])
    def test_a_restarted_worker_goes_on_with_its_orphans_as_soon_as_the_model_is_loaded(
        self, broker: Broker, processes: Processes, endless: Path, name: str, share: float
    ) -> None:
        """The share is of the time from the process's start until it is ready. 2 cores, load 12: 0.12 and 0."""
        path = endless if name == "tiny" else smollm2_path()
        jobs = [broker.enqueue(1000, retry=Retry(2)) for _ in range(8)]
        killed = processes.rq_worker(broker.url, "radixq", model=path, env=ROWS)
        wait_until(lambda: num_with(broker, jobs, "running") == len(jobs), "all run")
        killed.kill()
        began = time.monotonic()
        worker = processes.rq_worker(broker.url, "radixq", model=path, env=ROWS)
        log = worker.wait_for_log("ready model")
        loaded = time.monotonic()
        wait_until(lambda: num_with(broker, jobs, "running") >= len(jobs) // 2, "half of them run, as suspects may")
        waited = time.monotonic() - loaded
        assert log.index("took over from a dead worker") < log.index("ready model")
        assert waited < share * (loaded - began)
        assert {Job.fetch(job.id, broker.redis).retries_left for job in jobs} == {2}
        assert broker.listed() == []
        print(f"{name}: loaded after {loaded - began:.2f} s, running {waited:.2f} s later")


@pytest.mark.long
class TestCrashes:
    """A process that dies of one of its jobs."""

    @pytest.fixture(params=["os.abort()", pytest.param("os._exit(7)", marks=_SOAK)])
    def death(self, request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, dict[str, str]]:
        """How the engine ends the process, and the environment in which it does."""
        return request.param, lethal.of_decoding(tmp_path / "lethal", request.param)

    def test_the_job_that_crashes_its_worker_is_given_up_and_all_others_finish(
        self, broker: Broker, start: Callable[..., Process], death: tuple[str, dict[str, str]], tmp_path: Path
    ) -> None:
        how, env = death
        mates = [broker.enqueue(40) for _ in range(3)]
        poisoned = broker.enqueue(40, body={"prompt": f"a secret {POISON}"})
        late: list[Job] = []
        crashes = 0
        while (worker := start("--burst", "radixq", **env)).wait(PATIENCE_S) != 0:
            crashes += 1
            late += [broker.enqueue(10)]
            assert crashes < 12, worker.log
        assert [broker.status(job) for job in (*mates, *late)] == ["finished"] * (3 + crashes)
        assert [broker.num_results(job) for job in (*mates, poisoned, *late)] == [1] * (4 + crashes)
        fields = broker.result(poisoned)
        assert (fields["status"], fields["error_code"], fields["attempts"]) == (
            "failed",
            "worker_crashed",
            str(crashes),
        )
        assert [one["code"] for one in json.loads(fields["errors"])] == ["worker_crashed"] * (crashes - 1)
        assert poisoned.get_status() == JobStatus.FAILED
        (entry,) = broker.listed()
        assert (entry["job_id"], entry["error_code"]) == (poisoned.id, "worker_crashed")
        assert "secret" not in str(entry)
        assert crashes <= 2 + (LONE_SPOKE if how == "os.abort()" else LONE_SILENT)  # with three mates, with one, alone
        reports = list((tmp_path / "home" / ".radixq" / "crashes").glob("*"))
        assert bool(reports) == (how == "os.abort()")
        broker.assert_settled()

    def test_a_job_that_ends_the_tokenizer_is_given_up_while_the_rows_in_the_engine_go_on(
        self, broker: Broker, start: Callable[..., Process], tmp_path: Path
    ) -> None:
        worker = start(**lethal.of_tokenising(tmp_path / "lethal", "os.abort()"))
        before = [broker.enqueue(ENDLESS) for _ in range(3)]
        broker.wait_for("running", *before)
        poisoned, after = broker.enqueue(body={"prompt": f"a secret {POISON}"}), broker.enqueue()
        broker.wait_for("failed", poisoned)
        broker.wait_for("finished", after)
        assert [broker.result(job)["attempts"] for job in (*before, poisoned, after)] == ["1", "1", "1", "2", "1"]
        assert {broker.status(job) for job in before} == {"running"}
        fields = broker.result(poisoned)
        assert fields["error_code"] == "worker_crashed"
        assert [one["code"] for one in json.loads(fields["errors"])] == ["worker_crashed"]
        assert [(entry["job_id"], entry["crashes"]) for entry in broker.listed()] == [(poisoned.id, "2")]
        assert worker.running
        for job in before:
            send_stop_job_command(broker.redis, job.id, JobSerializer)
        broker.wait_for("cancelled", *before)
        assert worker.stop() == 0
        assert "secret" not in worker.log
        broker.assert_settled()

    def test_a_tokenizer_that_dies_of_every_job_ends_the_worker_and_no_job_is_given_up(
        self, broker: Broker, start: Callable[..., Process], tmp_path: Path
    ) -> None:
        jobs = [broker.enqueue(body={"prompt": POISON}) for _ in range(MOST_CULPRITS + 1)]
        worker = start(**lethal.of_tokenising(tmp_path / "lethal", "os.abort()"))
        assert worker.wait(PATIENCE_S) == ModelNotLoaded.exit_code
        assert "model_not_loaded: the tokenizer or the chat template of" in worker.log
        assert {job.get_status() for job in jobs} == {JobStatus.QUEUED}
        assert sorted(broker.waiting()) == sorted(job.id for job in jobs)
        assert broker.listed() == []


@pytest.mark.long
class TestAsleep:
    """A process that stands still for longer than its leases, as when a lid is closed."""

    def test_what_another_worker_finished_meanwhile_is_not_written_again(
        self, broker: Broker, start: Callable[..., Process], processes: Processes, tmp_path: Path
    ) -> None:
        jobs = [broker.enqueue(1500, retry=Retry(2)) for _ in range(4)]
        sleeper = start(RADIXQ_WORKER_NAME="asleep")
        wait_until(lambda: all(broker.status(job) == "running" for job in jobs), "all run")
        sleeper.signal(signal.SIGSTOP)
        expire_leases(broker)
        other = start(RADIXQ_WORKER_NAME="other", RADIXQ_HOME=str(tmp_path / "elsewhere"))
        info = processes.python("-m", "rq.cli", "info", "-u", broker.url, "--raw", "--interval", "0")
        broker.wait_for("finished", *jobs)
        assert info.wait() == 0
        sleeper.signal(signal.SIGCONT)
        sleeper.wait_for_log("lease lost")
        assert sleeper.stop() == other.stop() == 0
        assert {broker.num_results(job) for job in jobs} == {1}
        assert {broker.result(job)["worker"] for job in jobs} == {"other"}
        assert {job.get_status() for job in jobs} == {JobStatus.FINISHED}
        broker.assert_settled()

    def test_a_worker_that_wakes_up_alone_goes_on(self, broker: Broker, start: Callable[..., Process]) -> None:
        jobs = [broker.enqueue(1500) for _ in range(4)]
        sleeper = start()
        wait_until(lambda: all(broker.status(job) == "running" for job in jobs), "all run")
        sleeper.signal(signal.SIGSTOP)
        expire_leases(broker)
        sleeper.signal(signal.SIGCONT)
        broker.wait_for("finished", *jobs)
        assert {broker.result(job)["attempts"] for job in jobs} == {"1"}
        assert sleeper.stop() == 0
        assert "lease lost" not in sleeper.log
        broker.assert_settled()


def expire_leases(broker: Broker) -> None:
    """Let all leases end, as time would."""
    members: Any = broker.redis.zrange("rq:wip:radixq", 0, -1)
    broker.redis.zadd("rq:wip:radixq", dict.fromkeys(members, 1))
