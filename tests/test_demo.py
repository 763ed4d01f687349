"""ops/demo.py from outside: it shows the main job on a real model and leaves nothing running, however it ends."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.models import smollm2_path
from tests.processes import ROOT, Process, Processes, wait_until

pytestmark = pytest.mark.slow
MARK = "RADIXQ_TEST_DEMO"  # in the environment of the demo and, inherited, of all that it starts


def start_demo(processes: Processes, tmp_path: Path, model: Path) -> Process:
    """Start what ops/demo calls after its set-up; everything it makes is under `tmp_path`."""
    environment = {"TMPDIR": str(tmp_path), MARK: str(tmp_path)}
    return processes.python(ROOT / "ops" / "demo.py", "--model", model, env=environment)


def left_over(tmp_path: Path) -> list[str]:
    """List the processes, but for zombies, that carry the demo's mark in their environment."""
    every = subprocess.run(["ps", "axeww", "-o", "pid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    marked = [line.split(maxsplit=2) for line in every.splitlines() if f"{MARK}={tmp_path}" in line]
    return [f"{pid} {words[:100]}" for pid, state, words in marked if not state.startswith("Z")]


@pytest.mark.timeout(600)
def test_the_demo_runs_every_job_and_shows_answers_metrics_and_redis_cli_lines(
    processes: Processes, tmp_path: Path
) -> None:
    demo = start_demo(processes, tmp_path, smollm2_path())
    assert demo.wait(550) == 0
    jobs = re.findall(r"^  [0-9a-f]{8} +(\d+) +(\d+) +(\d+)  \S", demo.log, re.MULTILINE)
    assert len(jobs) == 24
    cached, computed = (sum(int(job[column]) for job in jobs) for column in (0, 1))
    assert f"{cached + computed} prompt tokens = {cached} cached + {computed} computed" in demo.log
    assert cached > computed  # 3 system prompts computed, 21 times reused
    assert "0 queued, 0 running, 24 ended" in demo.log
    assert len(re.findall(r"^\$ redis-cli -u redis://127.0.0.1:\d+ HGETALL radixq:", demo.log, re.MULTILINE)) == 2
    assert re.search(r"^radixq +\| 0, 0 executing, 24 finished, 0 failed", demo.log, re.MULTILINE)
    assert left_over(tmp_path) == []
    assert not list(tmp_path.glob("radixq-demo-*"))


@pytest.mark.timeout(300)
def test_the_demo_with_pictures_sees_each_once_and_says_that_its_words_mean_nothing(
    processes: Processes, tmp_path: Path
) -> None:
    pytest.importorskip("mlx_vlm", reason="radixq[vision] is not installed")
    demo = processes.python(ROOT / "ops" / "demo.py", "--image", env={"TMPDIR": str(tmp_path), MARK: str(tmp_path)})
    assert demo.wait(250) == 0
    assert "Its words mean nothing." in demo.log
    assert len(re.findall(r"^  [0-9a-f]{8} +\d+ +\d+ +\d+ ", demo.log, re.MULTILINE)) == 24
    assert "the vision tower ran 3 times" in demo.log
    assert left_over(tmp_path) == []


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "ending",
    [
        pytest.param(signal.SIGINT, marks=pytest.mark.long),
        signal.SIGTERM,
        pytest.param(signal.SIGKILL, marks=pytest.mark.long),
    ],
)
def test_a_demo_that_is_stopped_at_any_moment_leaves_no_process(
    processes: Processes, tmp_path: Path, ending: signal.Signals
) -> None:
    demo = start_demo(processes, tmp_path, smollm2_path())
    demo.wait_for_log("submitted 24 jobs in 3 groups")
    assert left_over(tmp_path)  # the worker and the server are seen
    moment_s = random.uniform(0, 12)
    print(f"stopped after {moment_s:.1f} s")
    time.sleep(moment_s)
    demo.signal(ending)
    status = demo.wait()
    assert status == (-signal.SIGKILL if ending == signal.SIGKILL else 130)
    wait_until(lambda: not left_over(tmp_path), "nothing is left running", within_s=10)


def test_a_demo_whose_worker_cannot_start_says_why_and_fails(processes: Processes, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"not a model")
    demo = start_demo(processes, tmp_path, broken)
    assert demo.wait() == 1
    assert "broken.gguf" in demo.log.partition("its last words")[2]
    assert left_over(tmp_path) == []
