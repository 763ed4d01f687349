"""What the queue costs: `python ops/bench_queue.py DIRECTORY QUICK`, with the directory of a model that is almost free.

Prints one JSON object. Jobs per second are those of a full queue and a worker that has started and whose engine does
nothing, in turn with RQ's own SimpleWorker and a function that does nothing. Latencies are wall clock on loopback, job
by job in turn between an idle worker with a tiny model and an idle SimpleWorker.
"""

from __future__ import annotations

import json
import operator
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from bench_cpu import tree_cpu_s
from bench_served import Whole
from rq import Queue

from common import keys
from producer import submit, submit_many

OURS, STOCK = "bench_noop.NoopWorker", "rq.SimpleWorker"
STOCK_QUEUE = "stock"
BLOCK_MS = 2000  # less than the client's own patience
PAUSES_S = tuple(0.01 * number for number in range(7))  # between two jobs: not in step with the worker's own rhythm


def main() -> None:
    """Measure both."""
    directory, quick = sys.argv[1], sys.argv[2] == "quick"
    with Whole(directory) as whole:
        count, runs = (40, 1) if quick else (2000, 3)
        rates: dict[str, list[tuple[float, float]]] = {"radixq": [], "rq_simple_worker": []}
        for _ in range(runs):
            rates["rq_simple_worker"].append(_rate(whole, _fill_stock, count // 2, STOCK))
            rates["radixq"].append(_rate(whole, _fill, count, OURS))
        whole.redis.delete(keys.metrics("bench"))
        latency = _overhead(whole, 5 if quick else 200)
    speed, cost = ({name: float(np.median([run[n] for run in both])) for name, both in rates.items()} for n in (0, 1))
    ratio = speed["radixq"] / speed["rq_simple_worker"]
    print(json.dumps({"part": "queue", **latency, "jobs_per_s": speed, "times_simple_worker": ratio, "cpu_ms": cost}))


def _overhead(whole: Whole, times: int) -> dict[str, Any]:
    """Milliseconds from submit to a readable result, beside those of RQ's own worker with nothing to do."""
    whole.wait_ready()
    whole.start_worker(worker_class=STOCK, queue=STOCK_QUEUE)
    ways = {"radixq": _one, "rq_simple_worker": _one_stock}
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(times + 3):
        for name, way in ways.items():
            time.sleep(PAUSES_S[number % len(PAUSES_S)])
            spent[name].append(way(whole))
    found = {
        name: dict(zip(("p10", "p50", "p99"), map(float, np.percentile(all_[3:], [10, 50, 99])), strict=True))
        for name, all_ in spent.items()
    }
    return {"size": f"{times} jobs, one at a time", "overhead_ms": found}


def _one(whole: Whole) -> float:
    """Run a job; what the engine took is not counted."""
    began = time.perf_counter()
    ticket = submit(prompt="t1 t2 t3", max_tokens=2, temperature=0.0)
    total = _until_readable(whole, ticket.id) - began
    status, *engine = whole.redis.hmget(keys.result(ticket.id), "status", "prefill_ms", "decode_ms")
    assert status == "finished", ticket.id
    return total * 1e3 - sum(map(float, engine))


def _one_stock(whole: Whole) -> float:
    began = time.perf_counter()
    job = Queue(STOCK_QUEUE, connection=whole.redis).enqueue(operator.not_, 1)
    return (_until_readable(whole, job.id) - began) * 1e3


def _until_readable(whole: Whole, job_id: str) -> float:
    """Return when a result was there.

    It and RQ's stream entry are written in one transaction, so waiting for that entry needs no polling, which would
    take a core from those who are measured.
    """
    while not whole.redis.xread({f"rq:results:{job_id}": "0-0"}, block=BLOCK_MS):
        pass
    return time.perf_counter()


def _fill(whole: Whole, count: int) -> None:
    submit_many([{"prompt": f"t{number % 300} t{number % 7}"} for number in range(count)], max_tokens=1)


def _fill_stock(whole: Whole, count: int) -> None:
    queue = Queue(keys.DEFAULT_QUEUE, connection=whole.redis)
    queue.enqueue_many([Queue.prepare_data(operator.not_, args=(number,)) for number in range(count)])


def _rate(whole: Whole, fill: Callable[[Whole, int], None], count: int, worker_class: str) -> tuple[float, float]:
    """Return jobs per second, and CPU milliseconds per job of the worker's processes and the server.

    From the first tenth to the last job; the queue is empty afterwards.
    """
    registry = f"rq:finished:{keys.DEFAULT_QUEUE}"
    whole.redis.delete(registry)
    fill(whole, count)
    worker = whole.start_worker("--burst", worker_class=worker_class)
    began = cpu = 0.0
    counted = done = 0
    while done < count and worker.poll() is None:
        done = whole.redis.zcard(registry)
        if not began and done >= count // 10:
            began, counted, cpu = time.perf_counter(), done, _cpu_s(whole, worker)
        time.sleep(0.01)
    seconds, cpu = time.perf_counter() - began, _cpu_s(whole, worker) - cpu
    worker.wait(60)
    if whole.redis.zcard(registry) < count:
        raise RuntimeError(f"{worker_class} finished {done} of {count} jobs: {whole.log[-2000:]}")
    return (count - counted) / seconds, cpu * 1e3 / (count - counted)


def _cpu_s(whole: Whole, worker: subprocess.Popen[bytes]) -> float:
    usage: dict[str, Any] = whole.redis.info("cpu")
    return tree_cpu_s(worker.pid) + float(usage["used_cpu_user"]) + float(usage["used_cpu_sys"])


if __name__ == "__main__":
    main()
