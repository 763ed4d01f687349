"""Models laid out as on the hub: 4 bits, shards, templates and processors in files of their own; and their tokens."""

from __future__ import annotations

import contextlib
import json
import tempfile
from functools import lru_cache
from pathlib import Path

import pytest

pytest.importorskip("mlx_vlm", reason="radixq[vision] is not installed")

from common.errors import ModelNotLoaded
from tests.test_vision import compare
from tests.vision_engines import SETTINGS, Part, ask, bench_at
from tests.vision_layouts import LAYOUTS, save_layout
from tests.vision_models import digest, picture, png
from worker.model import load_tokenizer
from worker.prepare import prepare

CAT, TALL = picture(90, 60), picture(60, 300, 1)
JOBS: dict[str, tuple[Part, ...]] = {
    "picture first": (CAT, "what is this?"),
    "the same again": (CAT, "and what colour has it?"),
    "text first": ("what is this?", CAT),
    "two": ("is", CAT, "like", TALL, "or not?"),
    "text": ("Hello there, who are you?",),
}


@lru_cache(maxsize=8)
def saved(name: str) -> Path:
    """Return a repository's directory, made once for this process."""
    return save_layout(Path(tempfile.mkdtemp(prefix="radixq-test-")) / "model", name)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_repository_as_on_the_hub_gives_mlx_vlms_tokens(name: str) -> None:
    engine = bench_at(saved(name), dtype="float32")
    assert engine.loaded.processor is not None, engine.loaded.notes
    got = engine.run({job: engine.prompt(*parts) for job, parts in JOBS.items()})
    compare(engine, JOBS, got)
    assert engine.engine.stats().vision_runs == 2


@pytest.mark.parametrize("name", LAYOUTS)
def test_four_bits_are_served_as_stored(name: str) -> None:
    engine = bench_at(saved(name), dtype="stored")
    got = engine.run({job: engine.prompt(*JOBS[job]) for job in ("picture first", "text")})
    assert engine.loaded.dtype == "bfloat16"
    assert all(got.values())


def test_the_bounds_of_the_processor_are_those_of_its_file() -> None:
    reader = load_tokenizer(str(saved("Qwen2-VL-2B-Instruct-4bit")))
    assert reader.processor is not None
    small, large = picture(10, 10), picture(1000, 500)
    stored = {digest(image): png(image) for image in (small, large)}
    assert len(reader.processor.layout(digest(small), stored.get).ids) == 4, "3,136 pixels at least"
    assert reader.processor.layout(digest(large), stored.get).grid == (1, 36, 72), "no smaller than it is"


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_template_of_pictures_is_found_wherever_it_is(name: str) -> None:
    reader = load_tokenizer(str(saved(name)))
    stored = {digest(CAT): png(CAT)}
    said = reader.tokenizer.decode(prepare(ask("red", CAT, "blue"), reader, SETTINGS, stored.get).tokens.clip(0))
    alone = reader.tokenizer.decode(prepare(ask("green"), reader, SETTINGS).tokens)
    turn = "Assistant:" if name.startswith("SmolVLM") else "<|im_start|>assistant\n"
    assert said.index("red") < said.index("blue") < said.index(turn)
    assert "green" in alone
    assert alone.endswith(turn)


def test_an_answer_ends_where_the_processor_says() -> None:
    directory = save_layout(Path(tempfile.mkdtemp(prefix="radixq-test-")) / "model", "SmolVLM-Instruct-4bit")
    (directory / "generation_config.json").unlink()
    described = directory / "tokenizer_config.json"
    described.write_text(json.dumps(json.loads(described.read_text()) | {"eos_token": "<|im_end|>"}))
    reader = load_tokenizer(str(directory))
    (turn_end,) = reader.tokenizer.encode("<end_of_utterance>", add_special_tokens=False)
    assert reader.eos_token_ids == {298, turn_end}


def test_of_a_template_file_nothing_but_the_template_is_taken(tmp_path: Path) -> None:
    directory = save_layout(tmp_path / "model", "SmolVLM-Instruct-4bit")
    file = directory / "chat_template.json"
    (directory / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\n")
    described = directory / "tokenizer_config.json"
    content = json.loads(described.read_text()) | {"auto_map": {"AutoTokenizer": ["trap.T", "trap.T"]}}
    described.write_text(json.dumps(content))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"trust_remote_code": True}))
    with contextlib.suppress(ModelNotLoaded):
        load_tokenizer(str(directory))
    assert not (tmp_path / "sprung").exists()
