"""How far the logits of SmolLM2 are from those of a job alone, in each type: `python ops/bench_precision.py QUICK`.

The measure is mlx-lm with one job, uncached: its greedy tokens are fed to everybody, so that each step compares the
same text. Beside it mlx-lm's own batch (left-padded, prefix copied), and each of our forms of attention. Prints one
JSON object a line. Knows nothing of the workloads, and of time only how long it took.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from worker import platform

BLAS = platform.prepare()  # before anything imports MLX

import mlx.core as mx  # noqa: E402
from bench_texts import few_shot_messages  # noqa: E402
from bench_workloads import common_prefix, smollm2_path  # noqa: E402
from mlx_lm.models.cache import BatchKVCache, make_prompt_cache  # noqa: E402

from worker import hook, model  # noqa: E402
from worker.forms import FORMS, Choose, always, exactly  # noqa: E402
from worker.kv import Batch, Path  # noqa: E402

Figures = dict[str, Any]
Logits = np.ndarray[Any, Any]  # [rows, steps, V]


def alone(net: Any, prompts: Sequence[list[int]], steps: int) -> tuple[Logits, list[list[int]]]:
    """Run each prompt by itself, uncached; return the logits of every step and the greedy tokens."""
    rows = []
    for prompt in prompts:
        cache, logits = make_prompt_cache(net), []
        net(mx.array(prompt[:-1])[None], cache=cache)
        token = prompt[-1]
        for _ in range(steps):
            logits.append(_plain(net(mx.array([[token]]), cache=cache))[0])
            token = int(np.argmax(logits[-1]))
        rows.append(np.stack(logits))
    return np.stack(rows), np.argmax(rows, axis=-1).tolist()


def stock_batch(net: Any, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> Logits:
    """Run the prompts as one batch of mlx-lm, left-padded, with these answers."""
    widest = max(map(len, prompts))
    cache = [BatchKVCache([widest - len(prompt) for prompt in prompts]) for _ in net.layers]
    padded = np.array([[0] * (widest - len(prompt)) + prompt for prompt in prompts], np.int32)
    net(mx.array(padded[:, :-1]), cache=cache)
    return _forced(prompts, answers, lambda column: net(mx.array(column), cache=cache))


def ours(
    net: Any, prompts: Sequence[list[int]], answers: Sequence[list[int]], ends: Sequence[int], choose: Choose
) -> Logits:
    """Run the prompts as one batch over shared segments that end at `ends`, in our forms, with these answers."""
    path = Path()
    for end in ends:
        batch = Batch(len(net.layers), choose)
        batch.open([path])
        _fill(batch, net, [prompts[0][path.num_tokens : end]])
        path = Path([*path.nodes, (batch.tail(0, 0, end - path.num_tokens), end - path.num_tokens)])
    batch = Batch(len(net.layers), choose)
    batch.open([path] * len(prompts))
    _fill(batch, net, [prompt[path.num_tokens : -1] for prompt in prompts])
    return _forced(prompts, answers, lambda column: batch.forward(net, column, [1] * len(prompts))[:, None])


def _fill(batch: Batch, net: Any, pieces: Sequence[list[int]]) -> None:
    counts = [len(piece) for piece in pieces]
    block = np.array([piece + [0] * (max(counts) - len(piece)) for piece in pieces], np.int32)
    batch.forward(net, block, counts)
    batch.evaluate()
    batch.trim(counts)


def _forced(
    prompts: Sequence[list[int]], answers: Sequence[list[int]], step: Callable[[np.ndarray[Any, Any]], mx.array]
) -> Logits:
    """Feed the last token of each prompt, then its answer but for the last token."""
    inputs = np.array([[prompt[-1], *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)], np.int32)
    return np.stack([_plain(step(inputs[:, [i]])) for i in range(inputs.shape[1])], axis=1)


def _plain(logits: mx.array) -> Logits:
    return np.array(logits[:, -1].astype(mx.float32))


def difference(got: Logits, right: Logits) -> Figures:
    """Compare logits: top-1 agreement, mean Kullback-Leibler divergence from the right ones, largest difference."""
    log_right, log_got = (np.log(_softmax(x)) for x in (right.astype(np.float64), got.astype(np.float64)))
    divergence = np.sum(np.exp(log_right) * (log_right - log_got), axis=-1)
    return {
        "top1": float(np.mean(np.argmax(got, -1) == np.argmax(right, -1))),
        "kl": float(np.mean(divergence)),
        "max_abs": float(np.abs(got - right).max()),
    }


def _softmax(x: Logits) -> Logits:
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)  # type: ignore[no-any-return]


def compared(net: Any, prompts: Sequence[list[int]], ends: Sequence[int], steps: int) -> Figures:
    """Return how far each way of running the prompts together is from each alone."""
    right, answers = alone(net, prompts, steps)
    found = {"mlx-lm batch": difference(stock_batch(net, prompts, answers), right)}
    hook.install(net)
    ways = {name: always(name) for name, form in FORMS.items() if form.decodes} | {"RADIXQ_EXACT=1": exactly}
    del ways["packed"]  # the same as the last, but for prefill
    return found | {
        f"radixq {name}": difference(ours(net, prompts, answers, ends, choose), right) for name, choose in ways.items()
    }


def smollm2_prompts(tokenizer: Any, examples: int, rows: int) -> tuple[list[list[int]], list[int]]:
    """Return few-shot prompts and the ends of their shared segments: two levels, the second of all that they share."""
    chats = few_shot_messages(np.random.default_rng(0), num_examples=examples, num_jobs=rows)
    prompts = [list(tokenizer.apply_chat_template(chat, add_generation_prompt=True)) for chat in chats]
    shared = min(common_prefix(prompts[0], other) for other in prompts[1:])
    return prompts, [shared // 4, shared]


def main() -> None:
    """Compare in every type."""
    examples, rows, steps = (1, 2, 1) if sys.argv[1] == "quick" else (5, 3, 8)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for dtype in ("float32", "bfloat16", "float16"):
        began = time.perf_counter()
        loaded = model.load(str(smollm2_path()), dtype=dtype, device=platform.device())
        prompts, ends = smollm2_prompts(loaded.tokenizer, examples, rows)
        found = compared(loaded.model, prompts, ends, steps)
        size = f"SmolLM2 {dtype}, {rows} rows x {steps} steps over {ends[-1]} shared tokens, BLAS {BLAS.name}"
        took = time.perf_counter() - began
        print(json.dumps({"part": "precision", "size": size, **found, "seconds": took}), file=answers)


if __name__ == "__main__":
    main()
