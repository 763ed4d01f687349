"""The engine on a tiny model when something in it fails: whom it takes, and that nobody else's answer changes."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count
from typing import Any

import mlx.core as mx
import pytest

from tests.engines import Bench, alone, bench, prompt
from worker.row import Answer
from worker.sequence import Failed, Finished, Prompt


class Flaky:
    """A layer of the model, or all of it, that fails when told: raises, or gives NaN for one row."""

    def __init__(self, inner: Any, *, when: Any, error: Exception | None = None, row: int = 0) -> None:
        self.inner, self.when, self.error, self.row = inner, when, error, row
        self.calls = 0

    def __call__(self, x: mx.array, *args: Any, **options: Any) -> mx.array:
        self.calls += 1
        out: mx.array = self.inner(x, *args, **options)
        if not self.when(self.calls, x):
            return out
        if self.error is not None:
            raise self.error
        return mx.where(mx.arange(out.shape[0]).reshape(-1, 1, 1) == self.row, mx.nan, out)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


ALLOCATION = RuntimeError("[metal::malloc] Unable to allocate 123 bytes")


def two_branches(marked: int | None = None) -> dict[str, Prompt]:
    """Return six jobs on each of two prefixes; the first prefix holds the token `marked`."""
    prompts = {}
    for name in "ab":
        base = [1 if name == "a" else 2, *range(10, 90)]
        if name == "a" and marked is not None:
            base[40] = marked
        for i in range(6):
            prompts[f"{name}{i}"] = prompt([*base, 100 + i, *range(5)], 6, [81])
    return prompts


def unchanged(run: Bench, prompts: dict[str, Prompt], job_ids: Iterable[str]) -> None:
    for job_id in job_ids:
        event = run.ended[job_id]
        assert isinstance(event, Finished), f"{job_id}: {event}"
        job = prompts[job_id]
        assert list(event.tokens) == alone(run.alone, job.tokens, job.max_tokens)[0], job_id


def nothing_leaks(run: Bench) -> None:
    assert run.engine.cache.tree.root.pins == 0
    stats = run.engine.stats()
    assert stats.cache_bytes == run.engine.cache.tree.num_tokens * run.engine._loaded.kv_bytes_per_token
    assert stats.pinned_bytes == 0


@pytest.mark.parametrize("error", [ALLOCATION, ValueError("shapes"), None], ids=["memory", "exception", "nan"])
@pytest.mark.parametrize("at", [1, 2, 4, 6, 9, 13])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_failure_in_any_layer_at_any_step_changes_no_answer(layer: int, at: int, error: Exception | None) -> None:
    run = bench(max_rows=5, chunk_tokens=32)
    layers = run.watched.model.model.layers
    layers[layer] = Flaky(layers[layer], when=lambda call, _: call == at, error=error)
    prompts = two_branches()
    run.run(prompts)
    unchanged(run, prompts, prompts)
    nothing_leaks(run)


def test_a_call_that_is_too_large_for_memory_runs_again_by_halves_and_no_answer_changes() -> None:
    run = bench(max_rows=8, chunk_tokens=256)
    largest: list[int] = []

    def too_large(_: int, x: mx.array) -> bool:
        largest.append(x.shape[0])
        return x.shape[0] > 2 and x.shape[1] == 1

    run.watched.model = Flaky(run.watched.model, when=too_large, error=ALLOCATION)
    prompts = two_branches()
    run.run(prompts)
    unchanged(run, prompts, prompts)
    assert sum(n > 2 for n in largest) < len(prompts)
    assert max(map(len, (run.watched.logits[job_id] for job_id in prompts))) > 0
    nothing_leaks(run)


BROKEN = ValueError("injected")


def break_once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, at: int) -> None:
    """Let call number `at` of a function raise."""
    plain, calls = getattr(owner, name), count(1)

    def broken(*args: Any, **options: Any) -> Any:
        if next(calls) == at:
            raise BROKEN
        return plain(*args, **options)

    monkeypatch.setattr(owner, name, broken)


@pytest.mark.parametrize("at", [1, 6])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("worker.engine", "sample"),
        ("worker.row.Answer", "add"),
        ("worker.row.Answer", "finish"),
        ("worker.row.Row", "finished"),
        ("worker.cache.PrefixCache", "keep"),
        ("worker.cache.PrefixCache", "find"),
        ("worker.cache.PrefixCache", "make_room"),
        ("worker.kv.Batch", "join"),
        ("worker.kv.Batch", "open"),
        ("worker.kv.Batch", "tail"),
        ("worker.running.Running", "join"),
        ("worker.kv.KV", "split"),
        ("worker.kv.KV", "finite"),
        ("worker.tokenizer.Detokenizer", "__init__"),
    ],
)
def test_what_breaks_once_changes_no_answer(owner: str, name: str, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run = bench(max_rows=5, chunk_tokens=32)
    prompts = two_branches()
    module, _, cls = owner.rpartition(".")
    target = pytest.importorskip(owner) if name == "sample" else getattr(pytest.importorskip(module), cls)
    break_once(monkeypatch, target, name, at)
    run.run(prompts, seed=2)
    unchanged(run, prompts, prompts)
    nothing_leaks(run)


def test_a_text_that_always_breaks_fails_its_own_job_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Answer.add

    def add(answer: Answer, token: int) -> bool:
        if "bad" in answer._matcher._stops:
            raise BROKEN
        return plain(answer, token)

    monkeypatch.setattr(Answer, "add", add)
    run = bench(max_rows=5)
    prompts = {str(i): prompt([i, *range(20, 40)], 6) for i in range(8)}
    run.run({"bad": prompt([*range(20), 292], 6, stop=("bad",)), **prompts}, seed=1)
    assert isinstance(run.ended["bad"], Failed)
    unchanged(run, prompts, prompts)
    nothing_leaks(run)


def test_an_interrupt_is_never_taken_for_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("worker.engine.sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench().run({"a": prompt(range(20))})


def test_a_prefix_that_always_fails_takes_its_own_jobs_and_no_others() -> None:
    run = bench(max_rows=5, chunk_tokens=32)
    prompts = two_branches(marked=295)
    run.watched.model = Flaky(
        run.watched.model, when=lambda _, x: bool(mx.any(x == 295)), error=ValueError("this token breaks it")
    )
    run.run(prompts, seed=1)
    failed = {job_id for job_id, event in run.ended.items() if isinstance(event, Failed)}
    assert failed == {job_id for job_id in prompts if job_id.startswith("a")}
    unchanged(run, prompts, set(prompts) - failed)
    assert run.engine.stats().poisoned_nodes == 1
    nothing_leaks(run)


def test_a_job_whose_logits_are_never_finite_fails_alone_and_says_so() -> None:
    run = bench(max_rows=5)
    prompts = {str(i): prompt([i, *range(20, 40)], 6) for i in range(4)}
    layers = run.watched.model.model.layers
    layers[1] = Flaky(layers[1], when=lambda *_: "bad" in run.engine.running, row=0)
    run.run({"bad": prompt([*range(20), 292], 6), **prompts})  # first given, so first row of the batch
    failed = run.ended["bad"]
    assert isinstance(failed, Failed)
    assert failed.error.code == "internal"
    assert "not finite" in str(failed.error)
    unchanged(run, prompts, prompts)
    nothing_leaks(run)
