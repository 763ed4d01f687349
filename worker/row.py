"""One job inside the engine, from waiting to its end: tokens, place in the tree, text so far, counts and times."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from common.messages import FinishReason, Usage
from worker.kv import Path
from worker.radix import Node
from worker.sampling import Sampler
from worker.sequence import Finished, Prompt, Tokens
from worker.tokenizer import Detokenizer, StopMatcher

if TYPE_CHECKING:
    from worker.vision import View


class Answer:
    """The text of one answer as it grows: whole characters, up to the first stop string."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._matcher = StopMatcher(stop)
        self._pieces: list[str] = []

    @cached_property
    def _detokenizer(self) -> Detokenizer:
        """Made with the first token: if it fails, so does its row and nobody else."""
        return Detokenizer(self._tokenizer)

    def add(self, token: int) -> bool:
        """Take the next token; return whether a stop string is complete."""
        self._pieces.append(self._matcher.add(self._detokenizer.add(token)))
        return self._matcher.matched is not None

    def finish(self) -> str:
        """Return the whole text; call once, at the end."""
        rest = self._matcher.add(self._detokenizer.finish()) + self._matcher.finish()
        return "".join(self._pieces) + rest


@dataclass(slots=True, eq=False)
class Row:
    """A job that waits, prefills or decodes.

    Attributes:
        node: the locked tree node that holds the end of the row's prefix; None while it waits.
        prefix_tokens: how many leading tokens lie in the tree; the rest of its KV is in its tail.
        computed_tokens: prompt tokens whose computation this row caused.
        company: with how many rows it may run, itself counted; None until it fails.
        view: how it sees its pictures, from its first call of the model on.
    """

    id: str
    prompt: Prompt
    answer: Answer
    sampler: Sampler
    node: Node[Any] | None = None
    prefix_tokens: int = 0
    computed_tokens: int = 0
    generated: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    aborted: bool = False
    company: int | None = None
    view: View | None = None
    started: float = field(default_factory=time.perf_counter)
    first_token: float | None = None

    @property
    def longest(self) -> int:
        """Tokens that prompt and answer can come to."""
        return len(self.prompt.tokens) + self.prompt.max_tokens

    @property
    def next_input(self) -> int:
        """The token to feed next: the prompt's last, then what it generated last."""
        return self.generated[-1] if self.generated else int(self.prompt.tokens[-1])

    @property
    def cacheable(self) -> Tokens:
        """The prompt without its last token: what may be found in the tree, since something must be left to run."""
        return self.prompt.tokens[:-1]

    def tokens(self, count: int) -> Tokens:
        """Return the first `count` tokens of prompt and answer."""
        if count <= len(self.prompt.tokens):
            return self.prompt.tokens[:count]
        return np.concatenate([self.prompt.tokens, np.array(self.generated, np.int32)])[:count]

    def path(self) -> Path:
        """Return the shared KV above the row as the tree holds it now."""
        nodes = self.node.path() if self.node else []
        used = [(n.payload, min(n.end, self.prefix_tokens) - n.start) for n in nodes]
        return Path([(held, count) for held, count in used if count > 0])

    def accept(self, token: int, eos: frozenset[int]) -> bool:
        """Take the next generated token; return whether the answer is complete."""
        if self.first_token is None:
            self.first_token = time.perf_counter()
        self.generated.append(token)
        if token in eos or self.answer.add(token):
            self.finish_reason = "stop"
        elif len(self.generated) >= self.prompt.max_tokens:
            self.finish_reason = "length"
        return self.finish_reason is not None

    def finished(self) -> Finished:
        """Return the event that ends a complete row."""
        assert self.finish_reason is not None
        assert self.first_token is not None
        total = len(self.prompt.tokens)
        computed = min(total, self.computed_tokens)  # more if a segment was evicted before its row could start
        return Finished(
            id=self.id,
            text=self.answer.finish(),
            finish_reason=self.finish_reason,
            usage=Usage(
                prompt_tokens=total,
                cached_tokens=total - computed,
                prefill_tokens=computed,
                completion_tokens=len(self.generated),
            ),
            prefill_ms=(self.first_token - self.started) * 1e3,
            decode_ms=(time.perf_counter() - self.first_token) * 1e3,
            tokens=tuple(self.generated),
        )
