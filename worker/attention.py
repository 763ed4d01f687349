"""Attention over shared prefixes and private tails, and its hook into unmodified mlx-lm models. Knows no tree.

Letters, here and in `worker.kv` and `worker.engine`: B rows, H query heads, N key/value heads, G = H / N, L new tokens
per row, S tokens of a tail, P tokens of a shared segment, D head size.

A row attends to its segments (nodes of the tree, in order) and then to its own tail. Two forms compute it from the
same storage:

- `packed`: per set of rows with the same segments, one softmax over [segments, tail 0, tail 1, ...] where a mask lets
  each row see its own tail only. What is masked adds exact zeros, so with a BLAS whose sums do not depend on the
  number of rows the result is bit-identical to the row alone. Costs rows times the sum of all tails.
- `merged`: every segment once for all its rows, every tail once for its row, joined by their log-sum-exp
  (Hydragen, https://arxiv.org/abs/2402.05099). Rounds differently from the row alone; a row's non-finite value stays
  in that row.
"""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

PRODUCT_TOKENS = 128
"""Segments shorter than this are attended in one masked product together: many small products cost more."""

_TWO = mx.array(2.0)
_NAME = "scaled_dot_product_attention"
_HOMES = ("mlx_lm.models.base", "mlx_vlm.models.base")
Layers = Sequence[tuple[mx.array, mx.array]]


@dataclass(frozen=True, slots=True)
class Segment:
    """K and V that several rows share, and who they are.

    Attributes:
        layers: per layer, keys [1, N, P, D] and values [1, N, P, Dv].
        rows: the readers, ascending.
        pick: the same as an array, or None where all rows of the batch read it.
    """

    layers: Layers
    num_tokens: int
    rows: tuple[int, ...]
    pick: mx.array | None


class Plan:
    """Which rows read which segments; made when rows come and go, used by every layer of every step.

    Attributes:
        segments: root side first.
        large: those that get a product of their own.
        small: the others; `sees` [B, 1, 1, P of all small] says which row reads what.
    """

    def __init__(self, shared: Iterable[tuple[Layers, Sequence[int]]], num_rows: int) -> None:
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


class Partial(NamedTuple):
    """Attention over a part of the keys, before normalisation, in float32 and to the base 2.

    out [B, N, G*L, Dv] is the sum of 2^(score - top) * value; top and total [B, N, G*L, 1] are the largest score and
    the sum of 2^(score - top), where a score is log2(e) times the usual one.
    """

    out: mx.array
    top: mx.array
    total: mx.array


def packed(
    queries: mx.array, keys: mx.array, values: mx.array, plan: Plan, layer: int, *, mask: mx.array | None, scale: float
) -> mx.array:
    """Attend in the form that is bit-identical to each row alone.

    Args:
        queries: [B, H, L, D]
        keys, values: the tails, [B, N, S, D]
        mask: boolean [B or 1, 1, L, S] over the tails; None lets every query see the whole tail.
    """
    cohorts: dict[tuple[int, ...], list[int]] = {}
    for row in range(queries.shape[0]):
        cohorts.setdefault(tuple(i for i, s in enumerate(plan.segments) if row in s.rows), []).append(row)
    outs = []
    for path, rows in cohorts.items():
        pick = mx.array(rows)
        own = mask if mask is None or mask.shape[0] == 1 else mask[pick]
        above = [plan.segments[i].layers[layer] for i in path]
        outs.append(_packed_cohort(queries[pick], keys[pick], values[pick], above, own, scale))
    order = [row for rows in cohorts.values() for row in rows]
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return mx.concatenate(outs)[mx.array(inverse)]


def _packed_cohort(
    queries: mx.array, keys: mx.array, values: mx.array, above: Layers, mask: mx.array | None, scale: float
) -> mx.array:
    if not above:
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
    b, h, length, d = queries.shape
    n, s = keys.shape[1], keys.shape[2]
    flat_k = keys.swapaxes(0, 1).reshape(1, n, b * s, d)
    flat_v = values.swapaxes(0, 1).reshape(1, n, b * s, values.shape[-1])
    all_k = mx.concatenate([*(k for k, _ in above), flat_k], axis=2)
    all_v = mx.concatenate([*(v for _, v in above), flat_v], axis=2)
    own = mx.ones((1, 1, length, s), mx.bool_) if mask is None else mask
    own = mx.broadcast_to(own, (b, 1, length, s))[:, 0, :, None, :]
    mine = mx.eye(b, dtype=mx.bool_)[:, None, :, None] & own  # [B, L, B, S]
    shared = mx.ones((b, length, all_k.shape[2] - b * s), mx.bool_)
    sees = mx.concatenate([shared, mine.reshape(b, length, b * s)], axis=-1)[:, None]
    sees = mx.broadcast_to(sees, (b, h // n, *sees.shape[2:])).reshape(1, 1, b * (h // n) * length, -1)
    folded = _fold(queries.reshape(b, n, -1, d))
    out = mx.fast.scaled_dot_product_attention(folded, all_k, all_v, scale=scale, mask=sees)
    return _unfold(out, b).reshape(b, h, length, -1)


def merged(
    queries: mx.array, keys: mx.array, values: mx.array, plan: Plan, layer: int, *, mask: mx.array | None, scale: float
) -> mx.array:
    """Attend to every segment once for all its rows. Arguments as `packed`."""
    b, h, length, d = queries.shape
    n = keys.shape[1]
    grouped = queries.reshape(b, n, -1, d)  # [B, N, G*L, D], L fastest
    own = None if mask is None else mx.tile(mask, (1, 1, h // n, 1))
    whole = _partial(grouped, keys, values, own, scale)
    if plan.sees is not None:
        small = [s.layers[layer] for s in plan.small]
        small_k, small_v = (mx.concatenate(list(x), axis=2) for x in zip(*small, strict=True))
        sees = mx.broadcast_to(plan.sees, (b, 1, grouped.shape[2], plan.sees.shape[-1]))
        whole = _merge(whole, _shared_partial(grouped, small_k, small_v, _fold(sees), scale))
    for segment in plan.large:
        k, v = segment.layers[layer]
        if segment.pick is None:
            whole = _merge(whole, _shared_partial(grouped, k, v, None, scale))
            continue
        part = _shared_partial(grouped[segment.pick], k, v, None, scale)
        joined = _merge(Partial(*(x[segment.pick] for x in whole)), part)
        for target, source in zip(whole, joined, strict=True):
            target[segment.pick] = source
    return (whole.out / whole.total).astype(queries.dtype).reshape(b, h, length, -1)


def _shared_partial(
    queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | None, scale: float
) -> Partial:
    """Attend with all rows' queries [B, N, T, D] to one segment [1, N, P, D] as one product."""
    folded = _partial(_fold(queries), keys, values, mask, scale)
    return Partial(*(_unfold(x, queries.shape[0]) for x in folded))


def _partial(queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | None, scale: float) -> Partial:
    scores = ((queries * (scale * math.log2(math.e))) @ keys.swapaxes(-1, -2)).astype(mx.float32)
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


def _dispatching(stock: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Return the attention function that asks the cache first."""

    def attention(
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        cache: Any,
        scale: float,
        mask: mx.array | None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        attend = getattr(cache, "attend", None)
        if attend is None:
            return stock(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)
        return attend(queries, keys, values, scale=scale, mask=mask, sinks=sinks)  # type: ignore[no-any-return]

    return attention


def _stock() -> list[Callable[..., mx.array]]:
    """Return the attention functions of the libraries that are loaded."""
    return [getattr(sys.modules[home], _NAME) for home in _HOMES if home in sys.modules]


def install(model: Any) -> int:
    """Let the attention layers of this one model ask their cache to attend; return how many layers do.

    The models of mlx-lm and of mlx-vlm import their library's attention function by name and call it inside methods.
    Each module that does gets a subclass of its class whose methods see another function under that name. Nothing in
    the libraries changes, and other models in the process stay as they are. Idempotent.
    """
    hooked = 0
    for _, module in model.named_modules():
        if getattr(type(module), "_radixq_hooked", False):
            hooked += 1
        elif methods := _rebound_methods(type(module)):
            cls = type(module)
            module.__class__ = type(cls.__name__, (cls,), {**methods, "_radixq_hooked": True})
            hooked += 1
    return hooked


def _rebound_methods(cls: type) -> dict[str, types.FunctionType]:
    methods: dict[str, types.FunctionType] = {}
    stock = _stock()
    for owner in cls.__mro__:
        for name, fn in vars(owner).items():
            if name in methods or not isinstance(fn, types.FunctionType):
                continue
            if _NAME in fn.__code__.co_names and fn.__globals__.get(_NAME) in stock:
                scope = {**fn.__globals__, _NAME: _dispatching(fn.__globals__[_NAME])}
                clone = types.FunctionType(fn.__code__, scope, fn.__name__, fn.__defaults__, fn.__closure__)
                clone.__kwdefaults__ = fn.__kwdefaults__
                methods[name] = clone
    return methods
