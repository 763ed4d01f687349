"""An engine on a tiny vision model, and what mlx-vlm gives for one job alone."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from common.messages import GenerateJob
from common.settings import Settings
from tests.vision_models import digest, png, save_tiny_vision, url
from worker import model, platform
from worker.cache import Limits
from worker.engine import Engine
from worker.model import LoadedModel
from worker.prepare import prepare
from worker.processor import Bounds
from worker.reader import LoadedTokenizer, load_tokenizer
from worker.sequence import Event, Failed, Finished, Prompt

Part = str | Image.Image
SETTINGS = Settings.from_env({})
_ANY = Bounds()
_ALONE: dict[tuple[Any, ...], tuple[list[int], list[Any]]] = {}


@lru_cache(maxsize=8)
def saved(family: str) -> Path:
    """Return the directory of a tiny model, made once for this process."""
    return save_tiny_vision(Path(tempfile.mkdtemp(prefix="radixq-test-")) / family, family)


@lru_cache(maxsize=8)
def _loaded(path: Path, dtype: str | None, pictures: Bounds) -> tuple[LoadedModel, LoadedTokenizer]:
    loaded = model.load(str(path), dtype=dtype, device=platform.device(), pictures=pictures)
    return loaded, load_tokenizer(str(path), pictures=pictures)


@lru_cache(maxsize=8)
def reference(path: Path, dtype: str) -> tuple[Any, Any]:
    """Return mlx-vlm's own model and processor, the model's floats in one type."""
    import mlx_vlm

    inner, processor = mlx_vlm.load(str(path))
    inner.set_dtype(getattr(mx, dtype))
    return inner, processor


def ask(*parts: Part, system: str | None = None, **sampling: Any) -> GenerateJob:
    """Make a job of one user message, with pictures where they stand."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": url(part)}}
        for part in parts
    ]
    said: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if system is not None:
        said.insert(0, {"role": "system", "content": system})
    return GenerateJob.model_validate({"messages": said, "sampling": {"max_tokens": 12, **sampling}})


@dataclass
class Bench:
    """One engine, and the pictures that its jobs may show."""

    path: Path
    loaded: LoadedModel
    reader: LoadedTokenizer
    engine: Engine
    stored: dict[str, bytes] = field(default_factory=dict)
    ended: dict[str, Event] = field(default_factory=dict)

    def prompt(self, *parts: Part, **options: Any) -> Prompt:
        """Make a prompt as the scout and the worker do together."""
        self.stored |= {digest(part): png(part) for part in parts if not isinstance(part, str)}
        made = prepare(ask(*parts, **options), self.reader, SETTINGS, self.stored.get)
        return replace(made, pictures=tuple(replace(p, data=self.stored[p.digest]) for p in made.pictures))

    def run(self, prompts: dict[str, Prompt]) -> dict[str, list[int]]:
        """Run prompts together; return their tokens."""
        for job_id, prompt in prompts.items():
            self.engine.add(job_id, prompt)
        while self.engine.busy:
            for event in self.engine.step():
                assert isinstance(event, Finished | Failed)
                self.ended[event.id] = event
            self.engine.check()
        return {i: list(e.tokens) for i in prompts if isinstance(e := self.ended[i], Finished)}

    def alone(self, *parts: Part, max_tokens: int = 12) -> tuple[list[int], list[Any]]:
        """Return mlx-vlm's own greedy tokens and log-probabilities for the job."""
        key = (
            self.path,
            self.loaded.dtype,
            max_tokens,
            *(part if isinstance(part, str) else url(part) for part in parts),
        )
        if key not in _ALONE:
            _ALONE[key] = self._alone(parts, max_tokens)
        return _ALONE[key]

    def _alone(self, parts: Sequence[Part], max_tokens: int) -> tuple[list[int], list[Any]]:
        from mlx_vlm.generate import generate_step
        from mlx_vlm.utils import prepare_inputs

        inner, processor = reference(self.path, self.loaded.dtype)
        content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in parts]
        said = [{"role": "user", "content": content}]
        text = processor.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        images = [part for part in parts if not isinstance(part, str)]
        made = dict(prepare_inputs(processor, images=images or None, prompts=text))
        given = made.pop("input_ids"), inner, made.pop("pixel_values", None), made.pop("attention_mask")
        tokens, logprobs = [], []
        for token, row in generate_step(*given, max_tokens=max_tokens, temperature=0.0, **made):
            tokens.append(int(token))
            logprobs.append(np.array(row.astype(mx.float32)).reshape(-1))
            if tokens[-1] in self.loaded.eos_token_ids:
                break
        return tokens, logprobs


def bench(family: str = "qwen2_vl", *, dtype: str | None = None, **limits: Any) -> Bench:
    """Build an engine on the family's tiny model; see `bench_at`."""
    return bench_at(saved(family), dtype=dtype, **limits)


def bench_at(path: Path, *, dtype: str | None = None, max_rows: int = 6, chunk_tokens: int = 32,
             kv_bytes: int = 1 << 30, picture_bytes: int = 1 << 24, exact: bool = False,
             pictures: Bounds = _ANY) -> Bench:  # fmt: skip
    """Build an engine on a model's directory."""
    loaded, reader = _loaded(path, dtype, pictures)
    limits = Limits(max_rows, chunk_tokens, kv_bytes, picture_bytes=picture_bytes)
    return Bench(path, loaded, reader, Engine(loaded, limits, exact=exact))


def same(ours: Sequence[int], theirs: Sequence[int], logprobs: Sequence[Any], tie: float = 1e-4) -> bool:
    """Whether answers are equal, or part first where theirs is hardly the likelier token."""
    for step, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            return float(logprobs[step][b] - logprobs[step][a]) <= tie
    return len(ours) == len(theirs)


def characters(text: str) -> str:
    """Leave out what stands for bytes that are no character: an answer may be cut within one."""
    return text.replace("\ufffd", "")
