"""GGUF files: tensors and vocabularies come out as other programs read them; what is not supported is named."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import sentencepiece

from common.errors import ModelNotLoaded
from tests import models
from worker import gguf, model, platform

REFERENCE = json.loads((Path(__file__).parent / "reference" / "smollm2.json").read_text(encoding="utf-8"))
_TO_GGUF = {mlx: name for name, mlx in {**gguf._GLOBAL_NAMES, **gguf._LAYER_NAMES}.items()}
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
Packing = Callable[[np.ndarray[Any, Any]], tuple[int, bytes, np.ndarray[Any, Any]]]


# -- packings, written down from the block layouts of ggml: (type number, blocks, the values they stand for) ----------


def f16(values: np.ndarray[Any, Any]) -> tuple[int, bytes, np.ndarray[Any, Any]]:
    half = values.astype(np.float16)
    return 1, half.tobytes(), half.astype(np.float32)


def q8_0(values: np.ndarray[Any, Any]) -> tuple[int, bytes, np.ndarray[Any, Any]]:
    blocks = values.reshape(-1, 32)
    scale = (np.abs(blocks).max(1, keepdims=True) / 127).astype(np.float16)
    codes = np.clip(np.round(blocks / scale.astype(np.float32)), -127, 127).astype(np.int8)
    raw = np.concatenate([scale.view(np.uint8), codes.view(np.uint8)], 1)
    return 8, raw.tobytes(), (codes * scale.astype(np.float32)).reshape(values.shape)


def q4_0(values: np.ndarray[Any, Any]) -> tuple[int, bytes, np.ndarray[Any, Any]]:
    blocks = values.reshape(-1, 32)
    scale = (np.abs(blocks).max(1, keepdims=True) / 7).astype(np.float16)
    codes = np.clip(np.round(blocks / scale.astype(np.float32)) + 8, 0, 15).astype(np.uint8)
    raw = np.concatenate([scale.view(np.uint8), codes[:, :16] | codes[:, 16:] << 4], 1)
    return 2, raw.tobytes(), ((codes - 8.0) * scale.astype(np.float32)).reshape(values.shape)


def q4_1(values: np.ndarray[Any, Any]) -> tuple[int, bytes, np.ndarray[Any, Any]]:
    blocks = values.reshape(-1, 32)
    low = blocks.min(1, keepdims=True).astype(np.float16)
    scale = ((blocks.max(1, keepdims=True) - low) / 15).astype(np.float16)
    codes = np.clip(np.round((blocks - low) / scale.astype(np.float32)), 0, 15).astype(np.uint8)
    raw = np.concatenate([scale.view(np.uint8), low.view(np.uint8), codes[:, :16] | codes[:, 16:] << 4], 1)
    return 3, raw.tobytes(), (codes * scale.astype(np.float32) + low.astype(np.float32)).reshape(values.shape)


def permuted(rows: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """Reorder rows as llama.cpp's converter does: the two halves of every head are interleaved."""
    half = rows.shape[0] // num_heads // 2
    order = [head * 2 * half + part * half + at for head in range(num_heads) for at in range(half) for part in (0, 1)]
    return rows[order]


def llama_file(
    path: Path,
    packing: Packing = f16,
    *,
    tied: bool = False,
    extra: Mapping[str, models.RawTensor] | None = None,
    **metadata: Any,
) -> tuple[Path, Any]:
    """Write a tiny llama as GGUF; return it with the mlx-lm model of exactly the values in the file."""
    twin = models.tiny("llama", tie_word_embeddings=tied)
    heads = {"attn_q": twin.args.num_attention_heads, "attn_k": twin.args.num_key_value_heads}
    tensors, weights = dict(extra or {}), []
    for name, value in models.parameters(twin).items():
        head, _, kind = name.rpartition(".")
        layer, _, part = head.removeprefix("model.layers.").partition(".")
        short = _TO_GGUF[part] if "layers" in head else _TO_GGUF[head]
        number, raw, stands_for = packing(np.array(value)) if value.ndim > 1 else (0, b"", np.array(value))
        if value.ndim == 1:
            raw = np.array(value).tobytes()
        elif short in heads:
            number, raw, _ = packing(permuted(np.array(value), heads[short]))
        tensors[f"blk.{layer}.{short}.{kind}" if "layers" in head else f"{short}.{kind}"] = (number, value.shape, raw)
        weights.append((name, mx.array(stands_for)))
    twin.load_weights(weights)
    return models.write_gguf(path, {**tiny_facts(), **metadata}, tensors), twin


def tiny_facts() -> dict[str, Any]:
    """Return the metadata of a tiny llama with the vocabulary of `tiny_tokenizer`."""
    tokenizer = json.loads(models.tiny_tokenizer().backend_tokenizer.to_str())
    vocabulary = {**tokenizer["model"]["vocab"], **{one["content"]: one["id"] for one in tokenizer["added_tokens"]}}
    special = {one["id"]: _CONTROL if one["special"] else _USER_DEFINED for one in tokenizer["added_tokens"]}
    return {
        "general.architecture": "llama",
        "llama.context_length": 4096,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 128,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-6,
        "llama.rope.dimension_count": 16,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": sorted(vocabulary, key=lambda token: vocabulary[token]),
        "tokenizer.ggml.token_type": [special.get(at, _NORMAL) for at in range(len(vocabulary))],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in tokenizer["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": models.EOS,
        "tokenizer.chat_template": models.CHAT_TEMPLATE,
    }


def largest_difference(one: mx.array, two: mx.array) -> float:
    return float(np.abs(np.array(one.astype(mx.float32)) - np.array(two)).max())


def load(path: Path, dtype: str | None = "float32") -> model.LoadedModel:
    return model.load(str(path), dtype=dtype, device=platform.device())


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [f16, q8_0, q4_0, q4_1])
@pytest.mark.parametrize("tied", [True, False])
def test_a_file_computes_what_its_values_compute_in_mlx_lm(tmp_path: Path, packing: Packing, tied: bool) -> None:
    path, twin = llama_file(tmp_path / "tiny.gguf", packing, tied=tied)
    ids = mx.array([[5, 250, 17, 3, 99, 260, 31, 8]])
    # float32 rounding stays below; a wrong order of rows gives differences above 1
    assert largest_difference(load(path).model(ids), twin(ids)) < 1e-4


def test_the_rope_factors_of_llama_3_give_its_scaled_rope(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    wave_lengths = 2 * np.pi * 10_000.0 ** (np.arange(0, 16, 2) / 16)
    smooth = np.clip((64 / wave_lengths - 1) / 3, 0, 1)
    factors = (1 / ((1 - smooth) / 8 + smooth)).astype(np.float32)  # the published formula of Llama 3.1
    path, twin = llama_file(tmp_path / "tiny.gguf", extra={"rope_freqs.weight": (0, (8,), factors.tobytes())})
    scaled = models.tiny("llama", rope_scaling=scaling)
    scaled.load_weights(list(models.parameters(twin).items()))
    ids = mx.array([np.random.default_rng(0).integers(0, 300, 200).tolist()])
    assert largest_difference(load(path).model(ids), scaled(ids)) < 1e-3
    assert largest_difference(twin(ids), scaled(ids)) > 0.1


def test_as_stored_the_file_stays_quantised_and_computes_in_half_precision(tmp_path: Path) -> None:
    path, twin = llama_file(tmp_path / "tiny.gguf", q8_0)
    loaded, ids = load(path, "stored"), mx.array([[5, 250, 17, 3]])
    assert loaded.dtype == "float16"
    assert "scales" in loaded.model.layers[0].self_attn.q_proj
    assert largest_difference(loaded.model(ids), twin(ids)) < 0.2


def test_the_file_name_without_its_ending_names_the_model(tmp_path: Path) -> None:
    path, _ = llama_file(tmp_path / "Tiny-1.0.Q8_0.gguf")
    loaded = load(path)
    assert (loaded.name, loaded.context_length, loaded.eos_token_ids) == (
        "Tiny-1.0.Q8_0",
        4096,
        frozenset({models.EOS}),
    )


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"general.architecture": "gemma3"}, "architecture 'gemma3'; supported are llama-family"),
        ({"llama.rope.scaling.type": "yarn"}, "scales RoPE by 'yarn'"),
        ({"llama.attention.head_count_kv": [2, 1]}, "layers of different widths"),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"llama.rope.dimension_count": 8}, "only a part of each head"),
        ({"tokenizer.ggml.pre": "chameleon"}, "'chameleon'.*known are gpt-2"),
        ({"tokenizer.ggml.model": "t5"}, "kind 't5'; supported are 'gpt2' and 'llama'"),
        ({"tokenizer.chat_template": ""}, "no chat template"),
        ({"tokenizer.ggml.eos_token_id": 999}, "part of its tokenizer"),
        ({"llama.block_count": 3}, "do not fit a llama model"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path: Path, metadata: dict[str, Any], reason: str) -> None:
    path, _ = llama_file(tmp_path / "tiny.gguf", **metadata)
    with pytest.raises(ModelNotLoaded, match=f"(?s){reason}"):
        load(path)


@pytest.mark.parametrize(("number", "name"), [(12, "Q4_K"), (7, "Q5_1"), (30, "BF16"), (77, "number 77")])
def test_another_quantisation_is_refused_by_name(tmp_path: Path, number: int, name: str) -> None:
    tensors = {"output.weight": (number, (64, 256), bytes(64 * 256))}
    path = models.write_gguf(tmp_path / "tiny.gguf", tiny_facts(), tensors)
    with pytest.raises(ModelNotLoaded, match=rf"output\.weight has type {name}; supported are .* Q4_1"):
        load(path)


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    path, _ = llama_file(tmp_path / "tiny.gguf")
    whole = path.read_bytes()
    for length in (0, 3, 20, 500, len(whole) // 2, len(whole) - 64):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelNotLoaded, match="download it again"):
            load(path)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.gguf").write_text("these are notes, not a model" * 10)
    with pytest.raises(ModelNotLoaded, match="not a readable GGUF file"):
        load(tmp_path / "notes.gguf")


# -- vocabularies ------------------------------------------------------------------------------------------------------


def test_control_tokens_are_whole_and_special_user_defined_ones_whole_and_shown(tmp_path: Path) -> None:
    path = models.write_gguf(tmp_path / "tiny.gguf", tiny_facts(), {})
    tokenizer: Any = gguf.load_tokenizer(gguf.read_header(path), path)
    twin: Any = models.tiny_tokenizer()
    text = "<|im_start|>user\n in the<note> end<|im_end|>"
    ids = tokenizer.encode(text)
    assert ids == twin.encode(text)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\n in the<note> end"
    messages = [{"role": "user", "content": "hi"}]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert rendered == twin.apply_chat_template(messages, add_generation_prompt=True)


@pytest.mark.parametrize(
    ("words", "pieces"),
    [
        ("gpt-2", ["It", "'s", "Ġ1234", "!!", "Ċ", "Ġx"]),
        ("smollm", ["It", "'s", "Ġ", "1", "2", "3", "4", "!!", "Ċ", "Ġx"]),
        ("llama-bpe", ["It", "'s", "Ġ", "123", "4", "!!Ċ", "Ġx"]),
        ("qwen2", ["It", "'s", "Ġ", "1", "2", "3", "4", "!!Ċ", "Ġx"]),
    ],
)
def test_text_is_cut_into_words_by_the_rules_that_the_file_names(tmp_path: Path, words: str, pieces: list[str]) -> None:
    path = models.write_gguf(tmp_path / "tiny.gguf", {**tiny_facts(), "tokenizer.ggml.pre": words}, {})
    tokenizer = gguf.load_tokenizer(gguf.read_header(path), path)
    cut = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("It's 1234!!\n x")
    assert [piece for piece, _ in cut] == pieces


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_vocabulary_gives_the_ids_of_sentencepiece(tmp_path: Path, prefix: bool) -> None:
    trained = io.BytesIO()
    lines = REFERENCE["paragraph"]["text"].split(". ") + [one["text"].strip() for one in REFERENCE["texts"]]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=trained, model_type="bpe", vocab_size=420, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=prefix,
        hard_vocab_limit=False, minloglevel=2, character_coverage=0.98,
    )  # fmt: skip
    original = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    pieces = range(original.get_piece_size())
    tests = (original.is_unknown, original.is_control, original.is_byte)  # kinds 2, 3 and 6; else 1
    kinds = [next((kind for kind, test in zip((2, 3, 6), tests, strict=True) if test(at)), 1) for at in pieces]
    facts = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [original.id_to_piece(at) for at in pieces],
        "tokenizer.ggml.scores": [float(original.get_score(at)) for at in pieces],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": original.bos_id(),
        "tokenizer.ggml.eos_token_id": original.eos_id(),
        "tokenizer.ggml.unknown_token_id": original.unk_id(),
        "tokenizer.ggml.add_space_prefix": prefix,
        "llama.context_length": 64,
    }
    path = models.write_gguf(tmp_path / "tiny.gguf", facts, {})
    tokenizer = gguf.load_tokenizer(gguf.read_header(path), path)
    for text in [*lines, "unseen words: Ωmega 🙂 7%", "  two  spaces "]:
        ids = original.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        assert tokenizer.encode(text) == [original.bos_id(), *ids]
        assert tokenizer.decode(ids) == text


# -- SmolLM2 against llama.cpp -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2() -> model.LoadedModel:
    return load(models.smollm2_path())


def perplexity(loaded: model.LoadedModel, text: str) -> float:
    ids = mx.array([loaded.tokenizer.encode(text, add_special_tokens=False)])
    logits = loaded.model(ids[:, :-1])
    chosen = mx.take_along_axis(logits, ids[:, 1:, None], axis=-1)[..., 0] - mx.logsumexp(logits, axis=-1)
    return math.exp(-float(np.array(chosen).mean()))


def test_smollm2_token_ids_equal_those_of_llama_cpp(smollm2: model.LoadedModel) -> None:
    for one in REFERENCE["texts"]:
        assert smollm2.tokenizer.encode(one["text"], add_special_tokens=False) == one["ids"], one["text"]
        assert smollm2.tokenizer.decode(one["ids"]) == one["text"]


def test_smollm2_chat_renders_as_in_llama_cpp(smollm2: model.LoadedModel) -> None:
    chat, tokenizer = REFERENCE["chat"], cast(Any, smollm2.tokenizer)
    rendered = tokenizer.apply_chat_template(chat["messages"], add_generation_prompt=True)
    assert rendered == chat["ids"]
    assert tokenizer.decode(rendered) == chat["prompt"]


def test_smollm2_continues_as_in_llama_cpp(smollm2: model.LoadedModel) -> None:
    for one in REFERENCE["next"]:
        logits = smollm2.model(mx.array([smollm2.tokenizer.encode(one["prompt"])]))[0, -1]
        log_probabilities = logits - mx.logsumexp(logits)
        for token, text, expected in one["top"]:
            # llama.cpp rounds activations to 8 bits before it multiplies them with 4-bit weights
            assert log_probabilities[token].item() == pytest.approx(expected, abs=0.15), (one["prompt"], text)
    assert REFERENCE["next"][0]["top"][0][1] == " Paris"


def test_smollm2_knows_the_capital_of_france(smollm2: model.LoadedModel) -> None:
    question: Any = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = cast(Any, smollm2.tokenizer).apply_chat_template(question, add_generation_prompt=True)
    generate: Any = mlx_lm.generate
    assert "Paris" in generate(smollm2.model, smollm2.tokenizer, prompt, max_tokens=12)
    assert generate(smollm2.model, smollm2.tokenizer, "The capital of France is", max_tokens=2).endswith("Paris.")


def test_smollm2_perplexity_is_that_of_llama_cpp(smollm2: model.LoadedModel) -> None:
    text, expected = REFERENCE["paragraph"]["text"], REFERENCE["paragraph"]["perplexity"]
    assert perplexity(smollm2, text) == pytest.approx(expected, rel=0.02)


def test_a_wrong_order_of_rows_would_ruin_the_perplexity_of_smollm2() -> None:
    wrong: Any = load(models.smollm2_path())
    for layer in wrong.model.layers:
        for projection, num_heads in ((layer.self_attn.q_proj, 9), (layer.self_attn.k_proj, 3)):
            projection.weight = mx.array(permuted(np.array(projection.weight), num_heads))  # as the file has them
    expected = REFERENCE["paragraph"]["perplexity"]
    assert perplexity(wrong, REFERENCE["paragraph"]["text"]) > 3 * expected
