"""The benchmark's workloads: which prompts, how they share, and the model they run on. Knows no MLX and no contestant.

A job is tokens and, for contestants that speak text, chat messages that render to exactly these tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from bench_texts import few_shot_messages

SMOLLM2 = "smollm2"
MIN_SHARED_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Shape:
    """A random Llama, as mlx-lm builds it; the defaults are the widths of Qwen2-0.5B."""

    layers: int
    hidden: int = 896
    heads: int = 14
    kv_heads: int = 2
    head_dim: int = 64
    inter: int = 4864
    vocab: int = 8000

    @property
    def name(self) -> str:
        """Name of its directory."""
        return "-".join(str(getattr(self, field)) for field in self.__slots__)


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt.

    Attributes:
        shared: how many leading tokens its whole group has in common.
    """

    group: int
    tokens: list[int]
    messages: list[dict[str, str]]
    shared: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Groups of jobs that share a prefix, in an order of arrival that mixes them.

    Attributes:
        top: tokens that all groups share, above their own prefix.
        once: contestants that run once; everybody else runs `runs` times unless the caller says another number.
    """

    name: str
    title: str
    model: Shape | str
    groups: int
    per_group: int
    prefix: int
    question: int
    answer: int
    top: int = 0
    once: tuple[str, ...] = ("mlx-lm one by one", "batch_generate")
    rows: int = 32
    runs: int = 3

    @property
    def num_jobs(self) -> int:
        """How many prompts."""
        return self.groups * self.per_group

    def small(self) -> Workload:
        """Return two short jobs of the same kind, to warm up with."""
        return replace(self, groups=1, per_group=2, prefix=min(32, self.prefix), top=0, question=8, answer=3)

    def jobs(self, seed: int, tokenizer: Any) -> list[Job]:
        """Return the jobs in order of arrival; no seed shares a prefix with another."""
        rng = np.random.default_rng((seed, 20240))
        jobs = self._written(rng, tokenizer) if self.model == SMOLLM2 else self._generated(rng)
        return [jobs[i] for i in rng.permutation(len(jobs))]

    def _generated(self, rng: np.random.Generator) -> list[Job]:
        assert isinstance(self.model, Shape)
        draw = lambda n: [int(x) for x in rng.integers(0, self.model.vocab - 2, n)]  # noqa: E731
        top, jobs = draw(self.top), []
        for group in range(self.groups):
            above = top + draw(self.prefix)
            for _ in range(self.per_group):
                own = draw(self.question)
                system = [{"role": "system", "content": words(above)}] if above else []
                jobs.append(Job(group, above + own, [*system, {"role": "user", "content": words(own)}], len(above)))
        return jobs

    def _written(self, rng: np.random.Generator, tokenizer: Any) -> list[Job]:
        chats = few_shot_messages(rng, num_examples=self.prefix // 24, num_jobs=self.num_jobs)
        tokens = [list(tokenizer.apply_chat_template(chat, add_generation_prompt=True)) for chat in chats]
        shared = min(common_prefix(tokens[0], other) for other in tokens[1:])
        return [Job(0, ids, chat, shared) for ids, chat in zip(tokens, chats, strict=True)]


def words(tokens: list[int]) -> str:
    """Write random tokens as text: the random models' tokenizer has one word per token."""
    return " ".join(f"t{token}" for token in tokens)


def common_prefix(a: list[int], b: list[int]) -> int:
    """Return how many leading tokens two prompts share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def distinct_tokens(prompts: list[list[int]]) -> int:
    """Return the tokens of the prompts' trie: what someone who shares everything has to compute."""
    ordered = sorted(prompts)
    pairs = zip([[], *ordered], ordered, strict=False)
    return sum(len(prompt) - common_prefix(before, prompt) for before, prompt in pairs)


_FOUR, _TWO = Shape(layers=4), Shape(layers=2)
_SLOW = ("mlx-lm one by one", "batch_generate", "mlx_lm.server")

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("gsp-512", "generated shared prefix 4x16, 512/32/32", _FOUR, 4, 16, 512, 32, 32),
        Workload("gsp-1024", "generated shared prefix 4x16, 1024/32/32", _FOUR, 4, 16, 1024, 32, 32),
        Workload("gsp-4096", "generated shared prefix 2x32, 4096/32/32", _TWO, 2, 32, 4096, 32, 32, once=_SLOW),
        Workload("gsp-8192", "generated shared prefix 1x32, 8192/32/32", _TWO, 1, 32, 8192, 32, 32,
                 once=(*_SLOW, "stock uncached")),
        Workload("prefix-repetition", "prefix repetition 10x10, 256/256/128", _TWO, 10, 10, 256, 256, 128),
        Workload("documents", "questions to 8 documents under one system prompt", _TWO, 8, 8, 1024, 32, 32, top=512),
        Workload("few-shot", "few-shot classification, real text, SmolLM2-135M", SMOLLM2, 1, 32, 600, 24, 8,
                 once=("mlx-lm one by one", "stock uncached")),
        Workload("no-sharing", "nothing shared, 32 jobs, 256/32", _FOUR, 32, 1, 0, 256, 32, runs=9,
                 once=(*_SLOW, "stock, KV copied", "radixq whole")),
    )
}  # fmt: skip

_MINI = Shape(layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, inter=128, vocab=400)
QUICK = {
    workload.name: workload
    for workload in (
        Workload("gsp-quick", "tiny shared prefix 2x4, 96/8/6", _MINI, 2, 4, 96, 8, 6),
        Workload("no-sharing-quick", "tiny, nothing shared, 4 jobs, 32/6", _MINI, 4, 1, 0, 32, 6),
    )
}

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_path() -> Path:
    """Return where `ops/bootstrap` puts SmolLM2."""
    return Path(__file__).resolve().parent.parent / ".radixq" / "models" / GGUF
