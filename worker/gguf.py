"""Turn a llama-family `.gguf` file into an mlx-lm model, a tokenizer and a config.

Knows no Redis, no settings and no dtype policy: weights come back as the file stores them. The header is read here,
byte by byte, and checked against the size of the file before MLX maps it, because MLX trusts it.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.quantized import quantize
from mlx_lm.models import llama
from mlx_lm.models.rope_utils import Llama3RoPE
from mlx_lm.tokenizer_utils import (
    BPEStreamingDetokenizer,
    SPMStreamingDetokenizer,
    StreamingDetokenizer,
    TokenizerWrapper,
)
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from common.errors import ModelNotLoaded

_SUPPORTED = "supported are llama-family files whose tensors are F32, F16, Q4_0, Q4_1, Q8_0 or Q6_K"
# id in the file: name, values per block, bytes per block
_TENSOR_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 8: ("Q8_0", 32, 34),
    14: ("Q6_K", 256, 210),  # the output matrix of most Q4_0 files; MLX unpacks it to float16
}  # fmt: skip
_OTHER_TYPES = {
    6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 15: "Q8_K",
    20: "IQ4_NL", 23: "IQ4_XS", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_GROUP = 32  # values that share one scale, in every quantisation supported here

_GLOBAL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # kinds of token


@dataclass(frozen=True, slots=True)
class Header:
    """What a GGUF file says about itself."""

    metadata: dict[str, Any]
    tensors: dict[str, str]  # name -> type, for example "blk.0.attn_q.weight" -> "Q4_1"

    @property
    def float_dtype(self) -> mx.Dtype:
        """Return the dtype to compute in: that of the matrices or their scales, not of the few F32 norms."""
        return mx.float32 if set(self.tensors.values()) == {"F32"} else mx.float16


def read_header(path: Path) -> Header:
    """Read the metadata and the list of tensors, and check that the file is whole.

    Raises ModelNotLoaded for anything that is not a readable, complete GGUF file of supported tensors.
    """
    try:
        with path.open("rb") as file:
            metadata, tensors, data_start = _parse(file)
    except OSError as error:
        raise ModelNotLoaded(f"cannot read {path}: {error.strerror}") from error
    except (struct.error, UnicodeDecodeError, KeyError, MemoryError, OverflowError) as error:
        raise ModelNotLoaded(f"{path} is not a readable GGUF file, or is cut off: download it again") from error
    _check_whole(path, tensors, data_start)
    return Header(metadata, {name: _TENSOR_TYPES[kind][0] for name, _, kind, _ in tensors})


def load_config(header: Header, path: Path) -> dict[str, Any]:
    """Write the header as the config.json that mlx-lm's llama expects."""
    facts = header.metadata
    architecture = facts.get("general.architecture")
    if architecture != "llama":
        raise ModelNotLoaded(f"{path} holds a model of architecture {architecture!r}; {_SUPPORTED}")
    _refuse_variants(header, path)
    try:
        heads = facts["llama.attention.head_count"]
        config = {
            "model_type": "llama",
            "hidden_size": facts["llama.embedding_length"],
            "num_hidden_layers": facts["llama.block_count"],
            "intermediate_size": facts["llama.feed_forward_length"],
            "num_attention_heads": heads,
            "num_key_value_heads": facts.get("llama.attention.head_count_kv", heads),
            "head_dim": facts.get("llama.attention.key_length", facts["llama.embedding_length"] // heads),
            "rms_norm_eps": facts["llama.attention.layer_norm_rms_epsilon"],
            "vocab_size": len(facts["tokenizer.ggml.tokens"]),
            "max_position_embeddings": facts["llama.context_length"],
            "rope_theta": facts.get("llama.rope.freq_base", 10_000.0),
            "attention_bias": "blk.0.attn_q.bias" in header.tensors,
            "tie_word_embeddings": "output.weight" not in header.tensors,
        }
    except KeyError as error:
        raise ModelNotLoaded(f"{path} lacks the metadata {error.args[0]!r}: convert it again") from error
    if facts.get("llama.rope.scaling.type") == "linear":
        config["rope_scaling"] = {"type": "linear", "factor": facts["llama.rope.scaling.factor"]}
    return config


def load_model(header: Header, path: Path) -> Module:
    """Build mlx-lm's llama with weights as stored: quantised where the file is, nothing evaluated yet."""
    config = load_config(header, path)
    try:
        stored = mx.load(str(path))
    except RuntimeError as error:
        raise ModelNotLoaded(f"cannot read the weights of {path}: {error}") from error
    assert isinstance(stored, dict)
    rope_factors = stored.pop("rope_freqs.weight", None)
    weights = dict(_rename(stored, config["num_attention_heads"], config["num_key_value_heads"]))
    model = llama.Model(llama.ModelArgs.from_dict(config))  # type: ignore[no-untyped-call]

    def packing(name: str, module: Module) -> bool | dict[str, int]:
        if f"{name}.scales" not in weights:
            return False
        in_dims = module.weight.shape[-1]
        return {"group_size": _GROUP, "bits": weights[f"{name}.weight"].shape[-1] * 32 // in_dims}

    quantize(model, group_size=_GROUP, bits=4, class_predicate=packing)
    model.eval()
    try:
        model.load_weights(list(weights.items()), strict=True)
    except ValueError as error:
        raise ModelNotLoaded(f"the tensors of {path} do not fit a llama model: {str(error)[:300]}") from error
    if rope_factors is not None:
        _stretch_rope(model, config, rope_factors)
    return model


def load_tokenizer(header: Header, path: Path) -> TokenizerWrapper:
    """Build the tokenizer from the vocabulary inside the file."""
    facts = header.metadata
    streaming: type[StreamingDetokenizer]
    try:
        kind = facts["tokenizer.ggml.model"]
        if kind == "gpt2":
            tokenizer, streaming = _byte_level(facts, path), BPEStreamingDetokenizer
        elif kind == "llama":
            tokenizer, streaming = _sentencepiece(facts), SPMStreamingDetokenizer
        else:
            raise ModelNotLoaded(f"{path} has a tokenizer of kind {kind!r}; supported are 'gpt2' and 'llama'")
        names = _name_special_tokens(tokenizer, facts)
    except (KeyError, IndexError) as error:
        raise ModelNotLoaded(f"{path} lacks a part of its tokenizer: {error}") from error
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=facts.get("tokenizer.chat_template") or None,
        model_max_length=facts.get("llama.context_length"),
        clean_up_tokenization_spaces=False,
        **names,
    )
    ends = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
    return TokenizerWrapper(wrapped, streaming, eos_token_ids={facts[key] for key in ends if key in facts})


# -- header --------------------------------------------------------------------------------------------------------


def _parse(file: BinaryIO) -> tuple[dict[str, Any], list[tuple[str, list[int], int, int]], int]:
    if file.read(4) != b"GGUF":
        raise KeyError("magic")
    version, num_tensors, num_facts = _unpack(file, "IQQ")
    if version not in (2, 3):
        raise KeyError("version")
    metadata = {}
    for _ in range(num_facts):
        key = _string(file)
        metadata[key] = _value(file, *_unpack(file, "I"))
    tensors = []
    for _ in range(num_tensors):
        name = _string(file)
        (num_dims,) = _unpack(file, "I")
        dims = list(_unpack(file, f"{num_dims}Q"))
        tensors.append((name, dims, *_unpack(file, "IQ")))
    alignment = metadata.get("general.alignment", 32)
    return metadata, tensors, -(-file.tell() // alignment) * alignment


def _unpack(file: BinaryIO, layout: str) -> tuple[Any, ...]:
    layout = "<" + layout
    return struct.unpack(layout, file.read(struct.calcsize(layout)))


def _string(file: BinaryIO) -> str:
    (length,) = _unpack(file, "Q")
    data = file.read(length)
    if len(data) != length:
        raise struct.error("the file ends inside a string")
    return data.decode("utf-8")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        return _unpack(file, _SCALARS[kind])[0]
    item_kind, length = _unpack(file, "IQ")
    if item_kind in (_STRING, _ARRAY):
        return [_value(file, item_kind) for _ in range(length)]
    return list(_unpack(file, f"{length}{_SCALARS[item_kind]}"))


def _check_whole(path: Path, tensors: list[tuple[str, list[int], int, int]], data_start: int) -> None:
    file_bytes = path.stat().st_size
    for name, dims, kind, offset in tensors:
        if kind not in _TENSOR_TYPES:
            found = _OTHER_TYPES.get(kind, f"number {kind}")
            raise ModelNotLoaded(f"{path}: tensor {name} has type {found}; {_SUPPORTED}")
        _, block_values, block_bytes = _TENSOR_TYPES[kind]
        end = data_start + offset + math.prod(dims) // block_values * block_bytes
        if end > file_bytes:
            raise ModelNotLoaded(f"{path} is cut off: {file_bytes} bytes, {name} ends at {end}; download it again")


# -- weights -------------------------------------------------------------------------------------------------------


def _refuse_variants(header: Header, path: Path) -> None:
    """Refuse what the general.architecture `llama` may also mean and mlx-lm's llama would compute wrongly."""
    facts = header.metadata
    scaling = facts.get("llama.rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise ModelNotLoaded(f"{path} scales RoPE by {scaling!r}; supported from GGUF are none and linear")
    if facts.get("llama.expert_count", 0):
        raise ModelNotLoaded(f"{path} is a mixture of experts; {_SUPPORTED}: take the MLX version of the model")
    heads, embedding = facts.get("llama.attention.head_count"), facts.get("llama.embedding_length")
    if isinstance(heads, list) or isinstance(facts.get("llama.attention.head_count_kv"), list):
        raise ModelNotLoaded(f"{path} has layers of different widths; {_SUPPORTED}")
    head_dim = facts.get("llama.attention.key_length", embedding // heads if heads and embedding else None)
    if facts.get("llama.rope.dimension_count", head_dim) != head_dim:
        raise ModelNotLoaded(f"{path} rotates only a part of each head; {_SUPPORTED}")


def _rename(stored: dict[str, mx.array], num_heads: int, num_kv_heads: int) -> Iterator[tuple[str, mx.array]]:
    for name, value in stored.items():
        head, _, rest = name.removeprefix("blk.").partition(".")
        if not name.startswith("blk."):
            yield f"{_GLOBAL_NAMES.get(head, head)}.{rest}", value
            continue
        part, _, kind = rest.partition(".")
        if part == "attn_q":
            value = _unpermute(value, num_heads)
        elif part == "attn_k":
            value = _unpermute(value, num_kv_heads)
        yield f"model.layers.{head}.{_LAYER_NAMES.get(part, part)}.{kind}", value


def _stretch_rope(model: Any, config: dict[str, Any], factors: mx.array) -> None:
    """Divide every RoPE frequency by its factor: how files of Llama 3.1 and later say their longer context."""
    plain = {"factor": 1.0}  # the class of that scaling, without its own
    for layer in model.layers:
        rope = Llama3RoPE(config["head_dim"], base=config["rope_theta"], scaling_config=plain)
        rope._freqs = rope._freqs * factors  # wave lengths, in spite of the name
        layer.self_attn.rope = rope


def _unpermute(rows: mx.array, num_heads: int) -> mx.array:
    """Undo llama.cpp's order of a head's rows: it pairs row i with i + 1 for RoPE, mlx-lm i with i + head_dim / 2.

    Weights, scales and biases of a quantised tensor all have one entry per row, so each is reordered alike.
    """
    pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])  # [H, D/2, 2, ...]
    return pairs.swapaxes(1, 2).reshape(rows.shape)


# -- vocabulary ----------------------------------------------------------------------------------------------------


def _byte_level(facts: dict[str, Any], path: Path) -> Tokenizer:
    """Byte-level BPE; `tokenizer.ggml.pre` names how text is cut into words before it."""
    vocabulary = {token: index for index, token in enumerate(facts["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    words = facts.get("tokenizer.ggml.pre", "default")
    # Llama 3 takes a word that is itself a token as it is, even where no merges lead to it.
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=words == "llama-bpe"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if words in ("gpt-2", "default"):
        tokenizer.pre_tokenizer = byte_level
    elif words == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    elif words in ("llama-bpe", "qwen2"):
        pattern = Regex(_LLAMA3_WORDS if words == "llama-bpe" else _QWEN2_WORDS)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), whole])
    else:
        known = "gpt-2, default, smollm, llama-bpe, qwen2"
        raise ModelNotLoaded(f"{path} splits text by the rules of {words!r} (tokenizer.ggml.pre); known are {known}")
    if words == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(facts: dict[str, Any]) -> Tokenizer:
    """SentencePiece BPE: merges are not stored, the score of the merged token is their order."""
    tokens: list[str] = facts["tokenizer.ggml.tokens"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    unknown = tokens[facts.get("tokenizer.ggml.unknown_token_id", 0)]
    merges = _merges_by_score(vocabulary, facts["tokenizer.ggml.scores"])
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces: list[Any] = [normalizers.Replace(" ", "▁")]
    decoding = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if facts.get("tokenizer.ggml.add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend("▁"))
        decoding.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(decoding)
    return tokenizer


def _merges_by_score(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    found = []
    for token, index in vocabulary.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((-scores[index], vocabulary[left], vocabulary[right], (left, right)))
    return [pair for *_, pair in sorted(found)]


def _name_special_tokens(tokenizer: Tokenizer, facts: dict[str, Any]) -> dict[str, str]:
    """Make control and user-defined tokens whole in text; return those with a role, by the role's name."""
    tokens, kinds = facts["tokenizer.ggml.tokens"], facts.get("tokenizer.ggml.token_type", [])
    added = [
        AddedToken(token, special=kind in (_CONTROL, _UNKNOWN), normalized=False)
        for token, kind in zip(tokens, kinds, strict=False)
        if kind in (_CONTROL, _UNKNOWN, _USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {role: facts.get(f"tokenizer.ggml.{name}_token_id") for role, name in roles.items()}
    names = {role: tokens[index] for role, index in ids.items() if index is not None}
    by_default = facts["tokenizer.ggml.model"] == "llama" or facts.get("tokenizer.ggml.pre") == "llama-bpe"
    if "bos_token" in names and facts.get("tokenizer.ggml.add_bos_token", by_default):
        bos = names["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, ids["bos_token"])]
        )
    return names
