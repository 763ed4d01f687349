"""Processes of a test: start them, wait for what they do, show what they said when the test fails, leave none.

Knows how `rq worker` is called; knows nothing of what it does inside.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from worker.server import Tether

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent
WAIT_S = 300.0  # generous: the machine may be slow and shared; what is waited for comes long before


def wait_until(condition: Callable[[], T], what: str, *, within_s: float = WAIT_S, every_s: float = 0.02) -> T:
    """Return the condition's first true value; fail with `what` when none came in time."""
    deadline = time.monotonic() + within_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {within_s:g} s in vain until {what}")
        time.sleep(every_s)


def _environment() -> dict[str, str]:
    """Return that of the test, without coverage unless `COVERAGE_PROCESSES` is set.

    Under coverage a worker takes half as long again to start, nearly all of it in the imports of transformers.
    """
    measured = bool(os.environ.get("COVERAGE_PROCESSES"))
    return {name: value for name, value in os.environ.items() if measured or not name.startswith("COVERAGE_PROCESS_")}


class Process:
    """One process of a test, with its output in a file."""

    def __init__(self, popen: subprocess.Popen[bytes], log_path: Path) -> None:
        self.popen = popen
        self.log_path = log_path

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def running(self) -> bool:
        return self.popen.poll() is None

    @property
    def log(self) -> str:
        """Everything it has written to stdout and stderr so far."""
        return self.log_path.read_text(errors="replace")

    def wait(self, within_s: float = WAIT_S) -> int:
        """Return the exit status (negative: the signal that ended it)."""
        try:
            return self.popen.wait(within_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {within_s:g} s: {self.popen.args!r}") from None

    def signal(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def stop(self, within_s: float = WAIT_S) -> int:
        """Ask it to end (SIGTERM) and return the exit status."""
        self.popen.terminate()
        return self.wait(within_s)

    def kill(self) -> None:
        """End it at once, as a crash would, and reap it."""
        self.popen.kill()
        self.popen.wait()

    def wait_for_log(self, text: str, within_s: float = WAIT_S) -> str:
        """Return the whole log once the text is in it; fail early when the process ends without it."""
        wait_until(lambda: text in self.log or not self.running, f"{text!r} is in the log", within_s=within_s)
        assert text in self.log, f"ended with {self.popen.returncode} before it said {text!r}:\n{self.log}"
        return self.log


class Processes:
    """All processes of one test, ended together with it, even when the test run itself is killed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._tether = Tether()
        self._all: list[Process] = []

    def start(self, *argv: str | os.PathLike[str], env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> Process:
        """Start a program; `env` is added to the test's environment.

        What starts before a test has a home, for a whole module, gets one here, and never the developer's own.
        """
        home = {"RADIXQ_HOME": str(self._directory / "home" / ".radixq")}
        words = [os.fspath(word) for word in argv]
        log_path = self._directory / f"{len(self._all)}-{Path(words[0]).name}.log"
        with log_path.open("wb") as log:
            popen = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env={**home, **_environment(), "PYTHONUNBUFFERED": "1", **(env or {})},
                process_group=self._tether.group,
            )
        process = Process(popen, log_path)
        self._all.append(process)
        return process

    def python(self, *arguments: str | os.PathLike[str], env: Mapping[str, str] | None = None) -> Process:
        """Start this test run's Python with the checkout on its path."""
        return self.start(sys.executable, *arguments, env={"PYTHONPATH": str(ROOT), **(env or {})})

    def rq_worker(self, url: str, *arguments: str, model: Path | str, env: Mapping[str, str] | None = None) -> Process:
        """Start `rq worker --worker-class worker.BatchWorker` the way a user does; queue `radixq` by default.

        `arguments` are options and queues, for example `"--burst", "radixq"`.
        """
        words = ["-m", "rq.cli", "worker", "--worker-class", "worker.BatchWorker", "-u", url, *arguments]
        if not arguments or arguments[-1].startswith("-") or arguments[-1].isdigit():  # options alone
            words.append("radixq")
        return self.python(*words, env={"MLX_MODEL_PATH": str(model), **(env or {})})

    def close(self) -> None:
        """Kill what still runs and print every log (pytest shows it when the test failed)."""
        self._tether.cut()
        for process in self._all:
            process.popen.wait()
            print(f"--- {process.popen.args!r} -> {process.popen.returncode}\n{process.log}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.close()
