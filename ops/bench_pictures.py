"""Many questions per picture, beside mlx-vlm's own ways: `python ops/bench_pictures.py QUICK`.

Prints one JSON object. One process, one BLAS thread, a random Qwen2.5-VL, for which mlx-vlm puts pictures before the
text; the contestants take turns. Knows nothing of the workloads of text.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from worker import platform

BLAS = platform.prepare()  # before anything imports MLX

import mlx.core as mx  # noqa: E402

from common import pictures  # noqa: E402
from common.messages import GenerateJob  # noqa: E402
from common.settings import Settings  # noqa: E402
from tests.vision_models import save_tiny_vision  # noqa: E402
from worker import crossover, hook, model  # noqa: E402
from worker.cache import Limits  # noqa: E402
from worker.engine import Engine  # noqa: E402
from worker.prepare import prepare  # noqa: E402
from worker.reader import load_tokenizer  # noqa: E402
from worker.sequence import Failed, Finished, Prompt  # noqa: E402

ROWS, CHUNK_TOKENS, KV_BYTES = 32, 512, 4 << 30
SETTINGS = Settings.from_env({})


@dataclass(frozen=True, slots=True)
class Size:
    """How much there is to do."""

    pictures: int
    questions: int  # per picture
    width: int
    height: int
    answer: int
    text: dict[str, Any]
    tower: dict[str, Any]


FULL = Size(
    4, 8, 392, 280, 16,
    {"hidden_size": 896, "num_hidden_layers": 2, "intermediate_size": 4864, "num_attention_heads": 14},
    {"depth": 4, "hidden_size": 512, "intermediate_size": 1368, "out_hidden_size": 896, "num_heads": 8,
     "patch_size": 14, "spatial_patch_size": 14, "window_size": 112, "fullatt_block_indexes": [1, 3]},
)  # fmt: skip
QUICK = Size(2, 4, 64, 48, 6, {}, {})


@dataclass(slots=True)
class Outcome:
    """What one run gave: texts in the order of the jobs, prompt tokens, and those that were not computed again."""

    texts: list[str]
    prompt_tokens: int = 0
    cached_tokens: int = 0


class Work:
    """The jobs, and the model as both libraries load it."""

    def __init__(self, size: Size, directory: Path) -> None:
        import mlx_vlm

        rng = np.random.default_rng(0)
        shape = (size.pictures, size.height, size.width, 3)
        shown = [Image.fromarray(pixels) for pixels in rng.integers(0, 255, shape, np.uint8)]
        jobs = [(image, f"question {n} of {i}?") for i, image in enumerate(shown) for n in range(size.questions)]
        self.jobs = [jobs[i] for i in rng.permutation(len(jobs))]
        self.answer = size.answer
        path = save_tiny_vision(directory / "model", "qwen2_5_vl", text=size.text, tower=size.tower)
        self.theirs, self.processor = mlx_vlm.load(str(path))
        self.seen = _counted(self.theirs.vision_tower)
        self.path = str(path)
        self.loaded = model.load(self.path, dtype="float32", device=platform.device())
        hook.install(self.loaded.model)
        self.measured = crossover.measured(self.loaded.model)

    def one_by_one(self) -> Outcome:
        """Run mlx-vlm's own generation for each job alone: the texts that count as right."""
        from mlx_vlm.generate import stream_generate
        from mlx_vlm.prompt_utils import apply_chat_template

        texts = []
        for image, question in self.jobs:
            asked = apply_chat_template(self.processor, self.theirs.config, question, num_images=1)
            steps = stream_generate(
                self.theirs, self.processor, asked, image=[image], max_tokens=self.answer, temperature=0.0
            )
            tokens = [step.token for step in steps if step.token is not None]
            texts.append(self._decoded(tokens[: self.answer]))
        return Outcome(texts)

    def batch(self) -> Outcome:
        """Run `mlx_vlm.batch_generate`, the function that mlx-vlm offers for many prompts."""
        from mlx_vlm import batch_generate

        images, prompts = zip(*self.jobs, strict=True)
        made = batch_generate(
            self.theirs, self.processor, images=list(images), prompts=list(prompts), max_tokens=self.answer
        )
        return Outcome([_characters(text) for text in made.texts])

    def ours(self) -> Outcome:
        """Run radixq's engine, the pictures read as the scout reads them."""
        limits = Limits(ROWS, CHUNK_TOKENS, KV_BYTES, picture_bytes=1 << 28)
        engine = Engine(self.loaded, limits, exact=False, crossover=self.measured)
        for number, prompt in enumerate(self._prompts()):
            engine.add(str(number), prompt)
        ended: dict[str, Finished] = {}
        while engine.busy:
            for event in engine.step():
                if isinstance(event, Failed):
                    raise event.error
                assert isinstance(event, Finished)
                ended[event.id] = event
        self.runs, stats = engine.stats().vision_runs, engine.stats()
        texts = [self._decoded(list(ended[str(number)].tokens)) for number in range(len(self.jobs))]
        return Outcome(texts, stats.prompt_tokens, stats.cached_tokens)

    def _prompts(self) -> list[Prompt]:
        reader = load_tokenizer(self.path)  # anew, so that every run reads its pictures
        stored: dict[str, bytes] = {}
        prompts = []
        for image, question in self.jobs:
            digest = pictures.digest(*image.size, image.tobytes())
            if digest not in stored:
                file = io.BytesIO()
                image.save(file, "PNG")
                stored[digest] = file.getvalue()
            content = [
                {"type": "image_url", "image_url": {"url": f"sha256:{digest}"}},
                {"type": "text", "text": question},
            ]
            said = [{"role": "user", "content": content}]
            job = GenerateJob.model_validate({"messages": said, "sampling": {"max_tokens": self.answer}})
            prompts.append(prepare(job, reader, SETTINGS, stored.get).showing(stored))
        return prompts

    def _decoded(self, tokens: list[int]) -> str:
        return _characters(str(self.processor.tokenizer.decode(tokens)))


def _characters(text: str) -> str:
    """Leave out what stands for bytes that are no character: mlx-vlm's batch does not write it."""
    return text.replace("\ufffd", "")


def _counted(tower: Any) -> list[int]:
    """Note how many pictures go through a vision tower, call by call."""
    seen: list[int] = []
    kind = type(tower)

    def call(self: Any, pixels: mx.array, grids: mx.array, **options: Any) -> Any:
        seen.append(grids.shape[0])
        return kind.__call__(self, pixels, grids, **options)

    tower.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    return seen


def measure(work: Work, runs: int) -> dict[str, Any]:
    """Let them run in turn; return what each cost."""
    ways: dict[str, Callable[[], Outcome]] = {
        "mlx-vlm one by one": work.one_by_one, "mlx-vlm batch": work.batch, "radixq": work.ours,
    }  # fmt: skip
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    peak: dict[str, float] = {}
    seen: dict[str, int] = {}
    outcomes: dict[str, Outcome] = {}
    held = mx.get_active_memory()
    for number in range(runs):
        for name, run in ways.items():
            if number and name == "mlx-vlm one by one":
                continue
            mx.clear_cache()
            mx.reset_peak_memory()
            work.seen.clear()
            began = time.process_time()
            outcomes[name] = run()
            cpu[name].append(time.process_time() - began)
            peak[name] = (mx.get_peak_memory() - held) / 2**20
            seen[name] = work.runs if name == "radixq" else sum(work.seen)
    right, ours = outcomes["mlx-vlm one by one"].texts, outcomes["radixq"]
    return {
        "cpu_s": {name: float(np.median(spent)) for name, spent in cpu.items()},
        "peak_mib": peak,
        "pictures_seen": seen,
        "hit_rate": ours.cached_tokens / ours.prompt_tokens,
        "agreement": {
            name: sum(a == b for a, b in zip(outcome.texts, right, strict=True)) / len(right)
            for name, outcome in outcomes.items()
        },
    }


def main() -> None:
    """Measure and print."""
    size = QUICK if sys.argv[1] == "quick" else FULL
    with tempfile.TemporaryDirectory(prefix="radixq-bench-") as directory:
        figures = measure(Work(size, Path(directory)), 1 if size is QUICK else 2)
    words = f"{size.pictures} x {size.questions} questions on pictures of {size.width} x {size.height}"
    print(json.dumps({"part": "pictures", "size": words, **figures}))


if __name__ == "__main__":
    main()
