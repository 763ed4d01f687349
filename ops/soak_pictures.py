"""Soak the pictures: questions about a few of them in random order, through a real server and a real `rq worker`.

Every job must have one result, the texts of a sample be those of mlx-vlm for the job alone, and each picture go through
the tower once, and what MLX holds must not grow; what the worker, its reader and Redis hold is sampled on the way. What
grows there: MLX's pool of freed buffers, up to 1 GiB, and the records of ended jobs. Called by `soak.py`.
"""

from __future__ import annotations

import random
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from redis import Redis
from rq.results import Result as RqResult

from common import keys
from common.serializer import JobSerializer
from producer import Ticket, submit_many
from tests.processes import Process, Processes
from tests.vision_engines import Bench, bench, characters, saved
from tests.vision_models import picture
from worker import server
from worker.job import QueuedJob

SIZES = ((20, 30), (33, 17), (16, 90), (64, 64), (40, 20), (300, 200), (90, 16), (64, 65), (128, 128), (1000, 700))
"""Of the pictures, in pixels: small, tall, wide, and larger than the model looks at."""
WORDS = ("what", "which", "where", "is", "it", "left", "right", "red", "old", "here")
SAMPLE, ANSWER_TOKENS, PARTS = 20, 6, 8
KV_BYTES = 8_000_000
"""Full after some hundred jobs of the tiny model; from then on nothing may grow."""
LABEL = "soak"


@dataclass(frozen=True, slots=True)
class Job:
    """A question about one of the pictures."""

    shown: int
    question: str


@dataclass(slots=True)
class Soaked:
    """What came out.

    Attributes:
        distinct_tokens: of all prompts, each prefix counted once: the least that must be computed.
        held: bytes by what holds them, after each part of the jobs.
    """

    vision_runs: int = 0
    computed_tokens: int = 0
    distinct_tokens: int = 0
    evicted_nodes: int = 0
    held: dict[str, list[int]] = field(default_factory=dict)

    def __str__(self) -> str:
        held = "; ".join(
            f"{name} {' '.join(f'{size / 2**20:.1f}' for size in sizes)}" for name, sizes in self.held.items()
        )
        return (
            f"the tower ran {self.vision_runs} times; {self.computed_tokens} tokens computed, "
            f"{self.distinct_tokens} distinct; {self.evicted_nodes} nodes evicted; MiB held after each part: {held}"
        )


def soak(num_jobs: int, seed: int, kv_bytes: int = KV_BYTES) -> Soaked:
    """Run the jobs.

    Raises:
        RuntimeError: something did not come out as it must.
    """
    rng = random.Random(seed)
    images = [picture(*size, number) for number, size in enumerate(SIZES)]
    jobs = [Job(number % len(images), _question(rng, number)) for number in range(num_jobs)]
    rng.shuffle(jobs)
    with tempfile.TemporaryDirectory(prefix="radixq-soak-") as name:
        home = Path(name)
        env = {"RADIXQ_WORKER_NAME": LABEL, "RADIXQ_KV_BYTES": str(kv_bytes), "RADIXQ_HOME": name}
        with server.start(home / "server", persistent=False) as running, Processes(home) as processes:
            worker = processes.rq_worker(running.url, model=saved("qwen2_vl"), env=env)
            worker.wait_for_log("ready", within_s=600)
            with Redis.from_url(running.url, decode_responses=True) as redis:
                return _run(redis, running.url, worker, images, jobs)


def _question(rng: random.Random, number: int) -> str:
    return " ".join([*rng.choices(WORDS, k=rng.randint(1, 5)), f"{number}?"])


def _run(redis: Redis, url: str, worker: Process, images: list[Image.Image], jobs: list[Job]) -> Soaked:
    out = Soaked()
    texts: list[str] = []
    part = -(-len(jobs) // PARTS)
    for begin in range(0, len(jobs), part):
        asked = [{"text": job.question, "images": [images[job.shown]]} for job in jobs[begin : begin + part]]
        tickets = submit_many(asked, redis=url, max_tokens=ANSWER_TOKENS)
        texts += [_answer(ticket, redis) for ticket in tickets]
        for name, size in _held(redis, worker.pid).items():
            out.held.setdefault(name, []).append(size)
    metrics = redis.hgetall(keys.metrics(LABEL))
    out.vision_runs, out.computed_tokens = int(metrics["vision_runs"]), int(metrics["computed_tokens"])
    out.evicted_nodes = int(metrics["evicted_nodes"])
    model = bench()
    out.distinct_tokens = _distinct(model, images, jobs)
    _compare(model, images, jobs, texts)
    _see_that_pictures_expire(redis, len(images))
    grown = max(out.held["MLX"][PARTS // 2 :]) - max(out.held["MLX"][: PARTS // 2])
    if out.evicted_nodes and grown > 1_000_000:
        raise RuntimeError(f"MLX holds {grown} bytes more in the second half: {out.held['MLX']}")
    return out


def _answer(ticket: Ticket, redis: Redis) -> str:
    result = ticket.result(timeout_s=3_000)
    raw = Redis(connection_pool=redis.connection_pool)
    count = RqResult.count(QueuedJob(ticket.id, connection=raw, serializer=JobSerializer))
    if count != 1:
        raise RuntimeError(f"job {ticket.id} has {count} results")
    return result.text or ""


def _held(redis: Redis, pid: int) -> dict[str, int]:
    """Wait for metrics that count what has ended, and return what is held."""
    before = redis.hget(keys.metrics(LABEL), "updated_at")
    while redis.hget(keys.metrics(LABEL), "updated_at") == before:
        time.sleep(0.05)
    family = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,rss="], capture_output=True, text=True, check=True).stdout
    resident = {int(p): (int(parent), int(kib) << 10) for p, parent, kib in map(str.split, family.splitlines())}
    return {
        "worker": resident[pid][1],
        "reader": max(size for parent, size in resident.values() if parent == pid),
        "MLX": int(redis.hget(keys.metrics(LABEL), "active_bytes") or 0),
        "Redis": int(redis.info("memory")["used_memory"]),
    }


def _distinct(model: Bench, images: list[Image.Image], jobs: list[Job]) -> int:
    prefixes: set[bytes] = set()
    for job in jobs:
        tokens = model.prompt(images[job.shown], job.question).tokens
        prefixes |= {tokens[:end].tobytes() for end in range(1, len(tokens) + 1)}
    return len(prefixes)


def _compare(model: Bench, images: list[Image.Image], jobs: list[Job], texts: list[str]) -> None:
    step = max(1, len(jobs) // SAMPLE)
    for job, text in list(zip(jobs, texts, strict=True))[::step]:
        theirs, _ = model.alone(images[job.shown], job.question, max_tokens=ANSWER_TOKENS)
        expected = model.loaded.tokenizer.decode(theirs, skip_special_tokens=True)
        if characters(text) != characters(expected):
            raise RuntimeError(f"{job} got {text!r}, of mlx-vlm alone {expected!r}")


def _see_that_pictures_expire(redis: Redis, count: int) -> None:
    pictures = list(redis.scan_iter(keys.image("*")))
    if len(pictures) != count or not all(redis.ttl(key) > 0 for key in pictures) or redis.exists(keys.IMAGES):
        raise RuntimeError(f"of {count} pictures in Redis, not all expire: {pictures}")
