"""Measure radixq beside mlx-lm's own ways of doing the same jobs, in one call and one process tree.

Every contestant is a process of its own that answers to this one; they take turns, and their CPU seconds are compared,
since other programs on the machine change the wall clock more. One BLAS thread for all. `./ops/bench` sets up what it
needs and calls this file.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import bench_report as report
from bench_cpu import tree_cpu_s
from bench_workloads import QUICK, SMOLLM2, WORKLOADS, Shape, Workload, smollm2_path

from worker import server

ROOT = Path(__file__).resolve().parent.parent
BASE = "stock uncached"
CONTESTANTS = (
    "mlx-lm one by one", "batch_generate", BASE, "stock, KV copied", "mlx_lm.server", "radixq engine", "radixq whole",
)  # fmt: skip
KNOW_COST = (BASE, "stock, KV copied")
PARTS = ("attention", "step", "join", "tree", "slice", "latency")
APART = ("pictures", "queue", "reading", "precision")  # parts with a process of their own
WHEN_NAMED = ("precision",)  # it takes minutes
QUEUE_MODEL = Shape(layers=1, hidden=64, heads=4, kv_heads=2, head_dim=16, inter=128, vocab=400)
STUCK_S, BUSY = 300, 0.02  # a contestant that takes less of a core than this for so long is taken for stuck
GRACE_S = 10
_ONE_THREAD = ("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
_SETTINGS = ("RADIXQ_", "RQ_", "MLX_")


class Child:
    """A process of the benchmark that answers one JSON object a line.

    Raises:
        RuntimeError: it ended instead; the message has its last words.
    """

    def __init__(self, name: str, log: Path, group: int, *argv: str) -> None:
        self.name = name
        self._log: IO[bytes] = log.open("wb")
        self._process = subprocess.Popen(
            [sys.executable, *argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env=_environment(), process_group=group, cwd=ROOT,
        )  # fmt: skip

    def ask(self, **request: int) -> dict[str, Any]:
        """Send a request and return its answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # what it said last is in the log
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Return the next answer."""
        assert self._process.stdout is not None
        spent = tree_cpu_s(self._process.pid)
        while not select.select([self._process.stdout], [], [], STUCK_S)[0]:
            before, spent = spent, tree_cpu_s(self._process.pid)
            if spent - before < BUSY * STUCK_S:
                self._process.kill()
                raise RuntimeError(f"{self.name} did nothing for {STUCK_S} s:\n{self._last_words()}")
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with {self._process.wait()}:\n{self._last_words()}")
        return dict(json.loads(line))

    def answers(self) -> Iterator[dict[str, Any]]:
        """Yield all answers until it ends."""
        assert self._process.stdout is not None
        yield from map(json.loads, self._process.stdout)
        if self._process.wait():
            raise RuntimeError(f"{self.name} ended with {self._process.returncode}:\n{self._last_words()}")

    def close(self) -> None:
        """Let it end, and wait."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        try:
            self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _last_words(self) -> str:
        return "\n".join(Path(self._log.name).read_text(errors="replace").splitlines()[-12:])


class Bench:
    """One call of the benchmark: where its files and processes are.

    Attributes:
        failures: what went wrong so far.
    """

    def __init__(self, directory: Path, group: int, *, quick: bool) -> None:
        self._directory, self._group, self._quick = directory, group, quick
        self._number = 0
        self.failures: list[str] = []

    def child(self, name: str, *argv: str) -> Child:
        """Start a process."""
        self._number += 1
        script, *words = argv
        return Child(name, self._directory / f"{self._number}.log", self._group, str(ROOT / "ops" / script), *words)

    def model(self, model: Shape | str) -> str:
        """Return the directory of a model, written if it is not there yet."""
        name = model.name if isinstance(model, Shape) else model
        directory = self._directory / name
        if not directory.exists():
            say(f"writing the model {name}")
            child = self.child("the model", "bench_models.py", name, str(directory))
            list(child.answers())
            child.close()
        return str(directory)

    def workload(self, workload: Workload, names: Sequence[str], runs: int) -> dict[str, Any]:
        """Let the contestants run one workload in turn and return what came out."""
        directory = self.model(workload.model)
        outcomes: dict[str, list[dict[str, Any]]] = {}
        with ExitStack() as stack:
            children: dict[str, Child] = {}
            ready: list[dict[str, Any]] = []
            for name in names:  # one after the other: some measure the machine when they start
                child = children[name] = self.child(name, "bench_contestants.py", name, workload.name, directory)
                stack.callback(child.close)
                if told := self._try(child.answer):
                    ready.append(told)
            for number in range(runs):
                for name in _turn(names, number):
                    if number and (name in workload.once or name not in outcomes):
                        continue
                    child = children[name]
                    outcome = self._try(lambda child=child, number=number: child.ask(run=number))
                    if outcome:
                        outcomes.setdefault(name, []).append(outcome)
                        say(f"{workload.name} {number + 1}/{runs}: {name} {outcome['cpu_s']:.2f} CPU s")
            knows = next((name for name in KNOW_COST if name in outcomes), None)
            cost = self._try(lambda: children[knows].ask(cost=0)) if knows else None
        return report.summary(workload, {name: outcomes[name] for name in names if name in outcomes}, cost or {}, ready)

    def _try(self, ask: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """Ask; a contestant that failed is told about, and the others go on."""
        try:
            return ask()
        except RuntimeError as error:
            self.failures.append(str(error))
            say(str(error))
            return None

    def parts(self, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Measure parts one after the other."""
        quick = "quick" if self._quick else "full"
        inside = [name for name in names if name in PARTS]
        runs = [("bench_parts.py", quick, *inside)] if inside else []
        runs += [(f"bench_{name}.py", quick) for name in ("pictures", "precision") if name in names]
        runs += [(f"bench_{name}.py", self.model(QUEUE_MODEL), quick) for name in ("queue", "reading") if name in names]
        for argv in runs:
            child = self.child(argv[0], *argv)
            try:
                for figures in child.answers():
                    say(f"{figures['part']} {figures['size']}")
                    yield figures
            except RuntimeError as error:
                self.failures.append(str(error))
                say(str(error))
            child.close()


def _turn(names: Sequence[str], number: int) -> list[str]:
    """Return the order of a round: every other one backwards, so that nobody always follows the same neighbour."""
    return list(names) if number % 2 == 0 else list(reversed(names))


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_SETTINGS)}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return kept | dict.fromkeys(_ONE_THREAD, "1") | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def say(line: str) -> None:
    """Tell a person who waits what happens."""
    print(f"bench: {line}", file=sys.stderr, flush=True)


@contextmanager
def _started(quick: bool) -> Iterator[Bench]:
    """Give a directory and a process group that both go with us, however we end."""
    with tempfile.TemporaryDirectory(prefix="radixq-bench-") as directory, server.Tether() as tether:
        yield Bench(Path(directory), tether.group, quick=quick)


def _arguments() -> argparse.Namespace:
    every = [*WORKLOADS, *QUICK, *PARTS, *APART]
    parser = argparse.ArgumentParser(prog="ops/bench", description="Measure radixq beside mlx-lm.")
    parser.add_argument("--workload", nargs="+", choices=every, metavar="NAME", help=f"of {', '.join(every)}")
    parser.add_argument("--contestant", nargs="+", choices=CONTESTANTS, default=CONTESTANTS, metavar="NAME",
                        help=f"of {', '.join(CONTESTANTS)}")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="tiny sizes, about 90 s of CPU time: does it work?")
    parser.add_argument("--runs", type=int, help="rounds per workload (default: 3, and 9 where nothing is shared)")
    parser.add_argument("--once", nargs="+", choices=CONTESTANTS, default=(), metavar="NAME",
                        help="contestants that run once, besides those whose turn takes minutes anyway")  # fmt: skip
    parser.add_argument("--json", type=Path, nargs="?", const=Path("radixq-bench.json"), metavar="FILE",
                        help="also write the JSON line there (%(const)s)")  # fmt: skip
    parser.add_argument("--plot", type=Path, nargs="?", const=Path("radixq-bench.png"), metavar="FILE",
                        help="draw the workloads into a PNG (%(const)s)")  # fmt: skip
    return parser.parse_args()


def _interrupt(*_: object) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # once is enough; what follows is the way out
    raise KeyboardInterrupt


def main() -> int:
    """Measure, print tables, write what was asked for; the last line on stdout is one JSON object."""
    arguments = _arguments()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    usual = [name for name in APART if name not in WHEN_NAMED]
    names = arguments.workload or [*(["gsp-quick"] if arguments.quick else WORKLOADS), *PARTS, *usual]
    chosen_ones = [{**WORKLOADS, **QUICK}[name] for name in names if name not in (*PARTS, *APART)]
    workloads = [replace(workload, once=(*workload.once, *arguments.once)) for workload in chosen_ones]
    real = "precision" in names or any(workload.model == SMOLLM2 for workload in workloads)
    if real and not smollm2_path().exists():
        print(f"bench: {smollm2_path()} is not there: ./ops/bench fetches it", file=sys.stderr)
        return 1
    chosen = [name for name in CONTESTANTS if name in arguments.contestant]
    result = report.heading(arguments.quick)
    print(report.heading_text(result), flush=True)
    began = time.monotonic()
    try:
        with _started(arguments.quick) as bench:
            for workload in workloads:
                runs = arguments.runs or (2 if arguments.quick else workload.runs)
                result["workloads"].append(bench.workload(workload, chosen, runs))
                print(report.table(result["workloads"][-1]), flush=True)
            for figures in bench.parts([name for name in names if name in (*PARTS, *APART)]):
                result["parts"].append(figures)
            print(report.parts_text(result["parts"]), flush=True)
            result["failures"] = bench.failures
    except KeyboardInterrupt:
        print("\ninterrupted; nothing is left running, what was finished follows", file=sys.stderr)
        result["interrupted"] = True
    except RuntimeError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    result["seconds"], result["load_after"] = round(time.monotonic() - began, 1), os.getloadavg()
    if arguments.plot:
        report.plot(result, arguments.plot)
    if arguments.json:
        arguments.json.write_text(json.dumps(result) + "\n")
    print(json.dumps(result))
    return 130 if "interrupted" in result else 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
