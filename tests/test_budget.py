"""The bounds of the cache: a planned queue at the budget that it needs, and buffers that are counted as they are."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from common.messages import Sampling
from tests.engines import bench
from tests.models import tiny
from worker.group import Chosen, Plan, Waiting
from worker.runner import SPARE_PROMPTS
from worker.sequence import Finished, Prompt

# KV weighs far more than anything that is computed on the way: 8 KiB per token
HEAVY: dict[str, Any] = {
    "num_hidden_layers": 8, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 32,
}  # fmt: skip
TOKEN_BYTES = 2 * 8 * 4 * 32 * 4


@dataclass
class Ran:
    """What a run came to, in parts of what there was: computed of distinct tokens, bytes of the budget, rows of B."""

    computed: float
    counted: float
    allocated: float
    rows: float
    ended: dict[str, Finished] = field(default_factory=dict)


def tree(sizes: Sequence[tuple[int, int | tuple[int, int]]], seed: int) -> list[np.ndarray]:
    """Return the prompts of a tree, shuffled; per level: children of each node, and their tokens (or a range)."""
    rng = np.random.default_rng(seed)

    def piece(size: int | tuple[int, int]) -> np.ndarray:
        return rng.integers(0, 290, size if isinstance(size, int) else rng.integers(*size)).astype(np.int32)

    texts: dict[tuple[int, ...], np.ndarray] = {(): np.empty(0, np.int32)}
    for level in range(1, len(sizes) + 1):
        for path in product(*(range(count) for count, _ in sizes[:level])):
            texts[path] = np.concatenate([texts[path[:-1]], piece(sizes[level - 1][1])])
    prompts = [text for path, text in texts.items() if len(path) == len(sizes)]
    random.Random(seed).shuffle(prompts)
    return prompts


def planned(prompts: list[np.ndarray]) -> list[Chosen]:
    plan = Plan()
    plan.add(Waiting(str(number), tokens) for number, tokens in enumerate(prompts))
    return plan.next(len(prompts))


def distinct(prompts: Sequence[np.ndarray]) -> int:
    """Count the nodes of an uncompressed trie."""
    plan = Plan()
    plan.add(Waiting(str(number), tokens) for number, tokens in enumerate(prompts))
    return plan.num_bytes // 4


def run_at_its_budget(prompts: list[np.ndarray], answers: Callable[[int], int], rows: int) -> Ran:
    """Run prompts as planned at the largest union of paths of `rows` consecutive ones, and their answers."""
    order = planned(prompts)
    windows = [order[at : at + rows] for at in range(max(1, len(order) - rows + 1))]
    budget = TOKEN_BYTES * max(
        distinct([job.tokens for job in window]) + sum(answers(int(job.id)) for job in window) for window in windows
    )
    run = bench(tiny(**HEAVY), alone=tiny(**HEAVY), max_rows=rows, chunk_tokens=64, kv_bytes=budget)
    run.watched.engine = None  # keep no logits
    engine, todo = run.engine, list(order)
    assert engine._loaded.kv_bytes_per_token == TOKEN_BYTES
    seen, base = 0, mx.get_active_memory()
    mx.reset_peak_memory()
    ended: dict[str, Finished] = {}
    while todo or engine.busy:
        while todo and len(order) - len(todo) - len(ended) < rows + SPARE_PROMPTS and not engine.blocked:
            job = todo.pop(0)
            sampling = Sampling(max_tokens=answers(int(job.id)), temperature=0.0)
            engine.add(job.id, Prompt(job.tokens, sampling, job.branches))
        for event in engine.step():
            assert isinstance(event, Finished)
            ended[event.id] = event
        engine.check()
        seen = max(seen, engine.stats().cache_bytes)
    stats = engine.stats()
    return Ran(
        stats.computed_tokens / distinct(prompts),
        seen / budget,
        (mx.get_peak_memory() - base) / budget,
        stats.decoded_tokens / stats.decode_steps / rows,
        ended,
    )


@pytest.fixture
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no clock decide how much is prefilled between two decode steps."""
    monkeypatch.setattr("worker.engine.BURST_S", 1e9)


FOUR_LEVELS = [(4, 64), (2, 32), (4, 128), (4, 16)]


@pytest.mark.usefixtures("_patient", "held_bytes")
@pytest.mark.parametrize(
    ("sizes", "rows", "answer"),
    [
        (FOUR_LEVELS, 16, (16, 17)),
        (FOUR_LEVELS, 8, (16, 17)),
        ([(3, 32), (2, 16), (2, 32), (6, 16)], 12, (32, 33)),  # mostly tails
        ([(1, 512), (48, (4, 24))], 16, (8, 32)),  # questions and answers of all lengths on one prefix
        ([(2, 64), (3, 48), (3, 96), (5, (4, 40))], 16, (4, 40)),
    ],
    ids=["four levels", "few rows", "mostly tails", "one prefix", "uneven"],
)
def test_a_planned_queue_keeps_its_full_hit_rate_at_the_budget_it_needs(
    sizes: list[tuple[int, int | tuple[int, int]]], rows: int, answer: tuple[int, int]
) -> None:
    lengths = np.random.default_rng(1).integers(*answer, 1000)
    ran = run_at_its_budget(tree(sizes, 0), lambda number: int(lengths[number]), rows)
    print(ran.computed, ran.counted, ran.allocated, ran.rows)
    assert ran.computed == 1.0
    assert ran.counted <= 1.05
    assert ran.allocated <= 1.05
    assert ran.rows >= 0.9
