"""Every form of attention over shared segments, against plain attention over each row's own copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.models import tiny
from worker import attention, hook
from worker.attention import PRODUCT_TOKENS, Layers, Tail
from worker.forms import FORMS, PLAIN, Choose, Division, always

H, N, D = 8, 2, 16
Shared = list[tuple[Layers, list[int]]]
DECODING = [name for name, form in FORMS.items() if form.decodes or name == "alone"]
PREFILLING = ["packed", *(name for name, form in FORMS.items() if form.prefills)]
STEPS = [(name, 1) for name in DECODING] + [(name, 4) for name in PREFILLING]


def rand(*shape: int, seed: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def kv(tokens: int, seed: int) -> list[tuple[mx.array, mx.array]]:
    return [(rand(1, N, tokens, D, seed=seed), rand(1, N, tokens, D, seed=seed + 1))]


def copied(queries: mx.array, keys: mx.array, values: mx.array, shared: Shared, mask: mx.array | None) -> mx.array:
    """Attend row by row to [its segments, its tail], as mlx-lm does."""
    outs = []
    for b in range(queries.shape[0]):
        above = [layers[0] for layers, rows in shared if b in rows]
        k = mx.concatenate([*(k for k, _ in above), keys[b : b + 1]], axis=2)
        v = mx.concatenate([*(v for _, v in above), values[b : b + 1]], axis=2)
        last = keys.shape[2] - queries.shape[2] + mx.arange(queries.shape[2])[:, None]
        own = (mx.arange(keys.shape[2]) <= last)[None, None] if mask is None else mask[b][None]
        sees = mx.concatenate([mx.ones((1, 1, queries.shape[2], k.shape[2] - keys.shape[2]), mx.bool_), own], axis=-1)
        outs.append(mx.fast.scaled_dot_product_attention(queries[b : b + 1], k, v, scale=D**-0.5, mask=sees))
    return mx.concatenate(outs)


CASES: dict[str, list[tuple[int, list[int]]]] = {
    "one prefix for all": [(300, [0, 1, 2, 3, 4])],
    "two cohorts": [(200, [0, 2, 4]), (150, [1, 3])],
    "levels": [(256, [0, 1, 2, 3, 4]), (40, [0, 1]), (130, [2, 3]), (7, [3])],
    "short ones only": [(5, [0]), (9, [1]), (1, [4])],
    "a row with none": [(PRODUCT_TOKENS, [1, 2])],
}


def batch(case: str, length: int) -> tuple[mx.array, mx.array, mx.array, Shared, mx.array | None]:
    shared: Shared = [(kv(p, 10 * i + 50), rows) for i, (p, rows) in enumerate(CASES.get(case, []))]
    q, k, v = rand(5, H, length, D, seed=0), rand(5, N, 12, D, seed=1), rand(5, N, 12, D, seed=2)
    mask = mx.arange(12) <= mx.array([3, 11, 0, 7, 5])[:, None, None, None]
    return q, k, v, shared, mask if length == 1 else None


def attend(choose: Choose, q: mx.array, k: mx.array, v: mx.array, shared: Shared, mask: mx.array | None) -> mx.array:
    division = Division(shared, q.shape[0], choose, q.shape[2])
    return division.attend(q, [Tail(k, v, mask)], 0, scale=D**-0.5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("form", "length"), STEPS)
def test_shared_segments_give_what_copies_give(form: str, length: int, case: str) -> None:
    q, k, v, shared, mask = batch(case, length)
    ours = attend(always(form), q, k, v, shared, mask)
    assert ours.shape == q.shape
    assert float(mx.abs(ours - copied(q, k, v, shared, mask)).max()) < 2e-6


@pytest.mark.parametrize("case", [*CASES, "none"])
@pytest.mark.parametrize(("form", "length"), [step for step in STEPS if step[0] in ("merged", "virtual")])
def test_attention_by_blocks_of_columns_gives_the_same(
    form: str, length: int, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row's first block may be the only one that it sees, and a mask may begin within one."""
    monkeypatch.setattr(attention, "_LEAST_COLUMNS", 5)
    monkeypatch.setattr(attention, "_MOST_SCORES", 1)
    q, k, v, shared, mask = batch(case, length)
    ours = attend(always(form), q, k, v, shared, mask)
    assert float(mx.abs(ours - copied(q, k, v, shared, mask)).max()) < 2e-6


BUCKETS = {"one": [[0, 1, 2, 3, 4]], "two": [[2, 0], [1, 4, 3]], "a row each": [[3], [1], [0], [4], [2]]}


@pytest.mark.parametrize("buckets", BUCKETS)
@pytest.mark.parametrize("case", [*CASES, "none"])
@pytest.mark.parametrize("form", [*DECODING, "mixed"])
def test_tails_in_several_buckets_give_what_they_give_in_one(form: str, case: str, buckets: str) -> None:
    q, k, v, shared, mask = batch(case, 1)
    assert mask is not None
    right = copied(q, k, v, shared, mask)
    names = ["packed", "virtual", "merged"]
    choose: Choose = (lambda rows, _, tokens: names[(rows + tokens) % 3]) if form == "mixed" else always(form)
    tails = []
    for rows in BUCKETS[buckets]:
        columns = 1 + max([3, 11, 0, 7, 5][row] for row in rows)
        pick = mx.array(rows)
        tails.append(Tail(k[pick][:, :, :columns], v[pick][:, :, :columns], mask[pick][..., :columns]))
    division = Division(shared, 5, choose, 1, BUCKETS[buckets])
    assert float(mx.abs(division.attend(q, tails, 0, scale=D**-0.5) - right).max()) < 2e-6


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize(("form", "length"), STEPS)
def test_in_half_precision_no_form_is_further_from_the_truth_than_copies_are(
    form: str, length: int, dtype: mx.Dtype
) -> None:
    q, k, v, shared, mask = batch("levels", length)
    q, k, v = q.astype(dtype), k.astype(dtype), v.astype(dtype)
    segments: Shared = [([(a.astype(dtype), b.astype(dtype)) for a, b in layers], rows) for layers, rows in shared]
    wide: Shared = [
        ([(a.astype(mx.float32), b.astype(mx.float32)) for a, b in layers], rows) for layers, rows in segments
    ]
    truth = copied(q.astype(mx.float32), k.astype(mx.float32), v.astype(mx.float32), wide, mask)

    def error(got: mx.array) -> float:
        return float(mx.sqrt(mx.mean(mx.square(got.astype(mx.float32) - truth))))

    ours = attend(always(form), q, k, v, segments, mask)
    assert ours.dtype == dtype
    assert error(ours) < 1.5 * error(copied(q, k, v, segments, mask))


@pytest.mark.stock_blas
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("form", "length"), [("packed", 1), ("packed", 4), ("alone", 1), ("alone", 4)])
def test_the_packed_form_and_rows_alone_give_the_same_bits(form: str, length: int, case: str) -> None:
    q, k, v, shared, mask = batch(case, length)
    ours = attend(always(form), q, k, v, shared, mask)
    assert mx.array_equal(ours, copied(q, k, v, shared, mask))


@pytest.mark.parametrize("case", CASES)
def test_forms_that_differ_by_segment_share_a_batch(case: str) -> None:
    q, k, v, shared, mask = batch(case, 1)

    def choose(rows: int, new_tokens: int, tokens: int) -> str:
        return ["packed", "virtual", "merged"][(rows + tokens) % 3]

    ours = attend(choose, q, k, v, shared, mask)
    assert float(mx.abs(ours - copied(q, k, v, shared, mask)).max()) < 2e-6


def test_the_segment_of_the_most_work_on_its_path_decides_for_a_row() -> None:
    shared: Shared = [(kv(600, 0), [0, 1, 2, 3]), (kv(700, 2), [0]), (kv(5000, 4), [3])]
    division = Division(shared, 5, lambda rows, new_tokens, tokens: "packed" if rows == 1 else "merged", 1)
    assert [(part.form, part.rows) for part in division.parts] == [
        (FORMS["merged"], (0, 1, 2)),
        (FORMS["packed"], (3,)),
        (PLAIN, (4,)),  # reads none
    ]


PLACES: dict[str, Callable[[mx.array, mx.array, mx.array], list[tuple[mx.array, Any]]]] = {
    "the whole row": lambda q, k, v: [(x, slice(None)) for x in (q, k, v)],
    "a query": lambda q, k, v: [(q, slice(None))],
    "a tail's values": lambda q, k, v: [(v, slice(None))],
    "a tail's keys": lambda q, k, v: [(k, slice(None))],
    "one head": lambda q, k, v: [(q, 1), (v, 0)],
}


def bad_row(bad: float, place: str, form: str, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the other rows' results in company of a row that is not finite and of one that is, at several levels."""
    q, k, v, shared, mask = batch("levels", length)
    good = np.array(attend(always(form), q, k, v, shared, mask))
    for x, heads in PLACES[place](q, k, v):
        x[2, heads] = bad
    out = np.array(attend(always(form), q, k, v, shared, mask))
    assert not np.isfinite(out[2]).all()
    others = [0, 1, 3, 4]
    return out[others], good[others]


ISOLATING = [(name, length) for name, length in STEPS if FORMS[name].isolates]


@pytest.mark.parametrize("bad", [mx.nan, mx.inf, -mx.inf])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("form", "length"), ISOLATING)
def test_what_is_not_finite_stays_in_its_row_in_a_form_that_isolates(
    form: str, length: int, place: str, bad: float
) -> None:
    out, good = bad_row(bad, place, form, length)
    assert np.array_equal(out, good)


@pytest.mark.parametrize("bad", [mx.nan, mx.inf])
@pytest.mark.parametrize("form", [name for name in DECODING if not FORMS[name].isolates])
def test_a_form_that_does_not_isolate_never_gives_a_wrong_number_for_one_that_is_none(form: str, bad: float) -> None:
    """The engine repeats a step whose logits are not finite; what is finite must be right."""
    for place in PLACES:
        out, good = bad_row(bad, place, form, 1)
        finite = np.isfinite(out)
        assert np.allclose(out[finite], good[finite], atol=1e-5)


def test_a_query_without_a_virtual_key_gives_no_number_rather_than_a_wrong_one() -> None:
    q, k, v, shared, mask = batch("one prefix for all", 1)
    for scale in (1e-3, 1e-12, 1e-25, 0.0):
        q[1] = q[1] * scale
        ours = np.array(attend(always("virtual"), q, k, v, shared, mask))[1]
        right = np.array(copied(q, k, v, shared, mask))[1]
        assert not np.isfinite(ours).all() or np.allclose(ours, right, atol=1e-5)


@pytest.mark.parametrize("form", DECODING)
def test_without_a_mask_every_query_sees_the_whole_tail(form: str) -> None:
    q, k, v, shared, _ = batch("two cohorts", 1)
    ours = attend(always(form), q, k, v, shared, None)
    assert float(mx.abs(ours - copied(q, k, v, shared, None)).max()) < 2e-6


def test_the_hook_changes_one_model_and_nothing_in_mlx_lm() -> None:
    hooked, stock = tiny(), tiny()
    before: Any = type(stock.layers[0].self_attn)
    assert hook.install(hooked) == len(hooked.layers)
    assert hook.install(hooked) == len(hooked.layers), "a second time changes nothing"
    assert type(stock.layers[0].self_attn) is before
    tokens = mx.array([[1, 2, 3, 4]])
    assert mx.array_equal(hooked(tokens), stock(tokens))
