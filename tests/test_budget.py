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
from tests.effort import lines_run
from tests.engines import alone, bench, examples, prompt
from tests.models import endless, tiny
from tests.test_families import family_bench
from tests.test_families import tree as tree_of_turns
from worker.cache import Limits
from worker.engine import Engine
from worker.group import Chosen, Plan, Waiting
from worker.line import Line
from worker.radix import RadixTree
from worker.row import Answer, Row
from worker.runner import SPARE_PROMPTS
from worker.sampling import Sampler
from worker.sequence import Finished, Prompt
from worker.solo import arrays

# KV weighs far more than anything that is computed on the way: 8 KiB per token
HEAVY: dict[str, Any] = {
    "num_hidden_layers": 8, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 32,
}  # fmt: skip


@dataclass
class Ran:
    """What a run came to, in parts of what there was: computed of distinct tokens, bytes of the budget, rows of B.

    `held`: by the allocator, between steps. `allocated`: its peak, with what a call computes on the way.
    """

    computed: float
    counted: float
    held: float
    allocated: float
    rows: float
    ended: dict[str, Finished] = field(default_factory=dict)


def tree(sizes: Sequence[tuple[int, int | tuple[int, int]]], seed: int) -> list[np.ndarray]:
    """Return the prompts of a tree, shuffled; per level: children of each node, and their tokens (or a range)."""
    rng = np.random.default_rng(seed)

    def piece(child: int, size: int | tuple[int, int]) -> np.ndarray:
        tokens = rng.integers(0, 290, size if isinstance(size, int) else rng.integers(*size)).astype(np.int32)
        tokens[0] = child  # no two share a token by chance
        return tokens

    texts: dict[tuple[int, ...], np.ndarray] = {(): np.empty(0, np.int32)}
    for level in range(1, len(sizes) + 1):
        for path in product(*(range(count) for count, _ in sizes[:level])):
            texts[path] = np.concatenate([texts[path[:-1]], piece(path[-1], sizes[level - 1][1])])
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


def run_at_its_budget(
    prompts: list[np.ndarray],
    answers: Callable[[int], int],
    rows: int,
    *,
    config: dict[str, Any] = HEAVY,
    chunk_tokens: int = 64,
) -> Ran:
    """Run prompts as planned at the largest union of paths of `rows` consecutive ones, and their answers."""
    order = planned(prompts)
    windows = [order[at : at + rows] for at in range(max(1, len(order) - rows + 1))]
    token_bytes = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * 4
    budget = token_bytes * max(
        distinct([job.tokens for job in window]) + sum(answers(int(job.id)) for job in window) for window in windows
    )
    run = bench(tiny(**config), alone=tiny(**config), max_rows=rows, chunk_tokens=chunk_tokens, kv_bytes=budget)
    run.watched.engine = None  # keep no logits
    engine, todo = run.engine, list(order)
    assert engine._loaded.kv_bytes_per_token == token_bytes
    seen, held, base = 0, 0, mx.get_active_memory()
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
        held = max(held, mx.get_active_memory() - base)
    stats = engine.stats()
    return Ran(
        stats.computed_tokens / distinct(prompts),
        seen / budget,
        held / budget,
        (mx.get_peak_memory() - base) / budget,
        stats.decoded_tokens / stats.decode_steps / rows,
        ended,
    )


@pytest.fixture
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no clock decide how much is prefilled between two decode steps."""
    monkeypatch.setattr("worker.engine.BURST_S", 1e9)


FOUR_LEVELS = [(4, 64), (2, 32), (4, 128), (4, 16)]


@pytest.mark.parametrize(("name", "cap"), [("falcon_h1", 80), ("kimi_linear", 60), ("longcat_flash", 80)])
def test_the_cap_counts_the_buffers_of_a_model_that_keeps_more_than_two_per_layer(name: str, cap: int) -> None:
    twin = family_bench(name, chunk_tokens=32).engine
    engine = Engine(twin._loaded, Limits(2, 32, 1 << 30, cap), exact=False, reuse=twin.cache.reuse)
    jobs = tree_of_turns(np.random.default_rng(0), 12)
    for job_id, job in jobs.items():
        engine.add(job_id, job)
    most = num_ended = 0
    while engine.busy:
        num_ended += len(engine.step())
        held = [node.payload.caches for node in engine.cache.tree.nodes() if node.payload]
        most = max(most, len(arrays([held, engine._running.batch._caches])))
    assert num_ended == len(jobs)
    assert cap / 2 < most <= cap
    assert engine.cache.evicted.nodes > 0


@pytest.mark.usefixtures("_patient", "held_bytes")
@pytest.mark.parametrize(
    ("sizes", "rows", "answer", "running"),
    [
        (FOUR_LEVELS, 16, (16, 17), 0.9),
        (FOUR_LEVELS, 8, (16, 17), 0.9),
        ([(3, 32), (2, 16), (2, 32), (6, 16)], 12, (32, 33), 0.9),  # mostly answers
        ([(1, 512), (48, (4, 24))], 16, (8, 32), 0.6),  # hardly anything but tails, of all lengths: buffers are oblong
    ],
    ids=["four levels", "few rows", "mostly answers", "uneven"],
)
def test_a_planned_queue_keeps_its_full_hit_rate_at_the_budget_it_needs(
    sizes: list[tuple[int, int | tuple[int, int]]], rows: int, answer: tuple[int, int], running: float
) -> None:
    lengths = np.random.default_rng(1).integers(*answer, 1000)
    ran = run_at_its_budget(tree(sizes, 0), lambda number: int(lengths[number]), rows)
    assert ran.computed == 1.0
    assert ran.counted <= 1.05
    assert ran.held <= 1.05
    assert ran.allocated <= 1.2  # with what calls compute on the way, which is much beside so little KV
    assert ran.rows >= running


@pytest.mark.usefixtures("_patient")
@pytest.mark.parametrize("seed", range(examples(3)))
def test_between_two_steps_the_allocator_holds_what_is_counted(seed: int, held_bytes: Callable[[], int]) -> None:
    """Whatever rows join, leave and share: what is not computed yet, or is a view, must not keep more alive."""
    rng, draw = random.Random(seed), np.random.default_rng(seed)
    run = bench(
        tiny(**HEAVY), alone=None, max_rows=rng.choice([2, 5, 9]), chunk_tokens=rng.choice([16, 64, 512]),
        kv_bytes=8192 * rng.choice([1500, 4000]),
    )  # fmt: skip
    run.watched.engine = None  # keep no logits
    engine, before = run.engine, held_bytes()
    system = draw.integers(0, 290, 60)
    documents = [np.concatenate([system[: rng.choice([0, 60])], draw.integers(0, 290, 100)]) for _ in range(4)]
    for number in range(16):
        text = np.concatenate([rng.choice(documents), draw.integers(0, 290, rng.randint(1, 60))]).astype(np.int32)
        engine.add(str(number), Prompt(text, Sampling(max_tokens=rng.randint(1, 20))))
    while engine.busy:
        engine.step()
        if rng.random() < 0.1:
            engine.abort(str(rng.randrange(16)))
        if rng.random() < 0.4:
            assert held_bytes() - before <= engine.stats().cache_bytes + 5 * 8192


@pytest.mark.slow
@pytest.mark.usefixtures("_patient")
def test_a_prompt_of_20_000_tokens_with_100_questions_is_computed_once_at_the_budget_it_needs() -> None:
    config = {**HEAVY, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    prompts = tree([(1, 20_000), (100, (20, 60))], 0)
    ran = run_at_its_budget(prompts, lambda _: 8, 10, config=config, chunk_tokens=512)
    assert ran.computed == 1.0
    assert ran.counted <= 1.05
    assert ran.rows >= 0.9
    assert len(ran.ended) == len(prompts)
    for number in (0, 57):
        assert list(ran.ended[str(number)].tokens) == alone(tiny(**config), prompts[number], 8)[0]


def num_buffers(engine: Engine) -> int:
    filling = [engine._fill.batch] if engine._fill else []
    rows = sum(len(list(batch._tails._arrays())) for batch in (engine._running.batch, *filling))
    return rows + sum(2 * len(node.payload.layers) for node in engine.cache.tree.nodes() if node.payload)


@pytest.mark.parametrize(("cap", "buckets"), [(20, 1), (40, 3), (80, 3)])
def test_the_number_of_buffers_stays_under_its_cap_and_all_jobs_finish(cap: int, buckets: int) -> None:
    """Two layers: four buffers for each node, and for each bucket of the rows that run or prefill."""
    run = bench(max_rows=8, chunk_tokens=512, arrays=cap)
    prompts = {str(i): prompt([i % 5, *range(200), 100 + i, *range(1 + 15 * (i % 8))], 5, [201]) for i in range(40)}
    for job_id, job in prompts.items():
        run.engine.add(job_id, job)
    most = most_buckets = 0
    while run.engine.busy:
        run.ended |= {event.id: event for event in run.engine.step() if isinstance(event, Finished)}
        run.engine.check()
        most = max(most, num_buffers(run.engine))
        most_buckets = max(most_buckets, len(run.engine._running.batch._tails.buckets))
    assert set(run.ended) == set(prompts)
    assert most <= cap
    assert most_buckets >= buckets
    assert run.engine.cache.evicted.nodes > 0


class Sized:
    """A payload that is only its size."""

    nbytes = 8

    def split(self, _at: int) -> tuple[Sized, Sized]:
        return self, self


def test_an_eviction_costs_the_same_with_ten_times_as_many_nodes() -> None:
    def cost(num_nodes: int) -> float:
        tree: RadixTree[Sized] = RadixTree()
        for first in range(num_nodes):
            tokens = np.array([first, 1], np.int32)
            node = tree.insert(tree.match(tokens), tokens, Sized())
            tree.lock(node)
            tree.release(node)
        return lines_run(lambda: [tree.evict(8) for _ in range(100)]) / 100

    assert cost(5_000) < 1.5 * cost(500)


def growing(count: int, step: int) -> list[Prompt]:
    """Return prompts each of which extends the one before."""
    tokens = np.random.default_rng(0).integers(0, 290, count * step).astype(np.int32)
    return [Prompt(tokens[: step * (i + 1)], Sampling(max_tokens=2)) for i in range(count)]


def questions(count: int, prefix: int) -> list[Prompt]:
    shots = np.random.default_rng(0).integers(0, 290, prefix).astype(np.int32)
    return [
        Prompt(np.concatenate([shots, np.array([i, 1, 2], np.int32)]), Sampling(max_tokens=2)) for i in range(count)
    ]


@pytest.mark.parametrize("make", [lambda n: growing(n, 20), lambda n: questions(n, 2000)], ids=["growing", "questions"])
def test_what_waits_costs_a_job_the_same_with_four_times_as_many(make: Callable[[int], list[Prompt]]) -> None:
    """From waiting to prefill: each job is added, asked where others leave it, and taken out."""

    def cost(count: int) -> float:
        line = Line()
        rows = [Row(str(i), p, Answer(None, ()), Sampler(p.sampling)) for i, p in enumerate(make(count))]

        def work() -> None:
            for row in rows:
                line.append(row)
            for row in rows:
                line.departure(row, max(0, len(row.prompt.tokens) - 20))
                line.num_sharing(row.prompt.tokens[:-1])
                line.remove(row.id)

        # walking down a prompt visits the nodes on it: that part is the length of the input
        return lines_run(work) / sum(1 + len(row.prompt.tokens) / 20 for row in rows)

    assert cost(800) < 1.5 * cost(200)


def test_rows_that_had_room_to_spare_take_none_that_a_segment_has_been_given_since() -> None:
    """All their tails lie in one buffer. A segment is computed beside them, but its job does not fit and waits."""
    model = endless(**{**HEAVY, "num_hidden_layers": 25, "num_attention_heads": 1, "num_key_value_heads": 1})
    run = bench(model, alone=model, max_rows=9, chunk_tokens=2048, kv_bytes=2900 * 6400)
    engine = run.engine
    assert engine._loaded.kv_bytes_per_token == 6400
    for number in range(8):
        engine.add(str(number), prompt([number, *range(199 if number % 2 else 139)], 60))
    most, roomy = 0, set[bool]()
    for _ in range(5):
        engine.step()
    engine.add("waits", prompt([25, *(i % 290 for i in range(900))], 3, [800]))
    while len(engine.running) == 8:
        engine.step()
        most = max(most, engine.stats().cache_bytes)
        roomy.add(engine._running.batch.roomy)
    assert engine.cache.tree.num_tokens >= 800
    assert most <= 2900 * 6400
    assert roomy == {True, False}
