"""The form of attention follows what was measured on this device, and a file that cannot be trusted is not used."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from tests.engines import bench, prompt
from tests.models import tiny
from worker import hook
from worker.crossover import COPIES, UNMEASURED, Crossover, HeadShape, Point, at_load, head_shape, measure
from worker.forms import FORMS, exactly
from worker.sequence import Finished

SMALL = HeadShape(4, 2, 16, 16, "float32")
DEVICE = "some device, mlx 1, some BLAS"


def point(rows: int, tokens: int, new_tokens: int = 1, **ms: float) -> Point:
    return Point(rows, new_tokens, tokens, ms)


def table(**by_size: str) -> Crossover:
    """Make a table from `r4t64="packed"`: at 4 rows and 64 tokens packed was twice as fast as anything else."""
    points = []
    for size, name in by_size.items():
        rows, tokens = map(int, size.removeprefix("r").split("t"))
        points.append(Point(rows, 1, tokens, dict.fromkeys(("merged", "packed", "virtual"), 2.0) | {name: 1.0}))
    return Crossover(tuple(points))


def test_the_fastest_form_of_the_nearest_point_is_chosen() -> None:
    chosen = table(r1t64="packed", r16t64="merged", r1t2048="merged", r16t2048="virtual")
    assert chosen(1, 1, 10) == "packed"
    assert chosen(3, 1, 200) == "packed"
    assert chosen(5, 1, 200) == "merged"
    assert chosen(32, 1, 8192) == "virtual"
    assert chosen(2, 1, 100_000) == "merged"


def test_a_form_must_be_clearly_faster_than_the_merged_one() -> None:
    assert point(1, 64, merged=1.0, packed=0.9).best == "merged"
    assert point(1, 64, merged=1.0, packed=0.8).best == "packed"


def test_copies_are_never_chosen_but_reported_where_they_would_be_faster() -> None:
    slow = Crossover((point(1, 64, merged=1.0, copies=0.5), point(8, 64, merged=1.0, copies=3.0)))
    assert slow(1, 1, 64) == "merged"
    assert slow.words == "merged; a copy per row would be faster for 1 row x 64 tokens"


def test_prefill_and_decode_have_forms_of_their_own() -> None:
    both = Crossover((point(1, 64, merged=1.0, packed=2.0), point(1, 64, new_tokens=64, merged=2.0, alone=1.0)))
    assert both(4, 1, 64) == "merged"
    assert both(4, 100, 64) == "alone"
    assert both.words == "merged; alone where prompts are read"


def test_where_no_form_could_be_measured_the_merged_form_serves_too() -> None:
    off = Crossover((point(1, 64, copies=1.0), point(4, 64, packed=1.0)))
    assert (off(1, 1, 64), off(4, 1, 64)) == ("merged", "packed")
    assert off.words == "packed from 4 rows x 64 tokens, else merged"


def test_where_nothing_was_measured_the_merged_form_serves() -> None:
    assert UNMEASURED(8, 1, 1000) == UNMEASURED(1, 512, 1000) == "merged"
    assert UNMEASURED.words == "merged"


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"r1t64": "merged", "r4t64": "merged"}, "merged"),
        ({"r1t64": "packed", "r4t64": "merged", "r4t512": "merged"}, "merged from 4 rows x 64 tokens, else packed"),
        ({"r1t64": "packed", "r4t64": "packed", "r1t512": "packed", "r4t512": "virtual"},
         "virtual from 4 rows x 512 tokens, else packed"),
        ({"r1t64": "virtual", "r1t512": "packed", "r4t512": "merged"},
         "merged, but virtual for 1 row x 64 tokens, packed for 1 row x 512 tokens"),
    ],
)  # fmt: skip
def test_the_words_in_the_metrics_say_what_is_chosen_where(chosen: dict[str, str], words: str) -> None:
    assert table(**chosen).words == words


def test_exact_results_bypass_what_was_measured() -> None:
    assert [exactly(8, new, 500) for new in (1, 2, 512)] == ["packed", "alone", "alone"]
    run = bench(exact=True, crossover=table(r1t64="virtual"))
    assert run.engine.stats().attention_form == "packed"


def test_the_engine_attends_as_was_measured_and_says_so() -> None:
    packed, both = table(r1t64="packed"), {"a": prompt(range(60), 4), "b": prompt([*range(50), 9, 9], 4)}
    run = bench(crossover=packed)
    for job_id, job in both.items():
        run.engine.add(job_id, job)
    while len(run.engine.running) < 2:
        run.engine.step()
    assert [part.form for part in run.engine._running.batch.division.parts] == [FORMS["packed"]]
    assert run.engine.stats().attention_form == packed.words == "packed"
    assert isinstance(run.run({})["a"], Finished)


# -- measured here; what comes out is not judged -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_form_is_measured_on_this_machine(dtype: str) -> None:
    found = measure(HeadShape(4, 2, 16, 16, dtype), budget_s=math.inf)
    decode = [p for p in found.points if p.new_tokens == 1]
    prefill = [p for p in found.points if p.new_tokens > 1]
    assert {frozenset(p.ms) for p in decode if p.tokens > 64} == {frozenset({COPIES, "merged", "packed", "virtual"})}
    assert {frozenset(p.ms) for p in decode if p.tokens == 64} == {frozenset({COPIES, "merged", "packed"})}
    assert {frozenset(p.ms) for p in prefill} == {frozenset({COPIES, "merged", "alone"})}
    assert all(0 < ms < math.inf for p in found.points for ms in p.ms.values())
    assert found(8, 1, 1000) in FORMS


def test_a_budget_that_is_spent_ends_the_measuring_with_a_point_of_each_kind() -> None:
    kinds = [(point.new_tokens > 1, point.tokens > 0) for point in measure(SMALL, budget_s=0.0).points]
    assert kinds == [(False, True), (True, False), (True, True)]


def test_measuring_leaves_the_random_state_alone() -> None:
    mx.random.seed(3)
    expected = mx.random.uniform().item()
    mx.random.seed(3)
    measure(SMALL, budget_s=0.0)
    assert mx.random.uniform().item() == expected


def test_a_form_that_gives_something_else_than_copies_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = FORMS["packed"]
    wrong = replace(right, attend=lambda *arrays, **options: right.attend(*arrays, **options) + 1)
    monkeypatch.setitem(FORMS, "packed", wrong)
    found = measure(SMALL, budget_s=0.0)
    assert set(found.points[0].ms) == {COPIES, "merged"}


def test_the_shape_of_a_models_heads_is_read_without_computing_anything(held_bytes: Callable[[], int]) -> None:
    model = tiny()
    hook.install(model)
    before = held_bytes()
    mx.reset_peak_memory()
    assert head_shape(model) == SMALL
    assert mx.get_peak_memory() - before < 300  # the token, but no logits


@pytest.fixture
def _briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure as little as there can be."""
    monkeypatch.setattr("worker.crossover.BUDGET_S", 0.0)


@pytest.mark.usefixtures("_briefly")
def test_the_table_is_kept_for_the_next_start(tmp_path: Path) -> None:
    model = tiny()
    hook.install(model)
    first = at_load(model, tmp_path, DEVICE)
    assert at_load(model, tmp_path, DEVICE) == first, "a second measurement would have other times"
    model.set_dtype(mx.float16)
    assert at_load(model, tmp_path, DEVICE) != first
    assert len(list(tmp_path.glob("crossover/*.json"))) == 2


def damaged(content: dict[str, Any]) -> dict[str, str]:
    """Return files that must not be trusted, by what is wrong with them."""
    first, *rest = content["points"]

    def changed(**fields: Any) -> str:
        return json.dumps({**content, "points": [{**first, **fields}, *rest]})

    return {
        "empty": "",
        "cut off": json.dumps(content)[:-20],
        "a list": "[1, 2]",
        "no points": json.dumps({**content, "points": []}),
        "of another device": json.dumps({**content, "device": "another"}),
        "of another shape": json.dumps({**content, "shape": {**content["shape"], "heads": 5}}),
        "a time that is text": changed(ms={"merged": "fast"}),
        "a time below zero": changed(ms={"merged": -1.0}),
        "a time without end": changed(ms={"merged": math.inf}),
        "no time of the merged form": changed(ms={"packed": 1.0}),
        "no rows": changed(rows=0),
        "endless rows": changed(rows=math.inf),
        "times as a list": changed(ms=[1.0]),
    }


@pytest.mark.usefixtures("_briefly")
def test_a_damaged_or_foreign_file_is_measured_anew_and_replaced(tmp_path: Path) -> None:
    model = tiny()
    hook.install(model)
    found = at_load(model, tmp_path, DEVICE)
    (path,) = tmp_path.glob("crossover/*.json")
    for wrong, text in damaged(json.loads(path.read_text())).items():
        path.write_text(text)
        before, found = found, at_load(model, tmp_path, DEVICE)
        assert found.points, wrong
        assert found != before, f"{wrong}: other times"
        assert at_load(model, tmp_path, DEVICE) == found, wrong
    assert [file.name for file in path.parent.iterdir()] == [path.name], "nothing else is left behind"


@pytest.mark.usefixtures("_briefly")
def test_a_home_that_cannot_be_written_costs_the_file_and_nothing_else(tmp_path: Path) -> None:
    model = tiny()
    hook.install(model)
    (tmp_path / "crossover").write_text("a file where the directory would be")
    assert at_load(model, tmp_path, DEVICE).points
