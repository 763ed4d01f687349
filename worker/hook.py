"""Let the attention layers of one mlx-lm model ask their cache to attend. Knows no batch and no form of attention."""

from __future__ import annotations

import types
from typing import Any

import mlx.core as mx
from mlx_lm.models import base

_NAME = "scaled_dot_product_attention"
_STOCK = base.scaled_dot_product_attention


def _dispatch(
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
        return _STOCK(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)
    return attend(queries, keys, values, scale=scale, mask=mask, sinks=sinks)  # type: ignore[no-any-return]


def install(model: Any) -> int:
    """Let a cache with a method `attend` compute the attention of this one model; return how many layers ask it.

    mlx-lm's models import the attention function by name and call it inside methods. Each module that does gets a
    subclass of its class whose methods see `_dispatch` under that name. Nothing in mlx_lm changes, and other models
    in the process stay as they are. Idempotent.
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
    for owner in cls.__mro__:
        for name, fn in vars(owner).items():
            if name in methods or not isinstance(fn, types.FunctionType):
                continue
            if _NAME in fn.__code__.co_names and fn.__globals__.get(_NAME) is _STOCK:
                scope = {**fn.__globals__, _NAME: _dispatch}
                clone = types.FunctionType(fn.__code__, scope, fn.__name__, fn.__defaults__, fn.__closure__)
                clone.__kwdefaults__ = fn.__kwdefaults__
                methods[name] = clone
    return methods
