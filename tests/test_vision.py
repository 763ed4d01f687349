"""Pictures give the tokens that mlx-vlm gives for each job alone: in any batch and order, cached or not."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mlx_vlm", reason="radixq[vision] is not installed")

from common.errors import ModelNotLoaded, RadixqError, Unsupported
from common.pictures import digest as digest_of
from tests.engines import alone as text_alone
from tests.engines import bench as text_bench
from tests.vision_engines import SETTINGS, Bench, Part, ask, bench, same, saved
from tests.vision_models import FAMILIES, digest, picture, png, save_tiny_vision
from worker import model, platform, processor
from worker.cache import Limits, _cut
from worker.engine import Engine
from worker.prepare import prepare
from worker.probe import reuse
from worker.processor import keys
from worker.radix import Match
from worker.reader import load_tokenizer
from worker.recent import Recent
from worker.sequence import Failed, Finished, Prompt

CAT, DOG, TALL, LARGE, STRIP = (picture(*size, seed) for seed, size in enumerate(
    [(20, 30), (33, 17), (16, 90), (64, 64), (40, 20)]
))  # fmt: skip
JOBS: dict[str, tuple[Part, ...]] = {
    "no picture": ("Hello there, who are you?",),
    "one before": (CAT, "what is this?"),
    "one before, another question": (CAT, "what colour has it, and why do you think so?"),
    "one after": ("what is this?", TALL),
    "two between": ("is", DOG, "in", LARGE, "or not?"),
    "five in a row": (CAT, DOG, TALL, LARGE, STRIP, "which one?"),
    "five apart": ("a", STRIP, "b", TALL, "c", LARGE, "d", CAT, "e", DOG),
    "text only": ("is it so that nothing is shown here at all?",),
}


def compare(engine: Bench, jobs: dict[str, tuple[Part, ...]], got: dict[str, list[int]], suffix: str = "") -> None:
    """Assert that every job has mlx-vlm's tokens."""
    for name, parts in jobs.items():
        theirs, logprobs = engine.alone(*parts)
        assert same(got[name + suffix], theirs, logprobs), f"{name}: {got[name + suffix]} for {theirs}"


@pytest.mark.parametrize("family", FAMILIES)
def test_any_number_of_pictures_gives_mlx_vlms_tokens_in_one_batch_with_text(family: str) -> None:
    engine = bench(family, max_rows=8)
    got = engine.run({name: engine.prompt(*parts) for name, parts in JOBS.items()})
    compare(engine, JOBS, got)
    again = engine.run({f"{name} again": engine.prompt(*parts) for name, parts in JOBS.items()})
    compare(engine, JOBS, again, " again")
    assert engine.engine.stats().vision_runs == 5, "five pictures, each seen once"
    assert len({tuple(tokens) for tokens in got.values()}) == len(JOBS), "no two jobs have one answer"


@pytest.mark.parametrize("chunk", [16, 4096])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("exact", [False, True], ids=["merged", "packed"])
def test_a_chunk_may_end_in_a_picture(rows: int, chunk: int, exact: bool) -> None:
    engine = bench(max_rows=rows, chunk_tokens=chunk, exact=exact)
    compare(engine, JOBS, engine.run({name: engine.prompt(*parts) for name, parts in JOBS.items()}))


def test_under_pressure_for_memory_the_tokens_stay_the_same() -> None:
    engine = bench(kv_bytes=130_000, picture_bytes=10_000)
    for turn in range(3):
        got = engine.run({f"{name} {turn}": engine.prompt(*parts) for name, parts in JOBS.items()})
        compare(engine, JOBS, got, f" {turn}")
    stats = engine.engine.stats()
    assert stats.evicted_nodes > 0
    assert stats.vision_runs > 5, "features that were dropped are computed again"


def test_sixty_four_questions_on_one_picture_see_it_and_compute_it_once() -> None:
    engine = bench(max_rows=8)
    prompts = {str(i): engine.prompt(LARGE, f"question {i:02d}?") for i in range(64)}
    assert len(engine.run(prompts)) == 64
    stats = engine.engine.stats()
    assert stats.vision_runs == 1
    (shown,) = prompts["0"].pictures
    tails = sum(len(prompt.tokens) - shown.stop for prompt in prompts.values())
    assert stats.computed_tokens <= shown.stop + tails
    assert stats.prompt_tokens == stats.cached_tokens + stats.prefill_tokens


# -- pictures that look alike ------------------------------------------------------------------------------------------


def test_pictures_of_one_size_never_meet() -> None:
    engine = bench()
    jobs: dict[str, tuple[Part, ...]] = {f"{seed}": (picture(24, 24, seed), "what is this?") for seed in range(6)}
    got = engine.run({name: engine.prompt(*parts) for name, parts in jobs.items()})
    compare(engine, jobs, got)
    assert len({tuple(tokens) for tokens in got.values()}) == 6
    assert engine.engine.stats().vision_runs == 6


def test_one_pixel_makes_another_picture() -> None:
    engine = bench()
    changed = CAT.copy()
    changed.putpixel((3, 4), (255, 255, 255))
    jobs: dict[str, tuple[Part, ...]] = {"plain": (CAT, "see?"), "changed": (changed, "see?")}
    first, second = (engine.prompt(*parts) for parts in jobs.values())
    assert first.tokens[first.pictures[0].start] != second.tokens[first.pictures[0].start]
    compare(engine, jobs, engine.run({"plain": first, "changed": second}))


def test_order_matters_and_the_same_picture_may_come_twice() -> None:
    engine = bench()
    jobs: dict[str, tuple[Part, ...]] = {
        "ab": (CAT, DOG, "compare"),
        "ba": (DOG, CAT, "compare"),
        "aa": (CAT, CAT, "compare"),
        "a": (CAT, "compare"),
    }
    got = engine.run({name: engine.prompt(*parts) for name, parts in jobs.items()})
    compare(engine, jobs, got)
    assert len({tuple(tokens) for tokens in got.values()}) == 4
    assert engine.engine.stats().vision_runs == 2


def test_two_encodings_of_the_same_pixels_are_one_picture() -> None:
    engine = bench()
    file = BytesIO()
    CAT.save(file, "PNG", compress_level=0)
    again = Image.open(BytesIO(file.getvalue()))
    assert file.getvalue() != png(CAT)
    assert np.array_equal(engine.prompt(CAT, "a").tokens, engine.prompt(again, "a").tokens)


def twins() -> tuple[Image.Image, Image.Image]:
    """Find two pictures whose keys begin alike: 31 bits of their digests agree."""
    seen: dict[int, int] = {}
    base = np.random.default_rng(0).integers(0, 255, 16 * 16 * 3, np.uint8)

    def pixels(number: int) -> np.ndarray:
        return (base ^ np.resize(np.frombuffer(number.to_bytes(4, "big"), np.uint8), base.shape)).reshape(16, 16, 3)

    for number in range(1_000_000):
        name = digest_of(16, 16, pixels(number).tobytes())
        first = int(name[:8], 16) & 0x7FFFFFFF
        if first in seen:
            return Image.fromarray(pixels(seen[first])), Image.fromarray(pixels(number))
        seen[first] = number
    raise AssertionError("no two pictures with the same 31 bits")


def test_pictures_made_to_begin_alike_do_not_meet_either() -> None:
    one, other = twins()
    engine = bench()
    first, second = engine.prompt("see", one, "what?"), engine.prompt("see", other, "what?")
    start = first.pictures[0].start
    assert first.tokens[start] == second.tokens[start]
    assert first.tokens[start + 1] != second.tokens[start + 1]
    jobs: dict[str, tuple[Part, ...]] = {"one": ("see", one, "what?"), "other": ("see", other, "what?")}
    got = engine.run({"one": first})
    got |= engine.run({"other": second, "third": engine.prompt("see", other, "or what else?")})
    compare(engine, jobs, got)
    assert got["one"] != got["other"]


def test_nothing_is_found_up_to_the_middle_of_a_picture() -> None:
    engine = bench()
    prompt = engine.prompt("see", LARGE, "what?")
    (shown,) = prompt.pictures
    depths = range(len(prompt.tokens) + 1)
    assert [prompt.whole(depth) for depth in depths] == [
        shown.start if shown.start < depth < shown.stop else depth for depth in depths
    ]
    branched = replace(prompt, branches=(shown.start + 17, shown.stop - 1))
    engine.run({"branched": branched})
    ends = {node.end for node in engine.engine.cache.tree.nodes()}
    assert not ends & set(range(shown.start + 1, shown.stop))


def test_keys_are_31_bits_of_the_digest_each_and_never_a_token() -> None:
    name = digest(CAT)
    made = keys(name, 20)
    assert made.dtype == np.int32
    assert (made < 0).all()
    assert (
        made[:8].tolist()
        == made[8:16].tolist()
        == [-1 - (int(name[at : at + 8], 16) & 0x7FFFFFFF) for at in range(0, 64, 8)]
    )


# -- what fails --------------------------------------------------------------------------------------------------------


def failed(engine: Bench, job_id: str) -> RadixqError:
    event = engine.ended[job_id]
    assert isinstance(event, Failed)
    return event.error


def test_a_picture_that_is_gone_or_another_one_fails_its_jobs_alone() -> None:
    engine = bench()
    jobs: dict[str, tuple[Part, ...]] = {"good": (CAT, "what is this?"), "text": ("Hello there",)}
    gone = engine.prompt(DOG, "what is this?")
    swapped = engine.prompt(TALL, "what is this?")
    bad = {
        "gone": replace(gone, pictures=(replace(gone.pictures[0], data=None),)),
        "gone too": replace(gone, pictures=(replace(gone.pictures[0], data=None),)),
        "swapped": replace(swapped, pictures=(replace(swapped.pictures[0], data=png(LARGE)),)),
        "torn": replace(swapped, pictures=(replace(swapped.pictures[0], data=png(TALL)[:200]),)),
    }
    got = engine.run({"good": engine.prompt(*jobs["good"]), **bad, "text": engine.prompt(*jobs["text"])})
    compare(engine, jobs, got)
    assert {name: failed(engine, name).code for name in bad} == dict.fromkeys(bad, "image_unreadable")
    assert "is not in Redis" in str(failed(engine, "gone"))
    assert "other pixels" in str(failed(engine, "swapped"))


def test_an_engine_that_sees_nothing_refuses_a_picture() -> None:
    made = bench().prompt(CAT, "what is this?")
    plain = text_bench()
    plain.engine.add("picture", Prompt(made.tokens, made.sampling, pictures=made.pictures))
    events = [event for _ in range(4) for event in plain.engine.step()]
    (event,) = events
    assert isinstance(event, Failed)
    assert isinstance(event.error, Unsupported)


def test_a_family_whose_pictures_are_more_than_embeddings_serves_text_and_says_why() -> None:
    engine = bench("qwen3_vl")
    assert engine.loaded.processor is None
    assert any("no pictures" in note for note in engine.loaded.notes)
    got = engine.run({"text": engine.prompt("Hello"), "picture": engine.prompt(CAT, "what is this?")})
    assert list(got) == ["text"]
    assert failed(engine, "picture").code == "unsupported"


def test_a_model_that_keeps_more_than_plain_kv_serves_text_and_says_why() -> None:
    path = str(saved("gemma3"))
    loaded, reader = model.load(path, device=platform.device()), load_tokenizer(path)
    assert loaded.processor is None
    assert loaded.notes == (f"no pictures: {loaded.blind}",)
    assert "RotatingKVCache" in loaded.blind
    asked = prepare(ask(CAT, "what is this?"), reader, SETTINGS, {digest(CAT): png(CAT)}.get)
    engine = Engine(loaded, Limits(4, 32, 1 << 28), exact=False, reuse=reuse(loaded.model, loaded.context_length))
    engine.add("picture", asked.showing({digest(CAT): png(CAT)}))
    engine.add("text", prepare(ask("Hello"), reader, SETTINGS))
    ended = {event.id: event for _ in range(60) for event in engine.step() if isinstance(event, Finished | Failed)}
    assert isinstance(ended["text"], Finished)
    refusal = ended["picture"]
    assert isinstance(refusal, Failed)
    assert isinstance(refusal.error, Unsupported)
    assert str(refusal.error) == f"gemma3 takes no pictures here: {loaded.blind}"


@pytest.mark.parametrize("way", ["model_file", "auto_map"])
def test_no_code_of_a_model_directory_is_run(tmp_path: Path, way: str) -> None:
    directory = save_tiny_vision(tmp_path / "trap")
    (directory / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\n")
    changed = directory / ("config.json" if way == "model_file" else "tokenizer_config.json")
    named = {"model_file": "trap.py"} if way == "model_file" else {"auto_map": {"AutoTokenizer": ["trap.T", "trap.T"]}}
    content = json.loads(changed.read_text()) | named
    content.pop("tokenizer_class", None)
    changed.write_text(json.dumps(content))
    with contextlib.suppress(ModelNotLoaded):
        model.load(str(directory), device=platform.device())
    with contextlib.suppress(ModelNotLoaded):
        processor.load(directory, json.loads((directory / "config.json").read_text()), "trap", processor.Bounds())
    assert not (tmp_path / "sprung").exists()


@pytest.fixture
def not_installed() -> Iterator[None]:
    """Hide mlx-vlm from imports, once it has written the model."""
    saved("qwen2_vl")
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "mlx_vlm"}
    sys.modules["mlx_vlm"] = None  # type: ignore[assignment]
    yield
    del sys.modules["mlx_vlm"]
    sys.modules.update(hidden)


def test_without_the_extra_a_vision_model_reads_text_and_says_what_to_install(not_installed: None) -> None:
    path = str(saved("qwen2_vl"))
    loaded, reader = model.load(path, device=platform.device()), load_tokenizer(path)
    assert loaded.processor is None
    assert any("radixq[vision]" in note for note in loaded.notes)
    assert prepare(ask("Hello"), reader, SETTINGS).tokens.size
    with pytest.raises(Unsupported, match=r"radixq\[vision\]"):
        prepare(ask("Hello", CAT), reader, SETTINGS)


@pytest.mark.parametrize("family", ["qwen2_vl"])
def test_text_has_the_tokens_that_mlx_lm_gives_it_without_the_extra(family: str) -> None:
    import mlx_lm

    engine = bench(family)
    twin = mlx_lm.load(str(saved(family)))[0]
    texts = {str(i): (f"question {i} " * (i + 1),) for i in range(8)}
    prompts = {name: engine.prompt(*parts) for name, parts in texts.items()}
    got = engine.run({**prompts, "beside": engine.prompt(CAT, "what is this?")})
    for name, prompt in prompts.items():
        theirs, logprobs = text_alone(twin, prompt.tokens, 12)
        assert same(got[name], theirs, logprobs), name


# -- what is kept ------------------------------------------------------------------------------------------------------


def test_features_are_kept_within_their_bytes() -> None:
    one = 8 * 64 * 4  # tokens, width, bytes
    engine = bench(picture_bytes=3 * one)
    for seed in range(6):
        engine.run({str(seed): engine.prompt(picture(24, 24, seed), "what is this?")})
        assert engine.engine.stats().vision_bytes <= 3 * one


def test_what_was_used_longest_ago_goes_first() -> None:
    recent: Recent[str] = Recent(10)
    recent.put("a", "A", 4)
    recent.put("b", "B", 4)
    assert recent.get("a") == "A"
    recent.put("c", "C", 4)
    assert [recent.get(name) for name in "abc"] == ["A", None, "C"]
    recent.put("whale", "W", 50)
    assert [recent.get(name) for name in ("a", "c", "whale")] == [None, None, "W"]
    assert recent.nbytes == 50


def test_a_shorter_match_lies_on_the_same_way() -> None:
    engine = bench()
    engine.run({"1": engine.prompt(CAT, "what is this?"), "2": engine.prompt(CAT, "what is that?")})
    prompt = engine.prompt(CAT, "what is this?")
    found = engine.engine.cache.tree.match(prompt.tokens)
    for length in range(1, found.length + 1):
        cut: Match[Any] = _cut(found, length)
        assert cut.length == length
        assert cut.node.start < length <= cut.node.end
