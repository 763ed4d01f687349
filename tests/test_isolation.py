"""What is not finite in one row changes no other row's answer, in every form of attention and at several levels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from common.errors import InternalError
from tests.engines import Bench, alone, bench, fastest, prompt
from tests.models import tiny
from worker.forms import FORMS
from worker.sequence import Failed, Finished, Prompt

FORM_NAMES = [name for name, form in FORMS.items() if form.decodes]
BAD = "b0"


class Broken:
    """A projection of one layer whose outcome for one job is not finite, as long as it is told to be."""

    def __init__(self, inner: Any, row: Callable[[int], int | None], value: float, columns: slice) -> None:
        self.inner, self.row, self.value, self.columns = inner, row, value, columns

    def __call__(self, x: mx.array) -> mx.array:
        out: mx.array = self.inner(x)
        row = self.row(x.shape[1])
        if row is not None:
            out[row, :, self.columns] = self.value
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def levels() -> dict[str, Prompt]:
    """Return jobs under a system prompt and two documents, all long enough for a product of their own."""
    system, prompts = [(7 * i) % 290 for i in range(150)], {}
    for name, step in (("a", 3), ("b", 5)):
        document = [(step * i) % 290 for i in range(140)]
        for number in range(3):
            prompts[f"{name}{number}"] = prompt([*system, *document, 200 + number, *range(number)], 8, [150, 290])
    return prompts


def broken(run: Bench, part: str, value: float, columns: slice, times: int) -> list[int]:
    """Let the second layer's projection give `value` for BAD in decode steps of several rows, and when it is alone.

    Returns a list that counts the steps that were spoiled; a step and its repetition count as one.
    """
    spoiled: list[int] = []
    layer = run.watched.model.model.layers[1].self_attn

    def row(columns: int) -> int | None:
        steps = run.engine.stats().decode_steps
        if columns != 1 or BAD not in run.engine.running:
            return None
        if steps not in spoiled and len(spoiled) < times:
            spoiled.append(steps)
        return run.engine.running.index(BAD) if steps in spoiled else None

    setattr(layer, part, Broken(getattr(layer, part), row, value, columns))
    return spoiled


def ran(form: str, *, chunk_tokens: int = 32) -> Bench:
    crossover = fastest(form if form in FORMS else "merged")
    return bench(tiny(), exact=form == "exact", crossover=crossover, chunk_tokens=chunk_tokens)


def embed_infinity(run: Bench, token: int) -> None:
    """Let a token's embedding be infinite in every call, so that its job fails."""
    embedding = run.watched.model.model.embed_tokens
    weights = np.array(embedding.weight)
    weights[token] = np.inf
    embedding.weight = mx.array(weights)


def answers_are_right(run: Bench, prompts: dict[str, Prompt]) -> None:
    for job_id, job in prompts.items():
        event = run.ended[job_id]
        if job_id != BAD or isinstance(event, Finished):
            assert isinstance(event, Finished), f"{job_id}: {event}"
            assert list(event.tokens) == alone(run.alone, job.tokens, job.max_tokens)[0], job_id


def went_alone(run: Bench, prompts: dict[str, Prompt]) -> set[str]:
    """Run all jobs; return those that the engine tried a second time."""
    again: set[str] = set()
    for job_id, job in prompts.items():
        run.engine.add(job_id, job)
    while run.engine.busy:
        for event in run.engine.step():
            assert isinstance(event, Finished | Failed)
            run.ended[event.id] = event
        again |= {row.id for row in run.engine._intake.line if row.company is not None}
        run.engine.check()
    return again


@pytest.mark.parametrize("value", [mx.nan, mx.inf])
@pytest.mark.parametrize(
    ("part", "columns"),
    [
        pytest.param("q_proj", slice(None), id="query"),
        pytest.param("q_proj", slice(16), id="one head"),
        pytest.param("k_proj", slice(None), id="keys"),
        pytest.param("v_proj", slice(3), id="values"),
        pytest.param("o_proj", slice(1), id="after attention"),
    ],
)
@pytest.mark.parametrize("form", [*FORM_NAMES, "exact"])
def test_one_row_that_is_not_finite_in_one_step_runs_again_and_its_mates_do_not(
    form: str, part: str, columns: slice, value: float
) -> None:
    run, prompts = ran(form), levels()
    spoiled = broken(run, part, value, columns, times=1)
    assert went_alone(run, prompts) == {BAD}
    assert len(spoiled) == 1
    answers_are_right(run, prompts)
    assert isinstance(run.ended[BAD], Finished)


@pytest.mark.parametrize("form", [*FORM_NAMES, "exact"])
def test_a_row_that_is_never_finite_fails_alone_and_its_mates_answer(form: str) -> None:
    run, prompts = ran(form), levels()
    broken(run, "v_proj", mx.nan, slice(None), times=100)
    assert went_alone(run, prompts) == {BAD}
    failed = run.ended[BAD]
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, InternalError)
    answers_are_right(run, prompts)
    assert run.engine.cache.tree.root.pins == 0


@pytest.mark.parametrize("form", [*FORM_NAMES, "exact"])
def test_a_token_that_is_not_finite_in_a_tail_spoils_no_tail_that_prefills_beside_it(form: str) -> None:
    """The others prefill in the same call."""
    run, prompts = ran(form), levels()
    marked = prompts[BAD].tokens.copy()
    marked[-2:] = (295, 4)
    prompts[BAD] = Prompt(marked, prompts[BAD].sampling, prompts[BAD].branches)
    embed_infinity(run, 295)
    assert went_alone(run, prompts) == {BAD}
    assert isinstance(run.ended[BAD], Failed)
    answers_are_right(run, prompts)


@pytest.mark.parametrize("form", [*FORM_NAMES, "exact"])
def test_what_is_not_finite_in_a_last_chunk_of_one_column_spoils_no_tail_that_prefills_beside_it(form: str) -> None:
    """A call of one column is a decode step only in the batch that decodes."""
    shared = [(7 * i) % 290 for i in range(150)]
    prompts = {
        job_id: prompt([*shared, first, 1, 2, 3, last, 4], 8, [150])
        for job_id, first, last in ((BAD, 200, 295), ("b1", 201, 5), ("b2", 202, 5))
    }
    run = ran(form, chunk_tokens=12)
    embed_infinity(run, 295)
    assert went_alone(run, prompts) == {BAD}
    assert run.watched.calls[13:15] == [(3, 4), (3, 1)], "after the segment, five columns"
    assert isinstance(run.ended[BAD], Failed)
    answers_are_right(run, prompts)


def test_a_repeated_step_draws_the_same_random_numbers() -> None:
    sampled = {
        job_id: prompt(job.tokens, 8, job.branches, temperature=0.9, seed=int(job_id[1:]))
        for job_id, job in levels().items()
    }
    undisturbed, disturbed = ran("virtual"), ran("virtual")
    went_alone(undisturbed, sampled)
    assert broken(disturbed, "k_proj", mx.nan, slice(None), times=1) == []
    assert went_alone(disturbed, sampled) == {BAD}
    for job_id in sampled:
        ours, theirs = disturbed.ended[job_id], undisturbed.ended[job_id]
        assert isinstance(ours, Finished)
        assert isinstance(theirs, Finished)
        assert ours.tokens == theirs.tokens
