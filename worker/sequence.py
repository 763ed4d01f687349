"""What passes between the worker's rooms: a `Prompt` into the engine, events out of it. Knows no Redis and no MLX."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from common.errors import RadixqError
from common.messages import FinishReason, Sampling, Usage

Tokens = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture of a prompt: the tokens [start, stop) stand for it.

    Attributes:
        digest: 64 hexadecimal digits that name its content.
        ids: int32 [stop - start], what the model is fed there.
        grid: its patches in time, height and width, for models whose positions follow them; else empty.
        nbytes: size of the PNG as it is stored.
        data: that PNG; None until the worker has fetched it.
    """

    start: int
    stop: int
    digest: str
    ids: Tokens
    grid: tuple[int, ...] = ()
    nbytes: int = 0
    data: bytes | memoryview | None = None


@dataclass(frozen=True)  # no slots: a class with them takes Python code to pickle, and every prompt is
class Prompt:
    """A job after prepare, ready to run.

    Attributes:
        tokens: int32 [P], at least one, with the chat template and BOS applied. Where a picture stands, keys made of
            its content: two prompts agree there if and only if they show the same picture.
        sampling: with `max_tokens` set (never None here) and bounded by the context length, and a seed.
        branches: ascending depths (tokens) at which other known jobs leave this prompt: the KV up to there is
            wanted by somebody else too. Empty when nobody shares.
        pictures: ascending and apart; the last token is in none.
    """

    tokens: Tokens
    sampling: Sampling
    branches: tuple[int, ...] = ()
    pictures: tuple[Picture, ...] = ()

    @property
    def max_tokens(self) -> int:
        """The longest answer it may get."""
        assert self.sampling.max_tokens is not None
        return self.sampling.max_tokens

    def showing(self, stored: Mapping[str, bytes | memoryview]) -> Prompt:
        """Return the prompt with the data of its pictures, as far as they are there."""
        if not self.pictures:
            return self
        return replace(self, pictures=tuple(replace(p, data=stored.get(p.digest)) for p in self.pictures))

    def whole(self, depth: int) -> int:
        """Return `depth`, or where the picture begins that it would cut in two: only a whole one is surely the same."""
        return next((picture.start for picture in self.pictures if picture.start < depth < picture.stop), depth)


@dataclass(frozen=True, slots=True)
class Ready:
    """The model is loaded and the engine takes prompts."""

    model: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """One sequence ended by itself. `tokens` are the generated ids, the end of text included."""

    id: str
    text: str
    finish_reason: FinishReason
    usage: Usage
    prefill_ms: float
    decode_ms: float
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Failed:
    """One sequence failed alone."""

    id: str
    error: RadixqError


@dataclass(frozen=True, slots=True)
class Died:
    """The engine cannot go on: the model did not load, or the thread ended by a defect. Nothing follows."""

    error: RadixqError


Event = Ready | Finished | Failed | Died


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of the engine's counters (since start) and gauges (now); names as in `radixq:metrics:WORKER`."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    prefill_tokens: int = 0
    completion_tokens: int = 0
    computed_tokens: int = 0
    cache_nodes: int = 0
    cache_bytes: int = 0
    cache_bytes_limit: int = 0
    pinned_bytes: int = 0
    evicted_nodes: int = 0
    evicted_bytes: int = 0
    poisoned_nodes: int = 0
    herd_waits: int = 0
    prefix_bytes_saved: int = 0
    batch_rows: int = 0
    batch_rows_max: int = 0
    cohorts: int = 0
    decode_steps: int = 0
    vision_runs: int = 0
    vision_bytes: int = 0
    decoded_tokens: int = 0
    """Tokens generated so far; `completion_tokens` counts those of jobs that have ended."""
    prefill_s: float = 0.0
    decode_s: float = 0.0
    attention_form: str = ""
    active_bytes: int = 0
    peak_bytes: int = 0
    last_token_at: float | None = field(default=None)
    """`time.time()` of the last decoded token."""
