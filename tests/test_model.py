"""Loading: what a directory, a hub id or a file becomes, and the sentence for each way it can fail."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from common.errors import ModelNotLoaded
from tests.models import EOS, parameters, save_tiny
from worker import model, platform
from worker.reader import load_tokenizer

CPU = replace(platform.device(), kind="cpu", total_memory_bytes=16 * 10**9)
METAL = replace(CPU, kind="metal")
IDS = mx.array([[5, 250, 17, 3, 99, 260, 31, 8]])


def largest_difference(one: mx.array, two: mx.array) -> float:
    return float(np.abs(np.array(one.astype(mx.float32)) - np.array(two.astype(mx.float32))).max())


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "mistral", "gemma", "phi3"])
def test_a_directory_computes_exactly_what_mlx_lm_computes_with_it(tmp_path: Path, arch: str) -> None:
    loaded = model.load(str(save_tiny(tmp_path / "tiny", arch)), device=CPU)
    original: Any = mlx_lm.load(str(tmp_path / "tiny"))[0]
    assert largest_difference(loaded.model(IDS), original(IDS)) == 0
    assert (loaded.name, loaded.dtype, loaded.vocab_size, loaded.num_layers) == ("tiny", "float32", 300, 2)
    assert (loaded.context_length, loaded.cache_kind, loaded.notes) == (4096, "plain", ())
    assert loaded.eos_token_ids == {EOS}


def test_the_tokenizer_is_the_one_that_was_saved(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "tiny")
    tokenizer: Any = model.load(str(directory), device=CPU).tokenizer
    assert tokenizer.decode(tokenizer.encode("in the 🙂 end")) == "in the 🙂 end"
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert rendered == "<|im_start|>user\na<|im_end|>\n"


# -- dtype -------------------------------------------------------------------------------------------------------------


def test_on_the_cpu_quantised_weights_are_unpacked_to_float32(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "tiny", bits=4)
    loaded: Any = model.load(str(directory), device=CPU)
    quantised: Any = mlx_lm.load(str(directory))[0]
    assert loaded.dtype == "float32"
    assert "scales" not in loaded.model.layers[0].self_attn.q_proj
    assert largest_difference(loaded.model(IDS), quantised(IDS)) < 1e-4


def test_on_metal_weights_stay_as_stored(tmp_path: Path) -> None:
    loaded: Any = model.load(str(save_tiny(tmp_path / "tiny", bits=4)), device=METAL)
    assert "scales" in loaded.model.layers[0].self_attn.q_proj


def test_weights_stay_quantised_and_say_so_where_float32_takes_more_than_half_of_the_memory(tmp_path: Path) -> None:
    directory = str(save_tiny(tmp_path / "tiny", bits=4))
    full: Any = model.load(directory, device=CPU).model
    num_bytes = sum(array.nbytes for array in parameters(full).values())
    enough = replace(CPU, total_memory_bytes=2 * num_bytes)
    assert model.load(directory, device=enough).notes == ()
    tight = replace(CPU, total_memory_bytes=2 * num_bytes - 2)
    loaded: Any = model.load(directory, device=tight)
    assert "scales" in loaded.model.layers[0].self_attn.q_proj
    assert "more than half of the memory" in loaded.notes[0]
    assert model.load(directory, dtype="float32", device=tight).notes == ()


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("device", [CPU, METAL])
def test_a_named_dtype_wins_everywhere(tmp_path: Path, name: str, device: platform.DeviceInfo) -> None:
    loaded = model.load(str(save_tiny(tmp_path / "tiny", bits=8)), dtype=name, device=device)
    assert loaded.dtype == name
    assert {str(array.dtype) for array in parameters(loaded.model).values()} == {f"mlx.core.{name}"}


# -- what is measured --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "itemsize"), [("float32", 4), ("bfloat16", 2)])
def test_bytes_per_token_are_those_that_the_cache_holds(tmp_path: Path, name: str, itemsize: int) -> None:
    directory = save_tiny(tmp_path / "tiny", num_hidden_layers=3, num_key_value_heads=2, head_dim=24)
    loaded = model.load(str(directory), dtype=name, device=CPU)
    assert loaded.kv_bytes_per_token == 3 * 2 * 2 * 24 * itemsize


def test_measuring_leaves_no_memory_behind(held_bytes: Callable[[], int], tmp_path: Path) -> None:
    before = held_bytes()
    loaded = model.load(str(save_tiny(tmp_path / "tiny")), device=CPU)
    weights = sum(array.nbytes for array in parameters(loaded.model).values())
    assert mx.get_cache_memory() == 0
    assert held_bytes() - before - weights < 4096  # a cache of one token would be 65,536


def test_caches_that_are_not_plain_are_named(tmp_path: Path) -> None:
    layers: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32}
    loaded = model.load(str(save_tiny(tmp_path / "tiny", **layers)), device=CPU)
    assert loaded.cache_kind == "KVCache, RotatingKVCache"


def test_all_arrays_are_evaluated_so_that_another_thread_may_compute(tmp_path: Path) -> None:
    loaded, seen = model.load(str(save_tiny(tmp_path / "tiny", bits=4)), device=CPU), []
    thread = threading.Thread(target=lambda: seen.append(mx.argmax(loaded.model(IDS)[0, -1]).item()))
    thread.start()
    thread.join()
    assert seen == [mx.argmax(loaded.model(IDS)[0, -1]).item()]


def test_the_digest_names_content_and_not_place(tmp_path: Path) -> None:
    one = save_tiny(tmp_path / "one")
    same = shutil.copytree(one, tmp_path / "same")
    other = save_tiny(tmp_path / "other", seed=1)
    retemplated = shutil.copytree(one, tmp_path / "retemplated")
    edit(retemplated / "config.json", rope_theta=20_000.0)
    digests = [model.load(str(path), device=CPU).digest for path in (one, same, other, retemplated)]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_the_digest_sees_both_ends_of_a_large_file(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "tiny", intermediate_size=4096)
    weights = directory / "model.safetensors"
    whole = weights.read_bytes()
    assert len(whole) > 4 * 2**20
    changed_head = whole.replace(b'"mlx"', b'"MLX"', 1)  # the format in the header, which nobody checks
    changed_tail = whole[:-1] + bytes([whole[-1] ^ 1])
    digests = set()
    for content in (whole, changed_head, changed_tail):
        weights.write_bytes(content)
        digests.add(model.load(str(directory), device=CPU).digest)
    assert len(digests) == 3


# -- the tokenizer alone -----------------------------------------------------------------------------------------------


def test_the_tokenizer_alone_is_the_same_and_needs_no_weights(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "tiny")
    whole = model.load(str(directory), device=CPU)
    (directory / "model.safetensors").unlink()
    alone = load_tokenizer(str(directory))
    text = "in the <|im_start|>end 🙂"
    assert alone.tokenizer.encode(text) == whole.tokenizer.encode(text)
    assert (alone.name, alone.context_length, alone.eos_token_ids) == (
        whole.name, whole.context_length, whole.eos_token_ids
    )  # fmt: skip


# -- errors ------------------------------------------------------------------------------------------------------------


def edit(path: Path, **values: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    content = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


BREAKAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda at: (at / "config.json").unlink(), r"has no config\.json: a model directory holds"),
    "config cut off": (lambda at: (at / "config.json").write_text('{"model_'), r"cannot read .*config\.json"),
    "config is a list": (lambda at: (at / "config.json").write_text("[]"), r"cannot read .*config\.json"),
    "no type": (lambda at: edit(at / "config.json", model_type=None), "has no model_type"),
    "unknown type": (lambda at: edit(at / "config.json", model_type="hal9000"), "'hal9000'.* does not know; see what"),
    "missing key": (lambda at: edit(at / "config.json", hidden_size=None), "cannot load the weights.*hidden_size"),
    "own code": (lambda at: edit(at / "config.json", model_file="evil.py"), "custom module"),
    "no context": (lambda at: edit(at / "config.json", max_position_embeddings=None), "names no context length"),
    "no weights": (lambda at: (at / "model.safetensors").unlink(), r"has no model\*\.safetensors"),
    "weights cut off": (lambda at: cut(at / "model.safetensors"), "cannot load the weights.*download it again"),
    "weights no tensors": (lambda at: (at / "model.safetensors").write_text("x" * 99), "cannot load the weights"),
    "other weights": (lambda at: edit(at / "config.json", num_hidden_layers=3), "cannot load the weights"),
    "other heads": (lambda at: edit(at / "config.json", num_attention_heads=3), "cannot"),
    "no tokenizer": (lambda at: (at / "tokenizer.json").unlink(), "has no tokenizer"),
    "tokenizer cut off": (lambda at: cut(at / "tokenizer.json"), "cannot load the tokenizer"),
    "tokenizer is a list": (lambda at: (at / "tokenizer.json").write_text("{}"), "cannot load the tokenizer"),
    "no template": (lambda at: remove_template(at), "no chat template.*chat_template.jinja"),
}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove_template(directory: Path) -> None:
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    edit(directory / "tokenizer_config.json", chat_template=None)


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_broken_directory_is_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    breakage, reason = BREAKAGES[name]
    directory = save_tiny(tmp_path / "tiny")
    breakage(directory)
    with pytest.raises(ModelNotLoaded, match=reason) as caught:
        model.load(str(directory), device=CPU)
    assert len(str(caught.value)) < 800
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["/nowhere/model", "./nowhere", "nowhere", "nowhere.gguf", "a/b/c"])
def test_a_path_that_does_not_exist_is_refused(path: str) -> None:
    with pytest.raises(ModelNotLoaded, match=f"MLX_MODEL_PATH='{path}' does not exist: give a directory"):
        model.load(path, device=CPU)


def test_a_hub_id_that_cannot_be_fetched_is_refused_with_both_explanations() -> None:
    with pytest.raises(ModelNotLoaded, match="'nobody/nothing' is neither a path that exists nor a model that could"):
        model.load("nobody/nothing", device=CPU)


def test_a_directory_around_a_gguf_file_points_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "some.gguf").touch()
    with pytest.raises(ModelNotLoaded, match=f"set MLX_MODEL_PATH={tmp_path}/some.gguf"):
        model.load(str(tmp_path), device=CPU)
