"""A server, a real `rq worker` process with a model, and a way to submit: what each integration test runs against."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from redis import Redis

from common import keys
from common.messages import Result
from producer import Ticket, submit
from tests.models import save_tiny, tiny_tokenizer
from tests.processes import Process, Processes, wait_until
from worker import server

KV_BYTES = 2_000_000
"""About 3,900 tokens of the tiny model: little enough that tests can fill it."""


POISON = "~"
"""A character whose embedding is not a number in the tiny model that the tests here use."""


@dataclass(frozen=True)
class Pipeline:
    """A running pipe from `producer.submit` to the result."""

    url: str
    worker: Process
    label: str
    real: bool

    def submit(self, text: str, **options: Any) -> Ticket:
        """Submit one job to this pipeline's server."""
        return submit(text, redis=self.url, **options)

    def run(self, text: str, **options: Any) -> Result:
        """Submit one job and wait for its result."""
        return self.submit(text, **options).result(timeout_s=300)

    def metrics(self) -> dict[str, str]:
        """Return the worker's metrics as `redis-cli HGETALL` shows them."""
        with Redis.from_url(self.url, decode_responses=True) as client:
            return dict(client.hgetall(keys.metrics(self.label)))

    def fresh_metrics(self) -> dict[str, str]:
        """Return metrics written after everything that has finished until now."""
        before = self.metrics().get("updated_at")
        return wait_until(
            lambda: (now := self.metrics()).get("updated_at") != before and now["jobs_running"] == "0" and now,
            "the worker has written its metrics",
        ) or {}  # fmt: skip


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """Run one worker with a tiny Qwen2-VL."""
    pytest.importorskip("mlx_vlm", reason="radixq[vision] is not installed")
    from tests.vision_models import save_tiny_vision

    directory: Path = tmp_path_factory.mktemp("seeing")
    model = save_tiny_vision(directory / "tiny-vl")
    env = {"RADIXQ_WORKER_NAME": "eyes", "RADIXQ_MAX_ROWS": "16", "RADIXQ_HOME": str(directory / "home")}
    with server.start(directory / "server", persistent=False) as running, Processes(directory) as processes:
        worker = processes.rq_worker(running.url, model=model, env=env)
        worker.wait_for_log("ready", within_s=600)
        yield Pipeline(running.url, worker, "eyes", False)
        assert worker.running, worker.log


def _models() -> list[Any]:
    # Collected with the other tests, this comes after tests/conftest.py has put the name away; called alone, before.
    named = os.environ.get("RADIXQ_TEST_MODEL_PATH") or os.environ.get("MLX_MODEL_PATH")
    if os.environ.get("INTEGRATION_TEST") != "1":
        why = "set INTEGRATION_TEST=1 and MLX_MODEL_PATH to run this with a model of your own"
    elif not named:
        why = "INTEGRATION_TEST=1 needs MLX_MODEL_PATH: a directory, a hub id or a .gguf file"
    else:
        return ["tiny", pytest.param(named, id="own-model", marks=pytest.mark.slow)]
    return ["tiny", pytest.param("", id="own-model", marks=pytest.mark.skip(reason=why))]


def _poisoned(directory: Path) -> Path:
    """Make the embedding of one character NaN, as damage to a weight file or to memory would."""
    path = str(directory / "model.safetensors")
    weights: Any = mx.load(path)
    (token,) = tiny_tokenizer().encode(POISON)
    weights["model.embed_tokens.weight"][token] = mx.nan
    mx.eval(weights)
    mx.save_safetensors(path, weights, {"format": "mlx"})
    return directory


@pytest.fixture(scope="module", params=_models())
def pipeline(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """Run one worker for all tests of a module; with the tiny model its KV budget is small, see `KV_BYTES`."""
    directory: Path = tmp_path_factory.mktemp("pipeline")
    real = request.param != "tiny"
    running = server.start(directory / "server", persistent=False)
    env = {"RADIXQ_WORKER_NAME": "it", "RADIXQ_MAX_ROWS": "16", "RADIXQ_HOME": str(directory / "home")}
    model = request.param if real else _poisoned(save_tiny(directory / "tiny"))
    if not real:
        env["RADIXQ_KV_BYTES"] = str(KV_BYTES)
    try:
        with Processes(directory) as processes:
            worker = processes.rq_worker(running.url, model=model, env=env)
            worker.wait_for_log("ready", within_s=600)
            yield Pipeline(running.url, worker, "it", real)
            assert worker.running, worker.log
    finally:
        running.stop()
