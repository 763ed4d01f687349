"""The two forms of attention over shared segments, against plain attention over each row's own copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.models import tiny
from worker import attention
from worker.attention import PRODUCT_TOKENS, Plan, merged, packed

H, N, D = 8, 2, 16
Form = Callable[..., mx.array]


def rand(*shape: int, seed: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def kv(tokens: int, seed: int) -> list[tuple[mx.array, mx.array]]:
    return [(rand(1, N, tokens, D, seed=seed), rand(1, N, tokens, D, seed=seed + 1))]


def copied(queries: mx.array, keys: mx.array, values: mx.array, plan: Plan, mask: mx.array | None) -> mx.array:
    """Attend row by row to [its segments, its tail], as mlx-lm does."""
    outs = []
    for b in range(queries.shape[0]):
        above = [s.layers[0] for s in plan.segments if b in s.rows]
        k = mx.concatenate([*(k for k, _ in above), keys[b : b + 1]], axis=2)
        v = mx.concatenate([*(v for _, v in above), values[b : b + 1]], axis=2)
        own = (
            mx.ones((1, 1, queries.shape[2], keys.shape[2]), mx.bool_)
            if mask is None
            else mask[b % mask.shape[0]][None]
        )
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


def batch(case: str, length: int) -> tuple[mx.array, mx.array, mx.array, Plan, mx.array | None]:
    plan = Plan([(kv(p, 10 * i + 50), rows) for i, (p, rows) in enumerate(CASES[case])], 5)
    q, k, v = rand(5, H, length, D, seed=0), rand(5, N, 12, D, seed=1), rand(5, N, 12, D, seed=2)
    last = mx.array([3, 11, 0, 7, 5])[:, None, None, None] if length == 1 else mx.array([8])[:, None, None, None]
    mask = mx.arange(12) <= last + mx.arange(length)[None, None, :, None]
    return q, k, v, plan, mask


@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", [packed, merged])
def test_shared_segments_give_what_copies_give(form: Form, case: str, length: int) -> None:
    q, k, v, plan, mask = batch(case, length)
    ours = form(q, k, v, plan, 0, mask=mask, scale=D**-0.5)
    assert ours.shape == q.shape
    assert float(mx.abs(ours - copied(q, k, v, plan, mask)).max()) < 2e-6


@pytest.mark.stock_blas
@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("case", CASES)
def test_the_packed_form_gives_the_same_bits(case: str, length: int) -> None:
    q, k, v, plan, mask = batch(case, length)
    ours = packed(q, k, v, plan, 0, mask=mask, scale=D**-0.5)
    assert mx.array_equal(ours, copied(q, k, v, plan, mask))


@pytest.mark.parametrize("bad", [mx.nan, mx.inf])
def test_a_value_that_is_not_finite_stays_in_its_row_in_the_merged_form(bad: float) -> None:
    q, k, v, plan, mask = batch("levels", 1)
    good = merged(q, k, v, plan, 0, mask=mask, scale=D**-0.5)
    k[2], v[2], q[2] = bad, bad, bad
    out = np.array(merged(q, k, v, plan, 0, mask=mask, scale=D**-0.5))
    others = [0, 1, 3, 4]
    assert np.array_equal(out[others], np.array(good)[others])
    assert not np.isfinite(out[2]).all()


def test_without_a_mask_every_query_sees_the_whole_tail() -> None:
    q, k, v, plan, _ = batch("two cohorts", 1)
    for form in (packed, merged):
        ours = form(q, k, v, plan, 0, mask=None, scale=D**-0.5)
        assert float(mx.abs(ours - copied(q, k, v, plan, None)).max()) < 2e-6


def test_the_hook_changes_one_model_and_nothing_in_mlx_lm() -> None:
    hooked, stock = tiny(), tiny()
    before: Any = type(stock.layers[0].self_attn)
    assert attention.install(hooked) == len(hooked.layers)
    assert attention.install(hooked) == len(hooked.layers), "a second time changes nothing"
    assert type(stock.layers[0].self_attn) is before
    tokens = mx.array([[1, 2, 3, 4]])
    assert mx.array_equal(hooked(tokens), stock(tokens))
