"""The two contestants that are asked over a wire: `mlx_lm.server` by HTTP, and radixq by its queue.

Both run on loopback and end with this process. Knows nothing of how the benchmark compares them.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import mlx_lm.utils
from bench_cpu import tree_cpu_s
from bench_workloads import Job, Workload
from redis import Redis

from common import keys
from producer import submit_many
from worker import server

ROOT = Path(__file__).resolve().parent.parent
WAIT_S = 300.0


class Server:
    """`mlx_lm.server` with its defaults and its prompt cache, in threads of this process; clients beside it."""

    def __init__(self, directory: str) -> None:
        from mlx_lm import server as stock

        self.tokenizer = mlx_lm.utils.load_tokenizer(Path(directory))
        self._directory = directory
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self._port = int(probe.getsockname()[1])
        words = ["--model", directory, "--port", str(self._port), "--log-level", "ERROR"]
        sys.argv = ["mlx_lm.server", *words]
        warnings.simplefilter("ignore")
        threading.Thread(target=stock.main, daemon=True).start()
        _until(self._up, "mlx_lm.server answers")

    def cpu_s(self) -> float:
        """All threads of this process, clients included: they do next to nothing."""
        return time.process_time()

    def run(self, jobs: list[Job], workload: Workload, outcome: Any) -> None:
        """Ask all at once, from as many clients as the server decodes together."""
        outcome.as_text = True
        with ThreadPoolExecutor(workload.rows) as pool:
            answers = list(pool.map(lambda job: self._ask(job, workload), jobs))
        for text, cached in answers:
            outcome.tokens.append(list(self.tokenizer.encode(text, add_special_tokens=False)))
            outcome.cached_tokens += cached

    def _ask(self, job: Job, workload: Workload) -> tuple[str, int]:
        body = {"messages": job.messages, "max_tokens": workload.answer, "temperature": 0.0}
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=3600)
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        reply = json.loads(connection.getresponse().read())
        connection.close()
        usage = reply["usage"]
        if usage["prompt_tokens"] != len(job.tokens):
            raise RuntimeError(f"the server made {usage['prompt_tokens']} tokens of {len(job.tokens)}")
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        return reply["choices"][0]["message"].get("content") or "", cached

    def _up(self) -> bool:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False


class Whole:
    """The product: `producer.submit_many`, the embedded server, `rq worker`, results read back."""

    def __init__(self, directory: str, **settings: str) -> None:
        self.tokenizer = mlx_lm.utils.load_tokenizer(Path(directory))
        self._home = Path(tempfile.mkdtemp(prefix="radixq-bench-"))
        self._tether = server.Tether()
        self.broker = server.start(self._home, persistent=False)
        os.environ["RADIXQ_REDIS_URL"] = self.broker.url
        self.redis = Redis.from_url(self.broker.url, decode_responses=True)
        self._environment = _clean_environment() | {
            "MLX_MODEL_PATH": directory, "RADIXQ_DTYPE": "stored", "RADIXQ_WORKER_NAME": "bench",
            "RADIXQ_HOME": str(self._home), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'ops'}", **settings,
        }  # fmt: skip

    def start_worker(
        self, *options: str, worker_class: str = "worker.BatchWorker", queue: str = keys.DEFAULT_QUEUE
    ) -> subprocess.Popen[bytes]:
        """Start `rq worker` on a queue."""
        with (self._home / "worker.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "rq.cli", "worker", "--worker-class", worker_class, *options]
                + ["-u", self.broker.url, queue],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment,
                process_group=self._tether.group,
            )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._tether.cut()
        self.broker.stop()
        shutil.rmtree(self._home, ignore_errors=True)

    def cpu_s(self) -> float:
        """Producer, server, worker and the worker's own processes."""
        return tree_cpu_s(os.getpid())

    @property
    def log(self) -> str:
        """What the workers have said."""
        return (self._home / "worker.log").read_text(errors="replace")

    def wait_ready(self) -> None:
        """Start a worker unless one runs, and wait until it takes jobs."""
        if not self.redis.exists(keys.metrics("bench")):
            worker = self.start_worker()
            _until(lambda: self._state() in ("idle", "busy") or worker.poll() is not None, "the worker is ready")
            if worker.poll() is not None:
                raise RuntimeError(f"the worker ended: {self.log[-2000:]}")

    def run(self, jobs: list[Job], workload: Workload, outcome: Any) -> None:
        """Submit all jobs, wait for all results."""
        self.wait_ready()
        outcome.as_text = True
        work = [{"messages": job.messages} for job in jobs]
        tickets = submit_many(work, max_tokens=workload.answer, temperature=0.0)
        for ticket in tickets:
            result = ticket.result()
            assert result.usage is not None
            outcome.tokens.append(list(self.tokenizer.encode(result.text, add_special_tokens=False)))
            outcome.cached_tokens += result.usage.cached_tokens
        peak = self.redis.hget(keys.metrics("bench"), "peak_bytes")
        outcome.peak_bytes = max(0, int(peak or 0) - self._weights())

    def _weights(self) -> int:
        directory = Path(self._environment["MLX_MODEL_PATH"])
        return sum(file.stat().st_size for file in directory.glob("*.safetensors"))

    def _state(self) -> str:
        return str(self.redis.hget(keys.metrics("bench"), "state"))


def _clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("RADIXQ_", "RQ_", "MLX_"))}


def _until(condition: Any, what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {WAIT_S:g} s in vain until {what}")
        time.sleep(0.05)
