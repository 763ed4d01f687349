"""Find out at load, by trying, how far a model's prefixes can be reused with the tokens unchanged. Knows no job.

What a model keeps per layer is read from the caches that mlx-lm makes for it, not from a list of names; and whether
the way chosen is right is seen by running a few tokens that way and plainly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from common.log import logger
from worker import hook
from worker.forms import MERGED, exactly
from worker.kv import KV, Batch, Path
from worker.sequence import Tokens
from worker.solo import Snapshot, Solo, leaves

if TYPE_CHECKING:
    from worker.cache import Reuse

PREFIX, TOKENS = 7, 12
_PROMPT: Tokens = np.random.default_rng(0).integers(1, 100, TOKENS).astype(np.int32)
_FAILED = (ValueError, TypeError, AttributeError, KeyError, IndexError, RuntimeError, NotImplementedError)

log = logger("worker.probe")


def reuse(model: Any, context_length: int) -> Reuse:
    """Hook the model and return the best way of reuse that gives plain results; `none` if there is no such way."""
    if not _can_be_cut(model):
        log.info("the results of this model depend on how a prompt is cut")
        return "none"
    for way in _candidates(model):
        try:
            offs = [off(got, expected) for got, expected in _trials(model, way, max(0, context_length - 2 * TOKENS))]
        except _FAILED as error:
            log.info("a way of reuse does not work", extra={"way": way, "error": error})
            continue
        if all(off <= 1 for off in offs):  # not max(): it may pass over a NaN
            return way
        log.info("a way of reuse changes the results", extra={"way": way, "off": offs})
    return "none"


def _can_be_cut(model: Any) -> bool:
    """Return whether each token depends on those before it alone, and on no more of them than its caches keep.

    Elsewhere mlx-lm's own results change with the size of its prefill steps, so reuse would change them too. A trial
    cannot show it: it would have to be longer than the window.
    """
    caches, too_wide = make_prompt_cache(model), False

    def watch(cache: RotatingKVCache) -> None:
        plain = cache.make_mask

        def make_mask(n: int, window_size: int | None = None, **options: Any) -> Any:
            nonlocal too_wide
            too_wide |= (window_size or 0) > cache.max_size
            return plain(n, window_size=window_size, **options)

        cache.make_mask = make_mask  # type: ignore[assignment, method-assign]

    for cache in leaves(caches):
        if isinstance(cache, RotatingKVCache):
            watch(cache)
    seen = model(mx.array(_PROMPT)[None], cache=caches)[:, :PREFIX]
    another = np.concatenate([_PROMPT[:PREFIX], _PROMPT[PREFIX:] + 1])
    same = model(mx.array(another)[None], cache=make_prompt_cache(model))[:, :PREFIX]
    return not too_wide and off(same, seen) < 0.1


def _candidates(model: Any) -> list[Reuse]:
    """Return the ways that the model's caches and attention allow, best first."""
    caches = make_prompt_cache(model)
    if any(type(cache) is not KVCache for cache in caches):
        return ["snapshot"]
    hooked = hook.install(model) >= min(len(model.layers), len(caches))
    return ["shared", "copied", "snapshot"] if hooked else ["copied", "snapshot"]


def _trials(model: Any, way: Reuse, far: int) -> Iterator[tuple[mx.array, mx.array]]:
    """Yield the last logits of the trial prompt, computed with a reused prefix in different company, and plainly.

    Rows that share attention also run with the prefix at position `far`: what depends on the position, such as a
    temperature, must follow each row's own.
    """
    plain = _run(model, make_prompt_cache(model), _PROMPT)
    for position in (0, far) if way == "shared" else (0,):
        expected, prefix = plain, _caches_at(model, position)
        if position:
            expected = _run(model, _caches_at(model, position), _PROMPT)
        _run(model, prefix, _PROMPT[:PREFIX])
        path = Path([(_payload(prefix, way), PREFIX)])
        path.num_tokens += position
        for make in _batches(model, way):
            yield from zip(_beside_another(model, make, path), (expected, plain), strict=True)


class _Shifted:
    """A cache whose tokens lie at `position` and after, with nothing before them."""

    def __init__(self, cache: Any, position: int) -> None:
        self._cache, self._position = cache, position

    @property
    def offset(self) -> int:
        return self._position + int(self._cache.offset)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def _caches_at(model: Any, position: int) -> list[Any]:
    caches = make_prompt_cache(model)
    return [_Shifted(cache, position) for cache in caches] if position else caches


def _payload(caches: list[Any], way: Reuse) -> KV | Snapshot:
    if way == "snapshot":
        return Snapshot(caches)
    return KV([(c.keys[:, :, :PREFIX], c.values[:, :, :PREFIX]) for c in caches])


def _batches(model: Any, way: Reuse) -> list[Callable[[], Any]]:
    """Return what makes batches of the kinds to try."""

    def make_cache() -> list[Any]:
        return make_prompt_cache(model)

    if way == "shared":
        return [partial(Batch, len(make_cache()), choose) for choose in (exactly, MERGED)]
    return [partial(Solo, make_cache, snapshots=way == "snapshot")]


def _beside_another(model: Any, make: Callable[[], Any], path: Path) -> list[mx.array]:
    """Run the prompt twice in one batch, once from the prefix and once from nothing, so that the rows differ.

    As in the engine they prefill together and then join others, where their tails lie in different buffers.
    """
    rows = [_PROMPT[PREFIX:], _PROMPT]
    prefill, batch = make(), make()
    prefill.open([path, Path()])
    block = np.zeros((2, TOKENS - 1), np.int32)
    counts = [len(row) - 1 for row in rows]
    for line, row, count in zip(block, rows, counts, strict=True):
        line[:count] = row[:count]
    prefill.forward(model, block, counts)
    prefill.trim(counts)
    batch.join(prefill)
    logits = batch.forward(model, np.array([[row[-1]] for row in rows], np.int32), [1, 1])
    mx.eval(logits)
    return [logits[:1], logits[1:]]


def _run(model: Any, caches: list[Any], tokens: Tokens) -> mx.array:
    """Run tokens the way mlx-lm does: all but the last, then the last."""
    model(mx.array(tokens[:-1])[None], cache=caches)
    logits: mx.array = model(mx.array(tokens[-1:])[None], cache=caches)[:, -1]
    mx.eval(logits)
    return logits


def off(got: mx.array, expected: mx.array) -> float:
    """Return how far logits are off, in units of what rounding may do; NaN if one is not finite that should be.

    Measured as root mean squares over the logits' spread. In bfloat16 the rounding of thirty layers comes to 0.06, an
    eighth of that in float16; a prefix that is not seen, or seen at other positions, to more than 0.5.
    """
    unit = {mx.float32: 1e-3, mx.float16: 2e-2, mx.bfloat16: 0.15}[expected.dtype]
    usable = mx.isfinite(expected) | (got != expected)  # some models rule tokens out with an infinity
    got, expected = (mx.where(usable, x, 0).astype(mx.float32) for x in (got, expected))
    return float(mx.sqrt(mx.mean(mx.square(got - expected))) / mx.std(expected) / unit)
