"""Run the main job once, with real parts: a server, `rq worker`, a model, and a program that submits.

Starts everything on free loopback ports and in a temporary directory, shows what happens, and leaves nothing running
however it ends. `./ops/demo` sets up what it needs and calls it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from demo_jobs import GROUPS, Group
from demo_pictures import PictureGroup, write_tiny_model
from demo_pictures import groups as picture_groups
from redis import Redis

from common import keys
from common.errors import GenerationFailed, RadixqError
from common.messages import Usage
from producer import Ticket, submit
from worker import platform, server

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / ".radixq/models/SmolLM2-135M-Instruct.Q4_1.gguf"
WORKER = ("rq", "worker", "--worker-class", "worker.BatchWorker", "-u")
LIVE = sys.stdout.isatty()


@dataclass(frozen=True, slots=True)
class Running:
    """The two processes of the demo, seen from the one that submits."""

    url: str
    redis: Redis
    worker: subprocess.Popen[bytes]
    log_path: Path
    group: int  # processes in it end with this one


def main() -> int:
    """Run the demo; the exit status is 0 when every job finished."""
    parser = argparse.ArgumentParser(prog="ops/demo", description="Run the main job once on a small real model.")
    parser.add_argument("--model", help="directory, hub id or .gguf file (default: SmolLM2-135M)")
    parser.add_argument("--image", action="store_true", help="questions about pictures, to the model of --model or "
                        "MLX_MODEL_PATH; without either to a tiny random one, whose words mean nothing")  # fmt: skip
    arguments = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        if arguments.image:
            return show_pictures(arguments.model or os.environ.get("MLX_MODEL_PATH"))
        with started(arguments.model or str(MODEL)) as running:
            return show(running, GROUPS, "a long system prompt")
    except KeyboardInterrupt:
        print("\ninterrupted; the worker and the server are stopped", file=sys.stderr)
        return 130
    except RadixqError as error:
        print(f"demo: {error}", file=sys.stderr)
        return error.exit_code


def show_pictures(model: str | None) -> int:
    """Run the jobs that have pictures; return the exit status."""
    with tempfile.TemporaryDirectory(prefix="radixq-demo-model-") as directory:
        named = model or write_tiny_model(Path(directory))
        if model is None:
            print("This model is random and a few hundred kilobytes: it shows how pictures go through the pipe.")
            print("Its words mean nothing. For answers, name a vision model in MLX_MODEL_PATH, such as a Qwen2-VL.\n")
        with started(named) as running:
            status = show(running, picture_groups(), "a picture")
            runs = running.redis.hget(keys.metrics(_worker_label(running.redis)), "vision_runs")
            print(f"\nthe vision tower ran {runs} times for {len(picture_groups())} pictures (vision_runs)")
            return status


def _interrupt(*_: object) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # once is enough; what follows is the way out
    raise KeyboardInterrupt


@contextmanager
def started(model: str) -> Iterator[Running]:
    """Start the server and the worker; end both, and remove their directory, on the way out."""
    home = Path(tempfile.mkdtemp(prefix="radixq-demo-"))
    try:
        with server.Tether() as tether:
            broker = server.start(home, persistent=False)
            try:
                print(f"server  {broker.url} (in {home})")
                worker = _start_worker(broker.url, model, home, tether.group)
                with Redis.from_url(broker.url, decode_responses=True) as redis:
                    yield Running(broker.url, redis, worker, home / "worker.log", tether.group)
                _end(worker)
            finally:
                tether.cut()
                broker.stop()
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _start_worker(url: str, model: str, home: Path, group: int) -> subprocess.Popen[bytes]:
    print(f"worker  MLX_MODEL_PATH={model} {' '.join(WORKER)} {url} {keys.DEFAULT_QUEUE}")
    blas = platform.prepare()
    print(f"matrix products by {blas.name}" + (f"; {blas.note}" if blas.note else ""))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RQ_")}
    environment |= {"MLX_MODEL_PATH": model, "RADIXQ_HOME": str(home), "PYTHONPATH": str(ROOT)}
    with (home / "worker.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "rq.cli", *WORKER[1:], url, keys.DEFAULT_QUEUE],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, process_group=group,
        )  # fmt: skip


def _end(worker: subprocess.Popen[bytes]) -> None:
    worker.terminate()
    try:
        worker.wait(20)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()


def show(running: Running, groups: Sequence[Group | PictureGroup], shared: str) -> int:
    """Submit, watch, print what came out; return the exit status."""
    begun = time.monotonic()
    tickets = {
        group.name: [
            submit(messages=group.messages(question), max_tokens=group.max_tokens, redis=running.url)
            for question in group.questions
        ]
        for group in groups
    }
    every = [ticket for group in tickets.values() for ticket in group]
    print(f"\nsubmitted {len(every)} jobs in {len(groups)} groups; the jobs of a group share {shared}\n")
    if not watch(running, every):
        print(f"demo: the worker ended with {running.worker.returncode}; its last words:", file=sys.stderr)
        print(*running.log_path.read_text(errors="replace").splitlines()[-15:], sep="\n", file=sys.stderr)
        return 1
    seconds = time.monotonic() - begun
    print("answers, as the model gave them:\n")
    usages = [usage for name, group in tickets.items() for usage in print_group(name, group)]
    print_totals(usages, seconds)
    print_redis(running, every[0].id)
    return 0 if len(usages) == len(every) else 1


def watch(running: Running, tickets: list[Ticket]) -> bool:
    """Show progress until all jobs have ended; False when the worker ended first."""
    last = ""
    while True:
        alive = running.worker.poll() is None
        counts = Counter(ticket.status() for ticket in tickets)
        ended = len(tickets) - counts["queued"] - counts["running"]
        line = _progress(counts, ended, running.redis.hgetall(keys.metrics(_worker_label(running.redis))))
        if line != last:
            _show_progress(line)
        last = line
        if ended == len(tickets) or not alive:
            print(flush=True)
            return alive
        time.sleep(0.2 if LIVE else 2.0)


def _show_progress(line: str) -> None:
    """Rewrite the terminal's last line; elsewhere print another."""
    if LIVE:
        print(f"\r\033[K{line[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
    else:
        print(line, flush=True)


def _progress(counts: Counter[str], ended: int, metrics: dict[str, str]) -> str:
    state = metrics.get("state", "loading the model")
    line = f"{state}: {counts['queued']} queued, {counts['running']} running, {ended} ended"
    if "cache_hit_ratio" not in metrics:
        return line
    rates = f"prefill {_number(metrics, 'prefill_tokens_per_s')} and decode {_number(metrics, 'decode_tokens_per_s')}"
    ratio = f" | hit ratio {_number(metrics, 'cache_hit_ratio', 2)}" if ended else ""  # it counts jobs that have ended
    return f"{line} | {rates} tokens/s{ratio}"


def _number(metrics: dict[str, str], name: str, digits: int = 0) -> str:
    return f"{float(metrics.get(name) or 0):.{digits}f}"


def _worker_label(redis: Redis) -> str:
    labels = redis.zrange(keys.WORKERS, -1, -1)
    return str(labels[0]) if labels else ""


def print_group(name: str, tickets: list[Ticket]) -> list[Usage]:
    """Print one line per job; return the token counts of those that finished."""
    print(f"{name:<10} cached  prefill  new  answer")
    return [usage for ticket in tickets if (usage := _print_answer(ticket)) is not None]


def _print_answer(ticket: Ticket) -> Usage | None:
    try:
        result = ticket.result(timeout_s=10)
    except GenerationFailed as error:
        print(f"  {ticket.id[:8]} failed: {error}")
        return None
    usage = result.usage
    assert usage is not None
    answer = " ".join((result.text or "").split())
    width = max(20, shutil.get_terminal_size((120, 24)).columns - 36)
    counts = f"{usage.cached_tokens:>6}  {usage.prefill_tokens:>7}  {usage.completion_tokens:>3}"
    print(f"  {ticket.id[:8]} {counts}  {answer if len(answer) <= width else answer[: width - 3] + '...'}")
    return usage


def print_totals(usages: list[Usage], seconds: float) -> None:
    """Print what the cache saved, added up over the results."""
    prompt, cached, computed, new = (
        sum(getattr(usage, f"{name}_tokens") for usage in usages)
        for name in ("prompt", "cached", "prefill", "completion")
    )
    print(
        f"\n{prompt} prompt tokens = {cached} cached + {computed} computed "
        f"({100 * cached / max(1, prompt):.0f} % were not computed again); "
        f"{new} new tokens; {seconds:.1f} s with loading the model"
    )


def print_redis(running: Running, job_id: str) -> None:
    """Print the redis-cli lines that show the same, and what they print."""
    _await_metrics(running.redis)
    client = shutil.which("redis-cli") or shutil.which("valkey-cli")
    if client is None:
        print("\nredis-cli is not installed here: `radixq inspect KEY` prints what it would print.")
    for key in (keys.result(job_id), keys.metrics(_worker_label(running.redis))):
        print(f"\n$ redis-cli -u {running.url} HGETALL {key}")
        if client is not None:
            _run(running, client, "-u", running.url, "HGETALL", key)
        else:
            _run(running, sys.executable, "-m", "producer.cli", "inspect", key)
    print(f"\n$ rq info -u {running.url}")
    _run(running, sys.executable, "-m", "rq.cli", "info", "-u", running.url)


def _await_metrics(redis: Redis, within_s: float = 5.0) -> None:
    """Wait until the worker, which writes its metrics about once a second, has counted the last job."""
    end = time.monotonic() + within_s
    while redis.hget(keys.metrics(_worker_label(redis)), "jobs_running") != "0" and time.monotonic() < end:
        time.sleep(0.1)


def _run(running: Running, *argv: str) -> None:
    sys.stdout.flush()
    environment = {**os.environ, "RADIXQ_REDIS_URL": running.url, "PYTHONPATH": str(ROOT)}
    subprocess.run(argv, stdin=subprocess.DEVNULL, env=environment, check=True, timeout=60, process_group=running.group)


if __name__ == "__main__":
    sys.exit(main())
