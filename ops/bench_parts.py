"""Parts of the engine beside the same part of mlx-lm, in one process: `python ops/bench_parts.py QUICK NAME ...`.

Prints one JSON object a line: a part's name and its figures. Milliseconds are medians of interleaved runs with one
BLAS thread, of CPU time; on Metal of wall time. Knows nothing of the workloads.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from worker import platform

BLAS = platform.prepare()  # before anything imports MLX

import mlx.core as mx  # noqa: E402
from bench_contestants import CHUNK_TOKENS, DEVICE, KV_BYTES  # noqa: E402
from bench_cpu import clock_s  # noqa: E402
from mlx_lm.models.cache import BatchKVCache, KVCache, PromptTrie  # noqa: E402
from mlx_lm.utils import _get_classes  # noqa: E402

from common.messages import Sampling  # noqa: E402
from worker import crossover, hook  # noqa: E402
from worker.attention import Tail  # noqa: E402
from worker.cache import Limits  # noqa: E402
from worker.engine import Engine  # noqa: E402
from worker.forms import FORMS, Division, always  # noqa: E402
from worker.kv import KV, Batch, Path  # noqa: E402
from worker.model import LoadedModel  # noqa: E402
from worker.radix import RadixTree  # noqa: E402
from worker.sequence import Prompt  # noqa: E402

KIND = DEVICE.kind
Figures = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Size:
    """Letters as in `worker.attention`; `tail` is what each row has beyond the prefix."""

    heads: int
    kv_heads: int
    head_dim: int
    rows: int
    prefix: int
    tail: int = 64
    layers: int = 1
    inter: int = 0

    @property
    def words(self) -> str:
        """How a person writes it."""
        return f"{self.heads}q/{self.kv_heads}kv D{self.head_dim} B{self.rows} P{self.prefix}"


def interleaved(work: dict[str, Callable[[], Any]], runs: int) -> dict[str, list[float]]:
    """Run each in turn, `runs` times after one to warm up; return milliseconds of each run, by `clock_s`."""
    spent: dict[str, list[float]] = {name: [] for name in work}
    for number in range(runs + 1):
        for name, call in work.items():
            began = clock_s(KIND)
            mx.eval(call())
            if number:
                spent[name].append((clock_s(KIND) - began) * 1e3)
    return spent


def medians(spent: dict[str, list[float]]) -> dict[str, float]:
    """Return the median of each."""
    return {name: float(np.median(values)) for name, values in spent.items()}


def attend(size: Size, runs: int) -> Figures:
    """Decode attention of one layer: mlx-lm's on copied prefixes, and each of our forms."""
    random = lambda *shape: mx.random.normal(shape)  # noqa: E731
    b, p, s, d = size.rows, size.prefix, size.tail, size.head_dim
    queries = random(b, size.heads, 1, d)
    shared = [random(1, size.kv_heads, p, d) for _ in range(2)]
    tails = [random(b, size.kv_heads, s, d) for _ in range(2)]
    copied = [
        mx.concatenate([mx.broadcast_to(x, (b, *x.shape[1:])), y], axis=2) for x, y in zip(shared, tails, strict=True)
    ]
    mx.eval(queries, shared, tails, copied)
    ours = [name for name, form in FORMS.items() if form.decodes]
    work: dict[str, Callable[[], Any]] = {
        "copied": lambda: mx.fast.scaled_dot_product_attention(queries, *copied, scale=d**-0.5, mask=None)
    }
    for name in ours:
        division = Division([([tuple(shared)], range(b))], b, always(name), 1)
        work[name] = lambda division=division: division.attend(queries, [Tail(*tails)], 0, scale=d**-0.5)
    right = work["copied"]()
    errors = {f"{name}_error": float(mx.max(mx.abs(work[name]() - right))) for name in ours}
    ms = medians(interleaved(work, runs))
    times = {f"{name}_times_faster": ms["copied"] / ms[name] for name in ours}
    began = time.perf_counter()
    measured = crossover.measure(
        crossover.HeadShape(size.heads, size.kv_heads, d, d, "float32"), budget_s=crossover.BUDGET_S
    )
    took = time.perf_counter() - began
    chosen = {"chosen": measured(b, 1, p), "crossover": measured.words, "crossover_s": took}
    return {"size": size.words, "cpu_ms": ms, **times, **errors, **chosen}


def step(size: Size, runs: int) -> Figures:
    """A whole decode step of a model: `BatchKVCache` with copied prefixes, and our batch."""
    model = _model(size)
    hook.install(model)
    prefix = _prefix(size)
    stock = [BatchKVCache.merge([_stock_row(*layer, size.tail)] * size.rows) for layer in prefix]
    batch = Batch(size.layers)
    batch.open([Path([(KV(prefix), size.prefix)])] * size.rows)
    tail = np.ones((size.rows, size.tail), np.int32)
    mx.eval(batch.forward(model, tail, [size.tail] * size.rows))
    batch.evaluate()
    column = np.ones((size.rows, 1), np.int32)
    spent = interleaved(
        {
            "stock": lambda: mx.argmax(model(mx.array(column), cache=stock)[:, -1], axis=-1),
            "radixq": lambda: mx.argmax(batch.forward(model, column, [1] * size.rows), axis=-1),
        },
        runs,
    )
    ms, part = medians(spent), attend(size, runs)
    share = min(1.0, part["cpu_ms"]["copied"] * size.layers / ms["stock"])
    operator = part["merged_times_faster"]  # the form that the batch has been in
    expected = 1 / (1 - share + share / operator)
    faster = ms["stock"] / ms["radixq"]
    return {
        "size": f"{size.words} {size.layers} layers", "cpu_ms": ms, "times_faster": faster,
        "attention_share": share, "operator_times_faster": operator, "expected": expected,
        "of_expected": faster / expected,
    }  # fmt: skip


def join(size: Size, runs: int) -> Figures:
    """One row joins and one leaves a running batch; and what both hold then."""
    prefix = _prefix(size, mx.float16)
    kv = KV(prefix)
    alone = [_stock_row(*layer, size.tail) for layer in prefix]
    mx.eval([cache.state for cache in alone])
    stock = [BatchKVCache.merge([cache] * size.rows) for cache in alone]
    mx.eval([cache.state for cache in stock])
    batch = _filled(kv, size, size.rows)

    def change_stock() -> Any:
        for cache, row in zip(stock, alone, strict=True):
            cache.extend(BatchKVCache.merge([row]))
            mx.eval(cache.state)
        for cache in stock:
            cache.filter(list(range(1, size.rows + 1)))
            mx.eval(cache.state)
        return ()

    def change_ours() -> Any:
        batch.join(newcomer)
        batch.evaluate()
        batch.leave(0)
        batch.evaluate()
        return ()

    newcomer = _filled(kv, size, 1)
    ours = medians(interleaved({"radixq": change_ours}, 9 * runs))
    theirs = medians(interleaved({"stock": change_stock}, max(1, runs // 3)))
    held, needed = batch.nbytes + kv.nbytes, kv.nbytes // size.prefix * (size.prefix + size.rows * size.tail)
    stock_bytes = sum(cache.nbytes for cache in stock)
    return {
        "size": f"{size.words} {size.layers} layers", "cpu_ms": {**theirs, **ours},
        "times_less": theirs["stock"] / ours["radixq"], "stock_bytes": stock_bytes, "radixq_bytes": held,
        "bytes_times_less": stock_bytes / held, "of_prefix_and_tails": held / needed,
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Nothing:
    """A payload that holds nothing: the tree alone is measured."""

    nbytes: int = 1

    def split(self, at: int) -> tuple[_Nothing, _Nothing]:
        """Return two of them."""
        return self, self


def tree(groups: int, per_group: int, prefix: int, own: int) -> Figures:
    """Match and insert of prompts: mlx-lm's `PromptTrie`, and our tree."""
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(0, 150_000, n).astype(np.int32)  # noqa: E731
    prompts = [np.concatenate([above, draw(own)]) for above in map(draw, [prefix] * groups) for _ in range(per_group)]
    lists = [prompt.tolist() for prompt in prompts]
    trie, ours = PromptTrie(), RadixTree[Any]()

    def stock_insert() -> None:
        for prompt in lists:
            trie.add("model", prompt, 1)

    def insert() -> None:
        for prompt in prompts:
            at = ours.match(prompt)
            ours.insert(at, prompt[at.length :], _Nothing())

    micros = {
        "stock_insert": _micros(stock_insert, len(prompts)),
        "stock_match": _micros(lambda: [trie.search("model", prompt) for prompt in lists], len(prompts)),
        "radixq_match_and_insert": _micros(insert, len(prompts)),
        "radixq_match": _micros(lambda: [ours.match(prompt) for prompt in prompts], len(prompts)),
    }
    both = micros["stock_insert"] + micros["stock_match"]
    return {
        "size": f"{len(prompts)} prompts of {prefix + own} tokens", "cpu_us": micros,
        "times_less": both / micros["radixq_match_and_insert"],
    }  # fmt: skip


def cached(size: Size, times: int) -> Figures:
    """Match and assembly of a cached prefix: from tokens to a batch that reads it ("cache slice")."""
    kept, rng = RadixTree[Any](), np.random.default_rng(0)
    tokens = rng.integers(0, 1000, size.prefix).astype(np.int32)
    node = kept.insert(kept.match(tokens), tokens, KV(_prefix(size)))
    assert node.nbytes
    prompts = [np.concatenate([tokens, rng.integers(0, 1000, 32).astype(np.int32)]) for _ in range(16)]
    wall, cpu = [], []
    for number in range(times):
        began, cpu_began = time.perf_counter(), time.thread_time()
        found = kept.match(prompts[number % len(prompts)])
        kept.lock(found.node)
        batch = Batch(size.layers)
        batch.open([Path([(step.payload, len(step.tokens)) for step in found.node.path()])])
        assert batch.division.parts[0].plan.segments
        wall.append((time.perf_counter() - began) * 1e3)
        cpu.append((time.thread_time() - cpu_began) * 1e3)
        kept.release(found.node)
    figures = {
        name: dict(zip(("p50", "p99"), map(float, np.percentile(spent, [50, 99])), strict=True))
        for name, spent in (("wall_ms", wall), ("cpu_ms", cpu))
    }
    return {"size": f"{size.prefix} tokens {size.layers} layers", **figures}


def latency(size: Size, runs: int) -> Figures:
    """Time to the first token of one prompt, and per token after it, uncached and cached; wall clock."""
    engine = _engine(size)
    spent: dict[str, dict[str, list[float]]] = {name: {"first": [], "each": []} for name in ("uncached", "cached")}
    for number in range(runs):
        rng = np.random.default_rng(number)
        tokens = rng.integers(0, 900, size.prefix + 32).astype(np.int32)
        for lists in spent.values():
            tokens[-32:] = rng.integers(0, 900, 32)
            sampling = Sampling(temperature=0.0, max_tokens=9)
            engine.add(f"{number}", Prompt(tokens.copy(), sampling, (size.prefix,)))
            event: Any = None
            while engine.busy:
                event = next(iter(engine.step()), event)
            lists["first"].append(event.prefill_ms)
            lists["each"].append(event.decode_ms / 8)
    first, each = ({name: float(np.median(lists[what])) for name, lists in spent.items()} for what in ("first", "each"))
    return {
        "size": f"{size.prefix}+32 tokens {size.layers} layers", "first_token_ms": first, "per_token_ms": each,
        "times_sooner": first["uncached"] / first["cached"],
    }  # fmt: skip


def _micros(work: Callable[[], Any], count: int) -> float:
    began = time.process_time()
    work()
    return (time.process_time() - began) / count * 1e6


def _model(size: Size) -> Any:
    config = {
        "model_type": "llama", "hidden_size": size.heads * size.head_dim, "num_hidden_layers": size.layers,
        "intermediate_size": size.inter, "num_attention_heads": size.heads, "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim, "rms_norm_eps": 1e-6, "vocab_size": 1000, "max_position_embeddings": 32_768,
        "rope_theta": 10_000.0, "tie_word_embeddings": True,
    }  # fmt: skip
    model_class, args_class = _get_classes(config)
    made = model_class(args_class.from_dict(config))
    mx.eval(made.parameters())
    return made


def _engine(size: Size) -> Engine:
    from bench_models import _tokenizer
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    loaded = LoadedModel(
        model=_model(size), tokenizer=TokenizerWrapper(_tokenizer(1000)), name="random", digest="", dtype="float32",
        num_layers=size.layers, kv_bytes_per_token=size.layers * size.kv_heads * size.head_dim * 8, state_bytes=0,
        context_length=32_768, vocab_size=1000, cache_kind="plain", eos_token_ids=frozenset(), notes=(),
    )  # fmt: skip
    hook.install(loaded.model)
    measured = crossover.measured(loaded.model)
    return Engine(loaded, Limits(32, CHUNK_TOKENS, KV_BYTES), exact=False, crossover=measured)


def _prefix(size: Size, dtype: Any = mx.float32) -> list[tuple[Any, Any]]:
    shape = (1, size.kv_heads, size.prefix, size.head_dim)
    layers = [
        (mx.random.normal(shape).astype(dtype), mx.random.normal(shape).astype(dtype)) for _ in range(size.layers)
    ]
    mx.eval(layers)
    return layers


def _stock_row(keys: Any, values: Any, tail: int) -> KVCache:
    own = mx.zeros((1, keys.shape[1], tail, keys.shape[3]), keys.dtype)
    cache = KVCache()
    cache.update_and_fetch(mx.concatenate([keys, own], axis=2), mx.concatenate([values, own], axis=2))
    return cache


def _filled(kv: KV, size: Size, rows: int) -> Batch:
    """Make a batch of rows under one prefix; their tails hold zeros."""
    new = mx.zeros((rows, size.kv_heads, size.tail, size.head_dim), kv.layers[0][0].dtype)

    def write(_: Any, cache: list[Any]) -> mx.array:
        for layer in cache:
            layer.update_and_fetch(new, new)
        return mx.zeros((rows, 1, 1))

    batch = Batch(size.layers)
    batch.open([Path([(kv, size.prefix)])] * rows)
    batch.forward(write, np.zeros((rows, size.tail), np.int32), [size.tail] * rows)
    batch.evaluate()
    return batch


_WIDE, _SLIM = Size(32, 8, 128, 32, 8192, inter=8192), Size(14, 2, 64, 32, 8192, layers=4, inter=4864)
_TINY = Size(4, 2, 16, 4, 256, tail=8, layers=2, inter=64)
_DEEP = Size(14, 2, 64, 32, 8192, layers=24)


def _shorter(size: Size, prefix: int) -> Size:
    return Size(size.heads, size.kv_heads, size.head_dim, size.rows, prefix, size.tail, size.layers, size.inter)


PARTS: dict[str, Callable[[bool], list[Figures]]] = {
    "attention": lambda quick: [attend(_TINY, 3)] if quick else [attend(_WIDE, 7), attend(_SLIM, 7)],
    "step": lambda quick: [step(_TINY, 3)] if quick else [step(_WIDE, 7), step(_SLIM, 7)],
    "join": lambda quick: [join(_TINY, 3)] if quick else [join(_DEEP, 9), join(_shorter(_DEEP, 512), 9)],
    "tree": lambda quick: [tree(4, 4, 256, 32)] if quick else [tree(64, 16, 2048, 128)],
    "slice": lambda quick: [cached(_TINY, 50)] if quick else [cached(_shorter(_DEEP, 8192), 1000)],
    "latency": lambda quick: (
        [latency(_TINY, 2)] if quick else [latency(Size(14, 2, 64, 1, 8192, layers=2, inter=4864), 3)]
    ),
}


def main() -> None:
    """Measure the parts that are named."""
    quick = sys.argv[1] == "quick"
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for name in sys.argv[2:]:
        for figures in PARTS[name](quick):
            if KIND != "cpu" and "cpu_ms" in figures:
                figures["wall_ms"] = figures.pop("cpu_ms")
            print(json.dumps({"part": name, **figures}), file=answers)
            mx.clear_cache()


if __name__ == "__main__":
    main()
