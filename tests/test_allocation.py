"""Memory that runs out while tails are copied: rows that were not asked for stay right, and the engine goes on."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from common.messages import Sampling
from tests.engines import Bench, alone, bench, examples, prompt
from tests.models import endless
from worker.kv import Batch, Path
from worker.sequence import Event, Finished, Prompt
from worker.tails import Tails

LAYERS = 3
FULL = RuntimeError("[metal::malloc] Unable to allocate 123 bytes")


class Marks:
    """A model that writes every token's own number in every layer, as others do keys and values.

    Attributes:
        seen: per layer, what rows hold, [B, S].
    """

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        rows, columns = tokens.shape
        new = mx.broadcast_to(tokens[:, None, :, None].astype(mx.float32), (rows, 1, columns, 2))
        for layer in cache:
            layer.update_and_fetch(new, new)
        self.seen = [np.array(cache[0]._batch.read(number)[0].keys[:, 0, :, 0]) for number in range(len(cache))]
        return mx.zeros((rows, columns, 1))


def filled(rows: list[list[int]]) -> Batch:
    batch = Batch(LAYERS, prefill_columns=len(rows[0]))
    batch.open([Path()] * len(rows))
    batch.forward(Marks(), np.array(rows, np.int32), [len(row) for row in rows])
    return batch


def failing_at(monkeypatch: pytest.MonkeyPatch, first: int, calls: int = 1) -> None:
    """Let some calls of `mx.eval` from now on find no memory."""
    plain, count = mx.eval, 0

    def evaluate(*arrays: Any) -> None:
        nonlocal count
        count += 1
        if first <= count < first + calls:
            raise FULL
        plain(*arrays)

    monkeypatch.setattr(mx, "eval", evaluate)


@pytest.mark.parametrize("layer", range(1, LAYERS + 1))
def test_rows_go_on_in_every_layer_when_others_could_not_join_in_all_of_them(
    layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, other = filled([[1, 2, 3], [4, 5, 6]]), filled([[*range(10, 19)], [*range(20, 29)]])
    with monkeypatch.context() as patch:
        failing_at(patch, layer)
        with pytest.raises(RuntimeError, match="Unable to allocate"):
            batch.join(other, [40, 40])
    model = Marks()
    for step in range(7, 20):
        batch.forward(model, np.array([[step], [step]], np.int32), [1, 1])
        for keys in model.seen:
            assert keys.tolist() == [[1, 2, 3, *range(7, step + 1)], [4, 5, 6, *range(7, step + 1)]]


def answers(run: Bench, prompts: dict[str, Prompt]) -> None:
    for job_id, job in prompts.items():
        event = run.ended[job_id]
        assert isinstance(event, Finished), f"{job_id}: {event}"
        assert list(event.tokens) == alone(run.alone, job.tokens, job.max_tokens)[0], job_id


def test_a_running_row_whose_tail_could_not_be_shortened_keeps_what_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    run = bench(endless(), alone=endless(), max_rows=4)
    plain, body, failed = Tails.drop_front, [(7 * i) % 290 for i in range(60)], list[int]()

    def once(tails: Tails, row: int, count: int, stop: int) -> None:
        if not failed:
            failed.append(row)
            raise FULL
        plain(tails, row, count, stop)

    monkeypatch.setattr(Tails, "drop_front", once)
    prompts = {"runs": prompt([*body, 5, 6, 7], 60), "shares": prompt([*body, 9, 9, 9], 10)}
    run.engine.add("runs", prompts["runs"])
    run.engine.step()
    run.run({"shares": prompts["shares"]})
    assert failed
    told = run.ended["runs"]
    assert isinstance(told, Finished)
    prompts["follows"] = prompt([*prompts["runs"].tokens.tolist(), *told.tokens[:40], 3, 4], 10)
    run.run({"follows": prompts["follows"]})
    answers(run, prompts)


def decoding() -> tuple[Bench, dict[str, Prompt]]:
    """Return an engine in which six jobs decode."""
    run = bench(endless(), alone=endless(), max_rows=6)
    prompts = {str(i): prompt([i, *range(20, 40 + i)], 20) for i in range(6)}
    for job_id, job in prompts.items():
        run.engine.add(job_id, job)
    while len(run.engine.running) < len(prompts):
        assert not run.engine.step()
    return run, prompts


def test_a_step_without_memory_moves_no_row_while_all_of_them_go(monkeypatch: pytest.MonkeyPatch) -> None:
    run, prompts = decoding()
    with monkeypatch.context() as patch:
        failing_at(patch, 1, calls=100)
        assert not run.engine._guarded(lambda: run.engine._decode(False), run.engine._running.rows)
    run.run({})
    answers(run, prompts)


@pytest.mark.parametrize("what", ["aborted", "failed"])
def test_all_rows_run_again_where_none_can_take_the_place_of_one_that_leaves(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, prompts = decoding()
    first = run.engine.running[0]

    def fails() -> list[Event]:
        raise FULL

    with monkeypatch.context() as patch:
        failing_at(patch, 1, calls=100)
        if what == "aborted":
            run.engine.abort(first)
            del prompts[first]
        else:
            assert not run.engine._guarded(fails, run.engine._running.rows[:1])
    assert run.engine.running == []
    run.run({})
    answers(run, prompts)
    assert run.ended.keys() == prompts.keys()


def test_jobs_that_end_in_a_step_after_which_nothing_can_be_given_up_have_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, prompts = decoding()
    prompts["short"] = prompts.pop("5")
    run.engine.abort("5")
    run.engine.add("short", Prompt(prompts["short"].tokens, Sampling(max_tokens=3)))
    plain, failed = Batch.shrink, list[int]()

    def shrink(batch: Batch) -> None:
        if len(batch) == 5 and not failed:
            failed.append(1)
            raise FULL
        plain(batch)

    monkeypatch.setattr(Batch, "shrink", shrink)
    run.run({})
    assert failed
    del prompts["short"]
    answers(run, prompts)
    assert isinstance(run.ended["short"], Finished)
    stats = run.engine.stats()
    assert stats.completion_tokens == 5 * 20 + 3, "nobody ran twice"
    assert stats.decoded_tokens <= 6 * 20


def test_who_ended_in_a_step_before_no_row_could_leave_any_more_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = bench(endless(), alone=endless(), max_rows=6)
    prompts = {str(i): prompt([i, *range(20, 40)], 3 if i in (2, 5) else 20) for i in range(6)}
    accept, failed = run.engine._accept, list[int]()

    def without_memory(tokens: list[int], finite: list[bool]) -> list[Event]:
        ending = any(len(row.generated) + 1 == row.prompt.max_tokens for row in run.engine._running.rows)
        if failed or not ending:
            return accept(tokens, finite)
        failed.append(1)
        with monkeypatch.context() as patch:
            failing_at(patch, 1, calls=100)
            return accept(tokens, finite)

    monkeypatch.setattr(run.engine, "_accept", without_memory)
    run.run(prompts)
    assert failed
    answers(run, prompts)
    assert run.engine.stats().completion_tokens == sum(job.max_tokens for job in prompts.values())


def test_what_a_failed_call_had_made_is_gone_before_its_rows_are_given_up(
    monkeypatch: pytest.MonkeyPatch, held_bytes: Callable[[], int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "radixq.worker.engine")  # pytest keeps what is logged, its traceback too
    run, _ = decoding()
    run.engine.abort(run.engine.running[0])
    run.watched.engine = None  # keep no logits
    engine, before, give_up, held = run.engine, held_bytes(), run.engine._give_up, list[int]()
    plain = Batch.evaluate

    def evaluate(batch: Batch) -> None:
        plain(batch)
        if batch is not engine._running.batch:
            raise RuntimeError(*FULL.args)  # one that nobody keeps

    def given_up(*arguments: Any) -> list[Event]:
        held.append(held_bytes() - before)
        return give_up(*arguments)

    monkeypatch.setattr(engine, "_give_up", given_up)
    engine.add("long", prompt([7] * 400, 3))
    with monkeypatch.context() as patch:
        patch.setattr(Batch, "evaluate", evaluate)
        engine._prefill()
    assert held
    assert held[0] < 0.1 * 400 * engine._loaded.kv_bytes_per_token


@pytest.mark.parametrize("seed", range(examples(3)))
def test_jobs_of_all_lengths_in_little_memory_that_runs_out_at_random_end_once_with_their_own_answers(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    roots = [[rng.randrange(290) for _ in range(size)] for size in (0, 20, 150)]
    prompts = dict[str, Prompt]()
    for number in range(14):
        root, own = rng.choice(roots), [rng.randrange(290) for _ in range(rng.randint(1, rng.choice([3, 90])))]
        prompts[str(number)] = prompt([*root, *own], rng.randint(1, 30), [len(root)] if root else [])
    longest = max(len(job.tokens) + job.max_tokens for job in prompts.values())
    run = bench(endless(), alone=endless(), max_rows=rng.choice([3, 8]), kv_bytes=3 * longest * 512)
    plain, failures = mx.eval, 0

    def evaluate(*arrays: Any) -> None:
        nonlocal failures
        if failures < 4 and rng.random() < 0.03:
            failures += 1
            raise FULL
        plain(*arrays)

    with monkeypatch.context() as patch:
        patch.setattr(mx, "eval", evaluate)
        run.run(prompts, seed=seed)
    assert failures
    assert run.ended.keys() == prompts.keys()
    for job_id, event in run.ended.items():
        if isinstance(event, Finished):
            job = prompts[job_id]
            assert list(event.tokens) == alone(run.alone, job.tokens, job.max_tokens)[0], job_id
    assert sum(isinstance(event, Finished) for event in run.ended.values()) >= len(prompts) // 2
    assert run.engine.cache.tree.root.pins == run.engine._running.batch.nbytes == 0
