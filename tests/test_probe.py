"""The trial at load refuses ways that would change tokens: here with models that break one assumption each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.llama import Attention

from tests.families import build
from tests.models import tiny
from worker import probe
from worker.tails import Tails

CONTEXT = 4096


class Peculiar(Attention):
    """Llama's attention with a say in positions, queries and masks."""

    position: Callable[[Any], Any] = staticmethod(lambda offset: offset)
    temperature: Callable[[Any], Any] = staticmethod(lambda offset: 1.0)
    sees: Callable[[Any], Any] = staticmethod(lambda mask: mask)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        rows, columns, _ = x.shape

        def heads(y: mx.array, count: int | None) -> mx.array:
            return y.reshape(rows, columns, count, -1).transpose(0, 2, 1, 3)

        offset = self.position(cache.offset)
        queries = self.rope(heads(self.q_proj(x), self.n_heads), offset=offset) * self.temperature(cache.offset)
        keys = self.rope(heads(self.k_proj(x), self.n_kv_heads), offset=offset)
        keys, values = cache.update_and_fetch(keys, heads(self.v_proj(x), self.n_kv_heads))
        out = scaled_dot_product_attention(queries, keys, values, cache, scale=self.scale, mask=self.sees(mask))
        return self.o_proj(out.transpose(0, 2, 1, 3).reshape(rows, columns, -1))  # type: ignore[no-any-return]


def peculiar(**behaviour: Callable[[Any], Any]) -> Any:
    model = tiny()
    changed = type("Changed", (Peculiar,), {name: staticmethod(fn) for name, fn in behaviour.items()})
    for layer in model.layers:
        layer.self_attn.__class__ = changed
    return model


def first_row(offset: Any) -> Any:
    return offset[:1] if isinstance(offset, mx.array) else offset


def temperature(offset: Any) -> Any:
    """Grow far from the beginning, as models trained for long contexts do."""
    scale = 1 + mx.log(1 + mx.floor(mx.array(offset) / 2048))
    return scale[:, None, None, None] if scale.ndim else scale


def test_attention_like_llamas_is_shared() -> None:
    assert probe.reuse(peculiar(), CONTEXT) == "shared"


def test_rows_are_tried_with_tails_in_different_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, seen = Tails.begin, list[int]()

    def begin(tails: Tails, lengths: Sequence[int], new_tokens: int) -> None:
        seen.append(len(tails.buckets))
        plain(tails, lengths, new_tokens)

    monkeypatch.setattr(Tails, "begin", begin)
    assert probe.reuse(peculiar(), CONTEXT) == "shared"
    assert set(seen) == {1, 2}


def test_one_position_for_all_rows_is_not_shared() -> None:
    assert probe.reuse(peculiar(position=first_row), CONTEXT) == "copied"


def test_a_position_used_as_a_number_is_not_shared() -> None:
    assert probe.reuse(peculiar(position=int), CONTEXT) == "copied"


def test_a_temperature_by_position_is_shared_if_each_row_has_its_own() -> None:
    assert probe.reuse(peculiar(temperature=temperature), CONTEXT) == "shared"


def test_a_temperature_that_all_rows_share_far_from_the_beginning_is_noticed() -> None:
    model = peculiar(temperature=lambda offset: temperature(mx.max(mx.array(offset))))
    assert probe.reuse(model, CONTEXT) == "copied"
    assert probe.reuse(model, 2048) == "shared", "no prompt comes to where it matters"


def test_nan_in_one_company_is_noticed() -> None:
    def broken(offset: Any) -> Any:
        return mx.where(mx.max(mx.array(offset)) > 2048, mx.nan, 1.0) if isinstance(offset, mx.array) else 1.0

    assert probe.reuse(peculiar(temperature=broken), CONTEXT) == "copied"


def test_scores_passed_as_the_mask_are_not_shared() -> None:
    def additive(mask: Any) -> Any:
        return mask if isinstance(mask, str) else mx.zeros((1, 1, 1, 1))

    assert probe.reuse(peculiar(sees=additive), CONTEXT) == "copied"


def test_attention_to_later_tokens_is_never_reused() -> None:
    assert probe.reuse(peculiar(sees=lambda mask: None), CONTEXT) == "none"


def test_a_model_that_remembers_its_last_call_is_never_reused() -> None:
    calls = [0]

    def count(offset: Any) -> Any:
        calls[0] += 1
        return offset + calls[0]

    assert probe.reuse(peculiar(position=count), CONTEXT) == "none"


def test_a_mask_wider_than_the_window_that_is_kept_is_never_reused() -> None:
    assert probe.reuse(build("plamo3"), CONTEXT) == "none"
    narrower = build("plamo3")
    narrower.model.layers.window_size -= 1
    assert probe.reuse(narrower, CONTEXT) == "snapshot"


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "way"), [("llama", "shared"), ("gemma2", "copied"), ("gemma3_text", "snapshot"), ("phi3small", "none")]
)
def test_half_precision_is_judged_by_its_own_rounding(name: str, way: str, dtype: mx.Dtype) -> None:
    model = build(name)
    model.set_dtype(dtype)
    assert probe.reuse(model, CONTEXT) == way


@pytest.mark.parametrize(("value", "way"), [(-mx.inf, "shared"), (mx.nan, "none")])
def test_tokens_that_a_model_rules_out_are_no_difference_and_nan_is_never_right(value: float, way: str) -> None:
    model = tiny()
    plain = type(model).__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> mx.array:
        logits = plain(self, *args, **kwargs)
        return mx.where(mx.arange(logits.shape[-1]) == 5, value, logits)

    model.__class__ = type("Ruling", (type(model),), {"__call__": call})
    assert probe.reuse(model, CONTEXT) == way
