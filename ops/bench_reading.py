"""What reading the queue costs the engine: `python ops/bench_reading.py DIRECTORY QUICK`, a model for its tokenizer.

Prints one JSON object. A decode step of a model is timed while the scout's process reads, tokenises and plans the jobs
of a full queue, and in between while that process is stopped; CPU milliseconds are medians, with one BLAS thread.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from bench_parts import Size, _filled, _model, _prefix
from redis import Redis

from common.settings import Settings
from producer import submit_many
from worker import hook, server
from worker.kv import KV
from worker.scout import Scout

BLOCK_STEPS = 10
MIN_BLOCKS, MAX_BLOCKS = 3, 40
QUICK, FULL = Size(4, 2, 16, 4, 256, layers=2, inter=64), Size(14, 2, 64, 8, 512, layers=4, inter=2048)


def main() -> None:
    """Measure it."""
    directory, quick = sys.argv[1], sys.argv[2] == "quick"
    size, num_jobs = (QUICK, 200) if quick else (FULL, 10_000)
    with tempfile.TemporaryDirectory() as home, server.start(Path(home), persistent=False) as running:
        submit_many(_jobs(num_jobs), redis=running.url)
        scout = Scout(Settings.from_env({"MLX_MODEL_PATH": directory}), ["radixq"], redis_url=running.url)
        scout.start()
        try:
            with Redis.from_url(running.url) as redis:
                spent = _measure(_stepper(size), scout, lambda: _num_read(redis), num_jobs)
        finally:
            scout.close()
    ms = {name: float(np.median(values)) for name, values in spent.items()}
    print(json.dumps({
        "part": "reading", "size": f"{num_jobs} jobs, {size.words} {size.layers} layers", "cpu_ms": ms,
        "longer": ms["reading"] / ms["alone"] - 1, "steps": {name: len(values) for name, values in spent.items()},
    }))  # fmt: skip


def _jobs(num: int) -> Iterator[dict[str, Any]]:
    for number in range(num):
        head = " ".join(f"t{(number % 50 + at) % 300}" for at in range(400))
        yield {"prompt": f"{head} t{number % 300} t{number % 7}", "max_tokens": 1}


def _stepper(size: Size) -> Callable[[], float]:
    """Return a decode step of a batch of ours; it returns the CPU milliseconds that it took."""
    model = _model(size)
    hook.install(model)
    batch = _filled(KV(_prefix(size)), size, size.rows)
    column = np.ones((size.rows, 1), np.int32)

    def step() -> float:
        began = time.process_time()
        mx.eval(mx.argmax(batch.forward(model, column, [1] * size.rows), axis=-1))
        return (time.process_time() - began) * 1e3

    step()
    return step


def _num_read(redis: Redis) -> int:
    stats: dict[str, dict[str, int]] = redis.info("commandstats")
    return stats.get("cmdstat_hstrlen", {"calls": 0})["calls"]


def _measure(
    step: Callable[[], float], scout: Scout, num_read: Callable[[], int], num_jobs: int
) -> dict[str, list[float]]:
    """Step in blocks, in turn alone and while the queue is read, until all of it was read or enough was measured."""
    assert scout.pid is not None
    while not num_read():  # it loads its tokenizer
        time.sleep(0.01)
    spent: dict[str, list[float]] = {"alone": [], "reading": []}
    for number in range(MAX_BLOCKS):
        if number >= MIN_BLOCKS and num_read() >= num_jobs:
            break
        os.kill(scout.pid, signal.SIGSTOP)
        spent["alone"] += [step() for _ in range(BLOCK_STEPS)]
        os.kill(scout.pid, signal.SIGCONT)
        spent["reading"] += [step() for _ in range(BLOCK_STEPS)]
        scout.poll()
    return spent


if __name__ == "__main__":
    main()
