"""Small models for tests: random ones of any architecture, written as mlx-lm and llama.cpp write them, and SmolLM2."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx.nn.layers.quantized import quantize
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper
from mlx_lm.utils import _get_classes
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 300
EOS = 298  # <|im_end|>
RawTensor = tuple[int, tuple[int, ...], bytes]  # number of the type, shape as numpy has it, content
CHECKOUT = Path(__file__).parents[1]

_MERGES = (  # separated by |
    "Ġ t|Ġ a|h e|i n|r e|o n|Ġt he|e r|Ġ s|a t|e n|o r|Ġ w|n d|Ġ c|i t|i s|e s|Ġ o|Ġ f|Ġ p|in g|Ġa nd|a l|o u|a r|Ġ b|"
    "e d|Ġ m|Ġ in|Ġ l|Ġ d|i c|a s|Ġ h|l e|Ġ n|Ġt o|i on|s t"
)
_ADDED = [
    AddedToken("<note>", special=False, normalized=False),
    AddedToken("<|im_start|>", special=True, normalized=False),
    AddedToken("<|im_end|>", special=True, normalized=False),
    AddedToken("<|endoftext|>", special=True, normalized=False),
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CONFIG: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 4096,
    "rope_theta": 10_000.0,
    "rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "eos_token_id": EOS,
}


def tiny_config(arch: str = "llama", **overrides: Any) -> dict[str, Any]:
    """Return the config.json of a small model; `arch` is a model_type that mlx-lm knows."""
    return {"model_type": arch, **_CONFIG, **overrides}


def tiny(arch: str = "llama", *, seed: int = 0, **overrides: Any) -> Any:
    """Build a random model whose logits are far enough apart that rounding does not change the greedy token.

    The same arguments give the same weights; MLX's random state is left alone.
    """
    model_class, args_class = _get_classes(tiny_config(arch, **overrides))
    model: Any = model_class(args_class.from_dict(tiny_config(arch, **overrides)))
    model.load_weights(list(random_weights(model, seed).items()))
    model.eval()
    mx.eval(model.parameters())
    return model


def endless(**overrides: Any) -> Any:
    """Build a tiny model that never ends an answer by itself."""
    model = tiny(**overrides)
    weights = np.array(model.lm_head.weight)
    weights[EOS - 1 :] = 0  # all tokens that end one
    model.lm_head.weight = mx.array(weights)
    return model


def random_weights(model: Module, seed: int) -> dict[str, mx.array]:
    """Return weights for every parameter of a model."""
    rng = np.random.default_rng(seed)
    return {name: mx.array(_random(rng, value.shape)) for name, value in sorted(parameters(model).items())}


def tiny_tokenizer(more: Sequence[str] = ()) -> TokenizerWrapper:
    """Build a byte-level tokenizer of 300 tokens with ChatML's special tokens; it can write every text.

    `more` are special tokens with the numbers from 300 on.
    """
    merges = [(left, right) for left, _, right in (pair.partition(" ") for pair in _MERGES.split("|"))]
    words = sorted(pre_tokenizers.ByteLevel.alphabet()) + [left + right for left, right in merges]
    tokenizer = Tokenizer(BPE({word: index for index, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([*_ADDED, *(AddedToken(word, special=True, normalized=False) for word in more)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    return TokenizerWrapper(fast, BPEStreamingDetokenizer)


def save_tiny(
    directory: Path, arch: str = "llama", *, seed: int = 0, bits: int | None = None, **overrides: Any
) -> Path:
    """Write a random model as a directory that `worker.model.load` and `mlx_lm.load` read; return it.

    `bits` quantises it in groups of 32. A worker process takes the directory as its MLX_MODEL_PATH.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = tiny_config(arch, **overrides)
    model = tiny(arch, seed=seed, **overrides)
    if bits is not None:
        quantize(model, group_size=32, bits=bits)
        config["quantization"] = {"group_size": 32, "bits": bits}
    mx.save_safetensors(str(directory / "model.safetensors"), parameters(model), {"format": "mlx"})
    (directory / "config.json").write_text(json.dumps(config))
    tiny_tokenizer().save_pretrained(directory)
    return directory


def save_endless(directory: Path) -> Path:
    """Write a tiny model that never ends by itself, so that a test chooses how long a job runs; return it."""
    save_tiny(directory, max_position_embeddings=100_000)
    weights: Any = mx.load(str(directory / "model.safetensors"))
    head = weights["lm_head.weight"]
    weights["lm_head.weight"] = mx.concatenate([head[:-3], mx.zeros_like(head[-3:])])  # the special tokens
    mx.save_safetensors(str(directory / "model.safetensors"), weights, {"format": "mlx"})
    return directory


def smollm2_path() -> Path:
    """Return SmolLM2-135M-Instruct as a .gguf file, or skip the test."""
    named = os.environ.get("RADIXQ_TEST_SMOLLM2")
    found = [Path(named)] if named else sorted((CHECKOUT / ".radixq" / "models").glob("SmolLM2*.gguf"))
    if not found or not found[0].is_file():
        import pytest  # here, since ops/demo writes a tiny model where there is no pytest

        pytest.skip(
            "SmolLM2-135M-Instruct is not here: ./ops/check fetches it into .radixq/models, or name the .gguf file in "
            "RADIXQ_TEST_SMOLLM2"
        )
    return found[0]


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, RawTensor]) -> Path:
    """Write a GGUF file of tensors that are already in their blocks."""
    header, data = bytearray(), bytearray()
    for key, value in metadata.items():
        header += _gguf_string(key) + _gguf_value(value)
    for name, (kind, shape, raw) in tensors.items():
        header += _gguf_string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        header += struct.pack("<IQ", kind, len(data))
        data += raw + bytes(-len(raw) % 32)
    counted = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata)) + header
    path.write_bytes(counted + bytes(-len(counted) % 32) + data)
    return path


def parameters(model: Module) -> dict[str, mx.array]:
    """Return all weights by name."""
    return dict(tree_flatten(model.parameters()))  # type: ignore[no-untyped-call]


def _random(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    if len(shape) <= 1:  # norms, biases and gains
        return np.float32(1 + 0.1 * rng.standard_normal(shape))
    return (rng.standard_normal(shape) * 1.5 / np.sqrt(shape[-1])).astype(np.float32)


def _gguf_string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _gguf_value(value: Any) -> bytes:
    """Encode with its type in front: bool 7, int 4 (uint32), float 6, str 8, list 9 of one of these."""
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", 8) + _gguf_string(value)
    items = [_gguf_value(item) for item in value]
    return struct.pack("<I", 9) + items[0][:4] + struct.pack("<Q", len(items)) + b"".join(item[4:] for item in items)
