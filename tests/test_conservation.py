"""Tokens, bytes, pins and jobs add up after every step of an engine that is driven at random."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from tests.engines import alone, bench, examples, prompt
from tests.models import tiny
from worker.sequence import Failed, Finished

KV_BYTES = 60_000  # about 230 tokens of the one-layer model: eviction and waiting happen all the time
PIECES = [list(range(start, start + 30)) for start in (0, 40, 80)]


@lru_cache
def models() -> tuple[Any, Any]:
    return tiny(num_hidden_layers=1), tiny(num_hidden_layers=1)


@lru_cache(maxsize=10_000)
def expected(tokens: tuple[int, ...], max_tokens: int) -> list[int]:
    return alone(models()[1], np.array(tokens, np.int32), max_tokens)[0]


class Driven(RuleBasedStateMachine):
    """Adds, aborts, evicts and steps; knows what every job must answer."""

    def __init__(self) -> None:
        super().__init__()
        ours, twin = models()
        self.run = bench(ours, alone=twin, max_rows=3, chunk_tokens=16, kv_bytes=KV_BYTES)
        self.engine = self.run.engine
        self.given: dict[str, tuple[tuple[int, ...], int]] = {}
        self.open: set[str] = set()
        self.prompt_tokens = 0

    @rule(
        pieces=st.lists(st.sampled_from(range(3)), min_size=0, max_size=2),
        own=st.lists(st.integers(120, 130), min_size=1, max_size=20),
        max_tokens=st.integers(1, 12),
        told=st.booleans(),
    )
    def add(self, pieces: list[int], own: list[int], max_tokens: int, told: bool) -> None:
        tokens = [token for piece in pieces for token in PIECES[piece]] + own
        branches = [30 * (i + 1) for i in range(len(pieces))] if told else []
        job_id = str(len(self.given))
        self.given[job_id] = tuple(tokens), max_tokens
        self.open.add(job_id)
        self.engine.add(job_id, prompt(tokens, max_tokens, branches))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.open)))
        self.open.remove(job_id)
        self.engine.abort(job_id)

    @rule(nbytes=st.integers(0, KV_BYTES))
    def evict(self, nbytes: int) -> None:
        self.engine.cache.evict(nbytes)

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            for event in self.engine.step():
                assert isinstance(event, Finished | Failed)
                self.ended(event)

    def ended(self, event: Finished | Failed) -> None:
        assert event.id in self.open, f"{event.id} ended twice, or after it was aborted"
        self.open.remove(event.id)
        tokens, max_tokens = self.given[event.id]
        if isinstance(event, Failed):
            assert event.error.code == "context_length_exceeded"
            assert (len(tokens) + max_tokens) * self.engine._loaded.kv_bytes_per_token > 0.5 * KV_BYTES
            return
        assert list(event.tokens) == expected(tokens, max_tokens)
        assert event.usage.prompt_tokens == len(tokens)
        self.prompt_tokens += len(tokens)

    @invariant()
    def adds_up(self) -> None:
        self.engine.check()
        tree, stats = self.engine.cache.tree, self.engine.stats()
        assert tree.nbytes == tree.num_tokens * self.engine._loaded.kv_bytes_per_token
        assert stats.prompt_tokens == self.prompt_tokens == stats.cached_tokens + stats.prefill_tokens
        assert stats.computed_tokens >= stats.prefill_tokens
        assert stats.pinned_bytes <= tree.nbytes <= KV_BYTES

    def teardown(self) -> None:
        while self.engine.busy:
            self.step(1)
        assert not self.open
        assert self.engine.cache.tree.root.pins == 0
        assert self.engine.stats().cache_bytes == self.engine.cache.tree.nbytes


def test_everything_adds_up_whatever_happens() -> None:
    chosen = settings(max_examples=examples(25), stateful_step_count=30, deadline=None)
    run_state_machine_as_test(Driven, settings=chosen)
