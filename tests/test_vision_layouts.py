"""Models laid out as on the hub: 4 bits, shards, templates and processors in files of their own; and their tokens."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

import pytest

pytest.importorskip("mlx_vlm", reason="radixq[vision] is not installed")

from common.errors import ModelNotLoaded, Unsupported
from common.settings import Settings
from tests.test_vision import compare
from tests.vision_engines import SETTINGS, Part, ask, bench_at
from tests.vision_layouts import LAYOUTS, save_layout
from tests.vision_models import digest, picture, png
from worker import doctor
from worker.prepare import prepare
from worker.processor import LEAST_TOKENS, Bounds
from worker.reader import load_tokenizer
from worker.sequence import Finished

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


def test_a_picture_of_a_shape_that_the_processor_refuses_is_named_with_its_shape_and_what_to_do() -> None:
    reader = load_tokenizer(str(saved("Qwen2-VL-2B-Instruct-4bit")))
    strip = picture(4, 3000)
    said = "of 4 x 3,000 pixels, one side 750 times the other; send it in another shape"
    with pytest.raises(Unsupported, match=f"cannot take picture {digest(strip)[:12]} {said}"):
        prepare(ask(strip, "what is this?"), reader, SETTINGS, {digest(strip): png(strip)}.get)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_large_picture_is_shown_with_as_many_pixels_as_the_setting_says(name: str) -> None:
    settings = Settings.from_env({"RADIXQ_MAX_PIXELS": "150000"})
    bounded = load_tokenizer(str(saved(name)), pictures=Bounds.of(settings)).processor
    free = load_tokenizer(str(saved(name)), pictures=Bounds.of(SETTINGS)).processor
    assert free is not None
    assert bounded is not None
    for size in ((700, 700), (1200, 160), (160, 1200)):
        image = picture(*size)
        made = bounded.pixels(digest(image), png(image))
        shown = made.inputs["pixel_values"]
        # Qwen: patches, each twice for time; the others: tiles, of which the last is the whole once more.
        num_pixels = (
            shown.shape[0] * 14 * 14 if name.startswith("Qwen") else shown[0][:-1, 0].size or shown[0][:, 0].size
        )
        assert num_pixels <= 150_000
        assert LEAST_TOKENS <= len(made.ids) == bounded.count(*size) < free.count(*size)
    assert bounded.count(90, 60) == free.count(90, 60) or name.startswith("SmolVLM"), "no smaller than it is"


def test_the_setting_is_to_tokens_and_answers_what_a_smaller_bound_in_the_models_own_files_is(tmp_path: Path) -> None:
    ours, theirs = saved("Qwen2-VL-2B-Instruct-4bit"), tmp_path / "bounded"
    shutil.copytree(ours, theirs)
    file = theirs / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_pixels": 65_536}))
    runs = [bench_at(ours, dtype="float32", pictures=Bounds(shown=65_536)), bench_at(theirs, dtype="float32")]
    asked = [run.prompt(picture(600, 400), "what is this?", max_tokens=4) for run in runs]
    answers = [run.run({"job": prompt})["job"] for run, prompt in zip(runs, asked, strict=True)]
    assert asked[0].tokens.tolist() == asked[1].tokens.tolist()
    assert answers[0] == answers[1]
    used = [event.usage for run in runs if isinstance(event := run.ended["job"], Finished)]
    assert used[0] == used[1]
    assert used[0].prompt_tokens == len(asked[0].tokens) < 150


def test_doctor_says_what_a_photograph_costs_with_the_setting() -> None:
    asked = {"MLX_MODEL_PATH": str(saved("Qwen2-VL-2B-Instruct-4bit"))}
    for more, num_tokens in (({}, "3,834"), ({"RADIXQ_MAX_PIXELS": "1000000"}, "1,230")):
        found = {check.name: check.detail for check in doctor.examine(Settings.from_env(asked | more))}
        assert found["pictures"] == f"taken; 2,000 x 1,500 pixels are {num_tokens} tokens"


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
