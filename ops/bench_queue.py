"""What the queue costs: `python ops/bench_queue.py DIRECTORY QUICK`, with the directory of a model that is almost free.

Prints one JSON object. Latencies are wall clock on loopback with an idle worker; jobs per second are those of a full
queue and a worker that has started, beside RQ's own SimpleWorker with a function that does nothing.
"""

from __future__ import annotations

import json
import operator
import sys
import time
from typing import Any

import numpy as np
from bench_served import Whole
from rq import Queue

from common import keys
from producer import submit, submit_many

POLL_S = 0.0002


def main() -> None:
    """Measure both."""
    directory, quick = sys.argv[1], sys.argv[2] == "quick"
    with Whole(directory) as whole:
        stock = _rate(whole, _fill_stock(whole, 40 if quick else 1000), "rq.SimpleWorker")
        ours = _rate(whole, _fill(40 if quick else 4000), "worker.BatchWorker")
        whole.redis.delete(keys.metrics("bench"))
        latency = _overhead(whole, 5 if quick else 200)
    print(json.dumps({"part": "queue", **latency, "jobs_per_s": {"radixq": ours, "rq_simple_worker": stock}}))


def _overhead(whole: Whole, times: int) -> dict[str, Any]:
    """Time from submit to a readable result, less what the engine took."""
    whole.wait_ready()
    spent = []
    for number in range(times + 3):
        time.sleep(0.01 * (number % 7))  # not in step with the worker's own rhythm
        began = time.perf_counter()
        ticket = submit(prompt="t1 t2 t3", max_tokens=2, temperature=0.0)
        key = keys.result(ticket.id)
        while whole.redis.hget(key, "status") != "finished":
            time.sleep(POLL_S)
        total = (time.perf_counter() - began) * 1e3
        engine = whole.redis.hmget(key, "prefill_ms", "decode_ms")
        spent.append(total - sum(map(float, engine)))
    p50, p99 = (float(x) for x in np.percentile(spent[3:], [50, 99]))
    return {"size": f"{times} jobs, one at a time", "overhead_ms": {"p50": p50, "p99": p99}}


def _fill(count: int) -> int:
    submit_many([{"prompt": f"t{number % 300} t{number % 7}"} for number in range(count)], max_tokens=1)
    return count


def _fill_stock(whole: Whole, count: int) -> int:
    queue = Queue(keys.DEFAULT_QUEUE, connection=whole.redis)
    queue.enqueue_many([Queue.prepare_data(operator.not_, args=(number,)) for number in range(count)])
    return count


def _rate(whole: Whole, count: int, worker_class: str) -> float:
    """Return jobs per second from the first tenth to the last job; the queue is empty afterwards."""
    registry = f"rq:finished:{keys.DEFAULT_QUEUE}"
    whole.redis.delete(registry)
    worker = whole.start_worker("--burst", worker_class=worker_class)
    began, counted, done = time.perf_counter(), 0, 0
    while done < count and worker.poll() is None:
        done = whole.redis.zcard(registry)
        if done < count // 10:
            began, counted = time.perf_counter(), done
        time.sleep(0.005)
    seconds = time.perf_counter() - began
    worker.wait(60)
    if whole.redis.zcard(registry) < count:
        raise RuntimeError(f"{worker_class} finished {done} of {count} jobs: {whole.log[-2000:]}")
    return (count - counted) / seconds


if __name__ == "__main__":
    main()
