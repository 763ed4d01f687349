"""Run an engine on a real (tiny) model and look at every call of the model; what mlx-lm gives for one job alone."""

from __future__ import annotations

import os
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step

from common.messages import Sampling
from tests.models import EOS, tiny, tiny_tokenizer
from worker.cache import Limits
from worker.crossover import UNMEASURED, Crossover, Point
from worker.engine import Engine
from worker.model import LoadedModel
from worker.sequence import Event, Failed, Finished, Prompt, Tokens


class Watched:
    """A model that is called as before while its logits and the tokens it computes are noted.

    Attributes:
        logits: per job, one array [V] for each decode step it took part in.
        calls: tokens per call as (rows, columns).
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.engine: Engine | None = None
        self.logits: dict[str, list[np.ndarray]] = defaultdict(list)
        self.calls: list[tuple[int, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, inputs: mx.array, cache: Any) -> mx.array:
        """Run the model."""
        out: mx.array = self.model(inputs, cache=cache)
        self.calls.append((inputs.shape[0], inputs.shape[1]))
        if self.engine is not None and getattr(cache[0], "_batch", None) is self.engine._running.batch:
            last = np.array(out[:, -1].astype(mx.float32))
            for job_id, row in zip(self.engine.running, last, strict=True):
                self.logits[job_id].append(row)
        return out


@dataclass
class Bench:
    """An engine on a tiny model, with a twin of the model that nobody touched."""

    engine: Engine
    watched: Watched
    alone: Any
    eos: frozenset[int] = frozenset({EOS})
    ended: dict[str, Event] = field(default_factory=dict)

    def run(self, prompts: dict[str, Prompt], *, seed: int | None = None) -> dict[str, Finished]:
        """Give the prompts to the engine, all at once or at random moments, and step until all ended."""
        todo, rng = list(prompts.items()), random.Random(seed)
        while todo or self.engine.busy:
            while todo and (seed is None or rng.random() < 0.4):
                self.engine.add(*todo.pop(0))
            for event in self.engine.step():
                assert isinstance(event, Finished | Failed)
                assert event.id not in self.ended, f"{event.id} ended twice"
                self.ended[event.id] = event
            self.engine.check()
        return {job_id: event for job_id, event in self.ended.items() if isinstance(event, Finished)}

    def tokens(self, job_id: str) -> list[int]:
        """Return the greedy tokens of a job that ended, from the logits of its steps."""
        return [int(np.argmax(logprobs(row))) for row in self.watched.logits[job_id]]


def bench(
    model: Any = None,
    *,
    alone: Any = None,
    exact: bool = False,
    max_rows: int = 6,
    chunk_tokens: int = 32,
    kv_bytes: int = 1 << 30,
    arrays: int = 400_000,
    dtype: mx.Dtype = mx.float32,
    crossover: Crossover = UNMEASURED,
) -> Bench:
    """Build an engine; `model` and `alone` must have equal weights (by default the same tiny Llama, made twice)."""
    made = [m if m is not None else tiny() for m in (model, alone)]
    for m in made:
        m.set_dtype(dtype)
    watched = Watched(made[0])
    args = made[0].args
    head = getattr(args, "head_dim", None) or args.hidden_size // args.num_attention_heads
    per_token = 2 * args.num_hidden_layers * args.num_key_value_heads * head * dtype.size
    loaded = LoadedModel(
        model=watched,  # type: ignore[arg-type]
        tokenizer=tiny_tokenizer(),
        name="tiny",
        digest="",
        dtype="float32",
        num_layers=len(made[0].layers),
        kv_bytes_per_token=per_token,
        state_bytes=0,
        context_length=4096,
        vocab_size=args.vocab_size,
        cache_kind="plain",
        eos_token_ids=frozenset({EOS}),
        notes=(),
    )
    limits = Limits(max_rows, chunk_tokens, kv_bytes, arrays)
    engine = Engine(loaded, limits, exact=exact, crossover=crossover)
    watched.engine = engine
    return Bench(engine, watched, made[1])


def fastest(form: str) -> Crossover:
    """Return what would have been measured if one form were always the fastest to decode in."""
    return Crossover((Point(1, 1, 64, {"merged": 2.0} | {form: 1.0}),))


def prompt(tokens: Iterable[int], max_tokens: int = 8, branches: Sequence[int] = (), **sampling: Any) -> Prompt:
    """Make a prompt from token ids."""
    return Prompt(np.array(list(tokens), np.int32), Sampling(max_tokens=max_tokens, **sampling), tuple(branches))


def examples(few: int) -> int:
    """Return how many random examples to try; RADIXQ_TEST_EXAMPLES asks for more than the gate."""
    return int(os.environ.get("RADIXQ_TEST_EXAMPLES", few))


def family(rng: np.random.Generator, *, jobs: int = 6, vocab: int = 290) -> dict[str, Prompt]:
    """Return random prompts that share prefixes: a root, two branches, and a part of each job's own."""
    root = rng.integers(0, vocab, rng.integers(1, 90))
    branches = [rng.integers(0, vocab, rng.integers(0, 60)) for _ in range(2)]
    prompts = {}
    for number in range(jobs):
        own = rng.integers(0, vocab, rng.integers(1, 40))
        tokens = np.concatenate([root, branches[rng.integers(2)], own])
        prompts[str(number)] = prompt(tokens.tolist(), int(rng.integers(1, 20)))
    return prompts


def alone(model: Any, tokens: Tokens, max_tokens: int, *, eos: int = EOS) -> tuple[list[int], list[np.ndarray]]:
    """Return mlx-lm's greedy tokens and log-probabilities [V] for one job, up to and with the end of text."""
    chosen, rows = [], []
    for token, logprobs in generate_step(mx.array(tokens), model, max_tokens=max_tokens):
        chosen.append(int(token))
        rows.append(np.array(logprobs.astype(mx.float32)))
        if chosen[-1] == eos:
            break
    return chosen, rows


def logprobs(logits: np.ndarray, dtype: mx.Dtype = mx.float32) -> np.ndarray:
    """Normalise logits [V] the way mlx-lm does, in the model's type."""
    row = mx.array(logits).astype(dtype)[None]
    return np.array((row - mx.logsumexp(row, keepdims=True))[0].astype(mx.float32))
