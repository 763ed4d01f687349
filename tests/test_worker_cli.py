"""worker/cli.py: `radixq-worker` as a person calls it, in a process of its own."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from common import keys
from producer import submit
from tests.models import save_tiny
from tests.processes import Process, Processes
from worker import server


def call(processes: Processes, *words: str, **environment: str) -> Process:
    """Run `radixq-worker` to its end."""
    process = processes.python("-m", "worker.cli", *words, env=environment)
    process.wait()
    return process


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["doctor", "--help"]])
def test_every_command_has_help(processes: Processes, words: list[str]) -> None:
    process = call(processes, *words)
    assert process.popen.returncode == 0
    assert process.log.startswith("usage: radixq-worker")


@pytest.mark.parametrize(
    ("words", "environment", "status", "says"),
    [
        (["top"], {}, 2, "radixq top comes later; this version has no such command"),
        ([], {}, 2, "the following arguments are required: COMMAND; see radixq-worker --help"),
        (["doctor"], {"RADIXQ_MAX_ROW": "3"}, 2, "unknown setting RADIXQ_MAX_ROW; did you mean RADIXQ_MAX_ROWS?"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_code_2(
    processes: Processes, words: list[str], environment: dict[str, str], status: int, says: str
) -> None:
    process = call(processes, *words, **environment)
    assert process.popen.returncode == status
    assert process.log == f"radixq-worker: {says}\n"


def test_run_prints_settings_with_value_unit_and_source_and_needs_a_model(processes: Processes) -> None:
    process = call(processes, "run", RADIXQ_MAX_TOKENS="77", RQ_REDIS_URL="redis://u:secret@127.0.0.1:1")
    assert process.popen.returncode == 3
    lines = [line.split() for line in process.log.splitlines()]
    assert ["RADIXQ_MAX_TOKENS", "77", "tokens", "environment"] in [words[:4] for words in lines]
    assert ["RADIXQ_RESULT_TTL_S", "604800", "s", "default"] in [words[:4] for words in lines]
    assert ["RADIXQ_REDIS_URL", "redis://u:***@127.0.0.1:1", "RQ_REDIS_URL"] in [words[:3] for words in lines]
    assert "secret" not in process.log
    assert process.log.splitlines()[-1].startswith("radixq-worker: no model: set MLX_MODEL_PATH")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("RADIXQ_REDIS_URL", "http://u:secret@there", "Redis URL 'http://u:***@there': Redis URL must specify"),
        ("RADIXQ_REDIS_URL", "redis://there:99999", "Redis URL 'redis://there:99999': Port out of range"),
        ("RADIXQ_HOME", "/dev/null/home", "RADIXQ_HOME cannot be used: [Errno 20] Not a directory: '/dev/null/home'"),
    ],
)
def test_run_with_a_broker_that_cannot_be_ends_with_one_line(
    processes: Processes, name: str, value: str, says: str
) -> None:
    process = call(processes, "run", MLX_MODEL_PATH="/any", **{name: value})
    assert process.popen.returncode == 2
    assert process.log.splitlines()[-1].startswith(f"radixq-worker: {says}")
    assert "Traceback" not in process.log


def test_run_serves_jobs_on_the_url_it_was_given(processes: Processes, redis_url: str, tmp_path: Path) -> None:
    ticket = submit("Hello", max_tokens=4, redis=redis_url)
    model = str(save_tiny(tmp_path / "tiny"))
    process = call(processes, "run", "--burst", MLX_MODEL_PATH=model, RADIXQ_REDIS_URL=redis_url)
    assert process.popen.returncode == 0
    assert ticket.result(timeout_s=5).status == "finished"


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """The RADIXQ_HOME of a test whose embedded server outlives the command; it ends with the test."""
    path = tmp_path / "home" / ".radixq"
    path.mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as probe:  # the usual port may be a developer's own
        (path / "server.json").write_text(json.dumps({"url": "", "pid": 0, "port": probe.getsockname()[1]}))
    yield path
    running = server.find(path)
    if running:
        with Redis.from_url(running.url) as redis:
            redis.shutdown(nosave=True)


def test_run_without_a_url_starts_the_home_s_server_and_leaves_it_to_producers(
    processes: Processes, tmp_path: Path, home: Path
) -> None:
    model = str(save_tiny(tmp_path / "tiny"))
    process = call(processes, "run", "--burst", MLX_MODEL_PATH=model)
    assert process.popen.returncode == 0
    running = server.find(home)
    assert running is not None
    assert f"producers need: export RADIXQ_REDIS_URL={running.url}\n" in process.log
    again = call(processes, "run", "--burst", MLX_MODEL_PATH=model)
    assert f"server {running.url}, found" in again.log
    with Redis.from_url(running.url) as redis:
        assert redis.zcard(keys.WORKERS) == 1


def test_doctor_exits_1_when_a_check_failed_and_prints_one_line_each(processes: Processes) -> None:
    process = call(processes, "doctor", RADIXQ_REDIS_URL="redis://127.0.0.1:1")
    assert process.popen.returncode == 1
    lines = process.log.splitlines()
    assert all(line.startswith(("ok     ", "failed ")) for line in lines)
    assert any(line.startswith("failed redis: redis://127.0.0.1:1") and "; fix: " in line for line in lines)
    assert any(line.startswith("failed model: MLX_MODEL_PATH is not set; fix: ") for line in lines)


def test_doctor_prints_json(processes: Processes) -> None:
    process = call(processes, "doctor", "--json", RADIXQ_REDIS_URL="redis://127.0.0.1:1")
    checks = {check["name"]: check for check in json.loads(process.log)}
    assert checks["redis"]["ok"] is False
    assert checks["device"]["detail"]
