"""Let the attention layers of one model ask their cache to attend. Knows no batch and no form of attention."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import mlx.core as mx

_NAME = "scaled_dot_product_attention"
_HOMES = ("mlx_lm.models.base", "mlx_vlm.models.base")


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
    """Let a cache with a method `attend` compute the attention of this one model; return how many layers ask it.

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
