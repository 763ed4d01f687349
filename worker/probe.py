"""Find out at load, by trying, how far a model's prefixes can be reused with the tokens unchanged. Knows no job.

What a model keeps per layer is read from the caches that mlx-lm makes for it, not from a list of names; and whether
the way chosen is right is seen by running a few tokens that way and plainly.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache, make_prompt_cache

from common.log import logger
from worker import attention
from worker.cache import Reuse
from worker.kv import KV, Batch, Path
from worker.solo import Snapshot, Solo

PREFIX, TOKENS = 7, 12  # of the trial prompt
_FAILED = (ValueError, TypeError, AttributeError, KeyError, IndexError, RuntimeError, NotImplementedError)

log = logger("worker.probe")


def reuse(model: Any) -> Reuse:
    """Hook the model and return the best way of reuse that gives plain results; `none` if there is no such way."""
    caches = make_prompt_cache(model)
    plain = all(type(cache) is KVCache for cache in caches)
    hooked = attention.install(model)
    ways: list[Reuse] = ["shared", "copied", "snapshot"] if plain else ["snapshot"]
    if hooked < len(caches):
        ways = [way for way in ways if way != "shared"]
    tokens = np.random.default_rng(0).integers(1, 100, TOKENS).astype(np.int32)
    expected = _run(model, make_prompt_cache(model), tokens)
    for way in ways:
        try:
            off = max(float(mx.abs(got - expected).max()) for got in _trials(model, way, tokens))
        except _FAILED as error:
            log.info("a way of reuse does not work", extra={"way": way, "error": error})
            continue
        if off <= _tolerance(expected):
            return way
        log.info("a way of reuse changes the results", extra={"way": way, "off": off})
    return "none"


def _trials(model: Any, way: Reuse, tokens: np.ndarray[Any, np.dtype[np.int32]]) -> Iterator[mx.array]:
    """Yield the last logits of the trial prompt, computed with a reused prefix in different company."""
    caches = make_prompt_cache(model)
    _run(model, caches, tokens[:PREFIX])
    if way == "snapshot":
        payload: Any = Snapshot(caches)
        batches: list[Any] = [Solo(lambda: make_prompt_cache(model), snapshots=True)]
    else:
        payload = KV([(c.keys[:, :, :PREFIX], c.values[:, :, :PREFIX]) for c in caches])
        exact, fast = (Batch(len(caches), exact=flag) for flag in (True, False))
        batches = [exact, fast] if way == "shared" else [Solo(lambda: make_prompt_cache(model), snapshots=False)]
    for batch in batches:
        yield from _beside_another(model, batch, Path([(payload, PREFIX)]), tokens)


def _beside_another(model: Any, batch: Any, path: Path, tokens: Any) -> Iterator[mx.array]:
    """Run the prompt twice in one batch, once from the prefix and once from nothing, so that the rows differ."""
    rows = [tokens[PREFIX:], tokens]
    batch.open([path, Path()])
    block = np.zeros((2, TOKENS - 1), np.int32)
    counts = [len(row) - 1 for row in rows]
    for line, row, count in zip(block, rows, counts, strict=True):
        line[:count] = row[:count]
    batch.forward(model, block, counts)
    batch.trim(counts)
    last = np.array([[row[-1]] for row in rows], np.int32)
    logits = batch.forward(model, last, [1, 1])
    mx.eval(logits)
    yield from (logits[i : i + 1] for i in range(2))


def _run(model: Any, caches: list[Any], tokens: Any) -> mx.array:
    """Run tokens the way mlx-lm does: all but the last, then the last."""
    model(mx.array(tokens[:-1])[None], cache=caches)
    logits: mx.array = model(mx.array(tokens[-1:])[None], cache=caches)[:, -1]
    mx.eval(logits)
    return logits


def _tolerance(expected: mx.array) -> float:
    """Rounding of the logits' type, with some room; a wrong mask or position is off by orders of magnitude more."""
    unit = {mx.float32: 1e-4, mx.float16: 2e-2, mx.bfloat16: 1e-1}[expected.dtype]
    return unit * max(1.0, float(mx.abs(expected).max()))
