"""Attention over shared segments and tails, in several forms from one storage. Knows no tree and no model.

Letters, here and in `worker.kv` and `worker.engine`: B rows, H query heads, N key/value heads, G = H / N, L new tokens
per row, T = G * L queries of a row per key/value head, S tokens of a tail, P tokens of a shared segment, D head size.

A row attends to its segments (nodes of the tree, in order) and then to its own tail. What is read:

    segments        system ------------+------ document A ----- rows 0 1
    (stored once)   rows 0 1 2 3       +------ document B ----- rows 2 3
    tails                                                       one per row

The forms, all exact in exact arithmetic; `worker.forms` says when each may be used, and uses it:

- `plain`: each row's tail alone; for rows that read no segment.
- `packed`: rows with the same segments in one softmax over [segments, tail 0, tail 1, ...], where a mask lets each row
  see its own tail only. What is masked adds exact zeros, so with a BLAS whose sums do not depend on the number of rows
  the result is bit-identical to the row alone. Costs rows times the sum of all tails.
- `merged`: every segment once for all its rows, every tail once for its row, joined by their log-sum-exp
  (Hydragen, https://arxiv.org/abs/2402.05099). Rounds differently from the row alone.
- `virtual`: as merged, but the largest segments go through one fused operation that takes what else a row has seen as
  one more token: a key k with scale * (q . k) = its log-sum-exp, which for k = c * q is one division.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import pairwise
from typing import NamedTuple

import mlx.core as mx
import numpy as np

PRODUCT_TOKENS = 128
"""Segments shorter than this are attended in one masked product together: many small products cost more."""
_LEAST_COLUMNS = 64
_MOST_SCORES = 1 << 26 if mx.metal.is_available() else 3 << 19
"""So many scores are computed in one go: on the CPU what its caches hold, elsewhere 256 MB."""

_TWO = mx.array(2.0)
_LOG2_E = math.log2(math.e)
Layers = Sequence[tuple[mx.array, mx.array]]
Shared = tuple[Layers, Sequence[int]]  # a segment and the rows that read it, ascending


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """K and V that several rows share, and who they are.

    Attributes:
        layers: per layer, keys [1, N, P, D] and values [1, N, P, Dv].
        rows: the readers, ascending.
        pick: the same as an array, or None where all rows read it.
    """

    layers: Layers
    num_tokens: int
    rows: tuple[int, ...]
    pick: mx.array | None


class Plan:
    """What the rows that a form computes together read; made when rows come and go, used by every layer of every step.

    Attributes:
        segments: root side first.
        large: those that get a product of their own.
        small: the others.
        sees: which row reads which columns of all small ones side by side, boolean [B, 1, 1, columns]; None without.
        back: int32 [B]: where each row is found when the rows of all `Tail`s are put one after the other; None where
            that is their order already.
    """

    def __init__(self, shared: Iterable[Shared], num_rows: int, back: mx.array | None = None) -> None:
        self.back = back
        self.segments = [
            Segment(layers, layers[0][0].shape[2], tuple(rows), mx.array(list(rows)) if len(rows) < num_rows else None)
            for layers, rows in shared
        ]
        self.large = [s for s in self.segments if s.num_tokens >= PRODUCT_TOKENS]
        self.small = [s for s in self.segments if s.num_tokens < PRODUCT_TOKENS]
        reads = np.zeros((num_rows, len(self.small)), bool)
        for i, segment in enumerate(self.small):
            reads[list(segment.rows), i] = True
        sees = np.repeat(reads, [s.num_tokens for s in self.small], axis=1)[:, None, None]
        self.sees = mx.array(sees) if self.small else None

    @cached_property
    def fused(self) -> list[Segment]:
        """The segments that the virtual form ends with: those of the most work, at most one per row."""
        chosen: list[Segment] = []
        for segment in sorted(self.large, key=lambda s: len(s.rows) * s.num_tokens, reverse=True):
            if not any(set(segment.rows) & set(other.rows) for other in chosen):
                chosen.append(segment)
        return chosen


class Partial(NamedTuple):
    """Attention over a part of the keys, before normalisation, in float32 and to the base 2.

    out [B, N, T, Dv] is the sum of 2^(score - top) * value; top and total [B, N, T, 1] are the largest score and the
    sum of 2^(score - top), where a score is log2(e) times the usual one.
    """

    out: mx.array
    top: mx.array
    total: mx.array


class Tail(NamedTuple):
    """The tails of some rows, side by side in one buffer, the new tokens included.

    Attributes:
        keys, values: [b, N, S, D] and [b, N, S, Dv], a line per row.
        mask: which columns each row sees, boolean [b, 1, 1, S]; None where all tails are S tokens long. The new tokens
            of a prefill are the last columns of all rows, and see each other as they follow.
        rows: the numbers of the lines' rows, int32 [b], among those that a form computes; None where they are all of
            these, in order.
    """

    keys: mx.array
    values: mx.array
    mask: mx.array | None = None
    rows: mx.array | None = None


# -- the forms -------------------------------------------------------------------------------------------------------


def plain(queries: mx.array, tails: Sequence[Tail], plan: Plan, layer: int, *, scale: float) -> mx.array:
    """Attend to the tails alone, one at a time; the plan must have no segments.

    Args, of all forms:
        queries: [B, H, L, D].
        tails: of all B rows, each row in one of them.
        plan: made for these B rows.
        layer: whose keys and values of the segments to read.

    Returns [B, H, L, Dv].
    """
    outs = []
    for tail in tails:
        theirs = queries if tail.rows is None else queries[tail.rows]
        mask = "causal" if queries.shape[2] > 1 else tail.mask
        outs.append(mx.fast.scaled_dot_product_attention(theirs, tail.keys, tail.values, scale=scale, mask=mask))
    return outs[0] if plan.back is None else mx.concatenate(outs)[plan.back]


def packed(queries: mx.array, tails: Sequence[Tail], plan: Plan, layer: int, *, scale: float) -> mx.array:
    """Attend in one softmax for all rows; every row must read every segment of the plan."""
    b, h, length, d = queries.shape
    n = tails[0].keys.shape[1]
    above = [segment.layers[layer] for segment in plan.segments]
    all_k = mx.concatenate([*(k for k, _ in above), *(_fold(tail.keys) for tail in tails)], axis=2)
    all_v = mx.concatenate([*(v for _, v in above), *(_fold(tail.values) for tail in tails)], axis=2)
    shared = mx.ones((b, length, sum(segment.num_tokens for segment in plan.segments)), mx.bool_)
    sees = mx.concatenate([shared, *(_tail_mask(tail, b, length) for tail in tails)], axis=-1)[:, None]
    sees = mx.broadcast_to(sees, (b, h // n, *sees.shape[2:])).reshape(1, 1, b * (h // n) * length, -1)
    folded = _fold(queries.reshape(b, n, -1, d))
    out = mx.fast.scaled_dot_product_attention(folded, all_k, all_v, scale=scale, mask=sees)
    return _unfold(out, b).reshape(b, h, length, -1)


def merged(queries: mx.array, tails: Sequence[Tail], plan: Plan, layer: int, *, scale: float) -> mx.array:
    """Attend to every segment once for all its rows, and join the parts."""
    grouped, whole = _over_tails(queries, tails, plan, scale)
    whole = _with_segments(whole, grouped, plan, plan.large, layer, scale)
    return (whole.out / whole.total).astype(queries.dtype).reshape(*queries.shape[:3], -1)


def virtual(queries: mx.array, tails: Sequence[Tail], plan: Plan, layer: int, *, scale: float) -> mx.array:
    """Attend as merged, but to the largest segments by one fused operation each. One new token per row.

    A query too small for its virtual key to be a finite number gives NaN, so the step runs again in another form.
    """
    grouped, whole = _over_tails(queries, tails, plan, scale)
    others = [segment for segment in plan.large if segment not in plan.fused]
    whole = _with_segments(whole, grouped, plan, others, layer, scale)
    out, seen = (whole.out / whole.total).astype(queries.dtype), (whole.top + mx.log2(whole.total)) / _LOG2_E
    for segment in plan.fused:
        pick = slice(None) if segment.pick is None else segment.pick
        out[pick] = _with_virtual_tokens(grouped[pick], *segment.layers[layer], out[pick], seen[pick], scale)
    return out.reshape(*queries.shape[:3], -1)


def _with_virtual_tokens(
    queries: mx.array, keys: mx.array, values: mx.array, out: mx.array, seen: mx.array, scale: float
) -> mx.array:
    """Attend to one segment and, per query, to one token that stands for what it has seen: [B, N, T, Dv]."""
    folded = _fold(queries)
    exact = folded.astype(mx.float32)
    stretch = _fold(seen) / (scale * mx.sum(exact * exact, axis=-1, keepdims=True))
    all_k = mx.concatenate([keys, (exact * stretch).astype(keys.dtype)], axis=2)
    all_v = mx.concatenate([values, _fold(out)], axis=2)
    count = folded.shape[2]
    sees = mx.concatenate([mx.ones((count, keys.shape[2]), mx.bool_), mx.eye(count, dtype=mx.bool_)], axis=1)
    return _unfold(mx.fast.scaled_dot_product_attention(folded, all_k, all_v, scale=scale, mask=sees), len(queries))


def _over_tails(queries: mx.array, tails: Sequence[Tail], plan: Plan, scale: float) -> tuple[mx.array, Partial]:
    """Return the queries as [B, N, T, D], L fastest, and their attention to the tails."""
    b, h, length, d = queries.shape
    n = tails[0].keys.shape[1]
    grouped = queries.reshape(b, n, -1, d)
    order = mx.tile(_follow(length), (h // n, 1)) if length > 1 else None
    parts = [
        _partial(grouped if rows is None else grouped[rows], k, v, mask if order is None else order, scale)
        for k, v, mask, rows in tails
    ]
    if plan.back is None:
        return grouped, parts[0]
    return grouped, Partial(*(mx.concatenate(list(x))[plan.back] for x in zip(*parts, strict=True)))


def _follow(length: int) -> mx.array:
    """Return which new tokens each new token sees, boolean [L, L]."""
    return mx.arange(length) <= mx.arange(length)[:, None]


def _tail_mask(tail: Tail, num_rows: int, length: int) -> mx.array:
    """Return which columns, line after line, each of B rows' queries see: its own ones. Boolean [B, L, b * S]."""
    rows, columns = tail.keys.shape[0], tail.keys.shape[2]
    numbers = mx.arange(rows) if tail.rows is None else tail.rows
    mine = (mx.arange(num_rows)[:, None] == numbers)[:, None, :, None]
    if length > 1:
        sees = mx.concatenate([mx.ones((length, columns - length), mx.bool_), _follow(length)], axis=1)[None, :, None]
    else:
        sees = mx.ones((1, 1, 1, columns), mx.bool_) if tail.mask is None else tail.mask[:, 0, 0][None, None]
    return mx.broadcast_to(mine & sees, (num_rows, length, rows, columns)).reshape(num_rows, length, -1)


def _with_segments(
    whole: Partial, queries: mx.array, plan: Plan, large: Sequence[Segment], layer: int, scale: float
) -> Partial:
    """Join attention to all small segments of a plan, and to these large ones."""
    if plan.sees is not None:
        small = [s.layers[layer] for s in plan.small]
        small_k, small_v = (mx.concatenate(list(x), axis=2) for x in zip(*small, strict=True))
        sees = mx.broadcast_to(plan.sees, (len(queries), 1, queries.shape[2], plan.sees.shape[-1]))
        whole = _merge(whole, _shared_partial(queries, small_k, small_v, _fold(sees), scale))
    for segment in large:
        k, v = segment.layers[layer]
        if segment.pick is None:
            whole = _merge(whole, _shared_partial(queries, k, v, None, scale))
            continue
        part = _shared_partial(queries[segment.pick], k, v, None, scale)
        joined = _merge(Partial(*(x[segment.pick] for x in whole)), part)
        for target, source in zip(whole, joined, strict=True):
            target[segment.pick] = source
    return whole


def _shared_partial(
    queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | None, scale: float
) -> Partial:
    """Attend with all rows' queries [B, N, T, D] to one segment [1, N, P, D] as one product."""
    folded = _partial(_fold(queries), keys, values, mask, scale)
    return Partial(*(_unfold(x, queries.shape[0]) for x in folded))


def _partial(queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | None, scale: float) -> Partial:
    """Attend with [B, N, T, D] to keys and values, in blocks of columns; the mask is over the last of them.

    A block's scores are read five times: on the CPU they should not leave its caches between.
    """
    columns = keys.shape[2]
    masked = columns - (0 if mask is None else mask.shape[-1])  # from here on
    size = max(_LEAST_COLUMNS, _MOST_SCORES // math.prod(queries.shape[:3]))
    blocks = []
    for start, stop in pairwise([*range(0, masked, size), *range(masked, columns, size), columns]):
        sees = None if mask is None or start < masked else mask[..., start - masked : stop - masked]
        blocks.append(_block(queries, keys[:, :, start:stop], values[:, :, start:stop], sees, scale))
    return reduce(_merge, blocks)


def _block(queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | None, scale: float) -> Partial:
    if queries.dtype == mx.float32:
        scores = (queries * (scale * _LOG2_E)) @ keys.swapaxes(-1, -2)
    else:  # log2(e) would round the queries; most models' scale is a power of two and does not
        scores = ((queries * scale) @ keys.swapaxes(-1, -2)).astype(mx.float32) * _LOG2_E
    if mask is not None:  # the lowest finite number, not -inf: a query that sees nothing must not make a NaN
        scores = mx.where(mask, scores, mx.finfo(mx.float32).min)
    top = mx.max(scores, axis=-1, keepdims=True)
    weights = _exp2(scores - top)
    out = (weights.astype(values.dtype) @ values).astype(mx.float32)
    return Partial(out, top, mx.sum(weights, axis=-1, keepdims=True))


def _exp2(x: mx.array) -> mx.array:
    """Return 2^x. MLX's power takes less than half as long as its exp on the CPU, where exp dominates attention."""
    return mx.exp(x * math.log(2)) if mx.metal.is_available() else mx.power(_TWO, x)


def _merge(a: Partial, b: Partial) -> Partial:
    top = mx.maximum(a.top, b.top)
    wa, wb = _exp2(a.top - top), _exp2(b.top - top)
    return Partial(a.out * wa + b.out * wb, top, a.total * wa + b.total * wb)


def _fold(x: mx.array) -> mx.array:
    """[B, N, T, D] to [1, N, B*T, D]: all rows' queries as one product."""
    b, n, t, d = x.shape
    return x.swapaxes(0, 1).reshape(1, n, b * t, d)


def _unfold(x: mx.array, rows: int) -> mx.array:
    """[1, N, B*T, D] back to [B, N, T, D]."""
    _, n, bt, d = x.shape
    return x.reshape(n, rows, bt // rows, d).swapaxes(0, 1)
