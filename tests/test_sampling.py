"""Choosing tokens: greedy as mlx-lm, filters in mlx-lm's order, random numbers per row."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import make_sampler

from common.messages import Sampling
from worker.sampling import Sampler, sample


def sampler(**sampling: Any) -> Sampler:
    return Sampler(Sampling(**sampling))


def logprobs(rows: int = 4, vocab: int = 50, seed: int = 0) -> mx.array:
    logits = mx.array(np.random.default_rng(seed).standard_normal((rows, vocab)).astype(np.float32) * 3)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def test_greedy_takes_the_first_of_the_largest() -> None:
    row = mx.array([[0.0, 2.0, 2.0, 1.0]])
    assert sample(row, [sampler()]).tolist() == [1]


def test_a_row_draws_the_same_numbers_alone_and_in_any_place_of_a_batch() -> None:
    table = logprobs()
    batch = [sampler(temperature=1.0, seed=i) for i in range(4)]
    alone = [sampler(temperature=1.0, seed=2)]
    together = [np.array(sample(table, batch))[2] for _ in range(5)]
    assert [np.array(sample(table[2:3], alone))[0] for _ in range(5)] == together


def test_another_seed_gives_other_numbers_and_the_same_seed_the_same() -> None:
    table = logprobs(1, 5000)
    draws = [sample(table, [sampler(temperature=1.0, seed=seed)]).item() for seed in (1, 1, 2, 3, 4)]
    assert draws[0] == draws[1]
    assert len(set(draws)) > 2


@pytest.mark.parametrize(
    "filters", [{"top_p": 0.5}, {"min_p": 0.2}, {"top_k": 3}, {"top_p": 0.8, "min_p": 0.05, "top_k": 5}]
)
def test_filters_leave_the_same_tokens_as_mlx_lm_in_the_same_proportions(filters: dict[str, Any]) -> None:
    table = mx.repeat(logprobs(1, 30), 4000, axis=0)
    ours = sample(table, [sampler(temperature=0.7, seed=i, **filters) for i in range(4000)])
    theirs = make_sampler(temp=0.7, **filters)(table)
    a, b = (np.bincount(np.array(x), minlength=30) / 4000 for x in (ours, theirs))
    assert set(np.flatnonzero(a)) == set(np.flatnonzero(b))
    assert np.abs(a - b).max() < 0.04


def test_greedy_rows_beside_sampled_ones_stay_greedy() -> None:
    table = logprobs(3)
    got = np.array(sample(table, [sampler(), sampler(temperature=5.0, seed=1), sampler()]))
    best = np.array(mx.argmax(table, axis=-1))
    assert got[[0, 2]].tolist() == best[[0, 2]].tolist()
