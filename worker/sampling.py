"""From log-probabilities to the next token of every row: greedy or sampled, each row with random numbers of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

from common.messages import Sampling


@dataclass(slots=True)
class Sampler:
    """One row's way of choosing: its parameters and how many tokens it has drawn."""

    sampling: Sampling
    drawn: int = field(default=0)

    @property
    def filters(self) -> tuple[float, float, int]:
        """What rows must have in common to be filtered together."""
        return self.sampling.top_p, self.sampling.min_p, self.sampling.top_k

    def next_key(self) -> tuple[int, int]:
        """Return the random key of the row's next token; it depends on seed and position alone."""
        digest = hashlib.blake2b(f"{self.sampling.seed}/{self.drawn}".encode(), digest_size=8).digest()
        self.drawn += 1
        return int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:], "big")


def sample(logprobs: mx.array, samplers: Sequence[Sampler]) -> mx.array:
    """Choose one token per row.

    Args:
        logprobs: normalised, [B, V].

    Returns:
        Token ids, [B]. Greedy rows take the first of the largest, as mlx-lm does. Sampled rows are filtered by
        top_p, min_p and top_k in mlx-lm's order and drawn by the Gumbel trick, which equals a categorical draw.
    """
    greedy = mx.argmax(logprobs, axis=-1)
    groups: dict[tuple[float, float, int], list[int]] = {}
    for row, sampler in enumerate(samplers):
        if sampler.sampling.temperature > 0:
            groups.setdefault(sampler.filters, []).append(row)
    for filters, rows in groups.items():
        pick = mx.array(rows)
        greedy[pick] = _draw(_filtered(logprobs[pick], *filters), [samplers[row] for row in rows])
    return greedy


def _filtered(logprobs: mx.array, top_p: float, min_p: float, top_k: int) -> mx.array:
    if top_p < 1.0:
        logprobs = apply_top_p(logprobs, top_p)
    if min_p > 0.0:
        logprobs = apply_min_p(logprobs, min_p)
    if 0 < top_k < logprobs.shape[-1]:
        logprobs = apply_top_k(logprobs, top_k)
    return logprobs


def _draw(logprobs: mx.array, samplers: Sequence[Sampler]) -> mx.array:
    keys = mx.array(np.array([s.next_key() for s in samplers], np.uint32))
    noise = mx.vmap(lambda key: mx.random.gumbel((logprobs.shape[-1],), key=key))(keys)
    temperatures = mx.array([[s.sampling.temperature] for s in samplers])
    return mx.argmax(logprobs.astype(mx.float32) / temperatures + noise, axis=-1)
