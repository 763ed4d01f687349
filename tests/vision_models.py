"""Small random vision models with real processors, written as the hub has them, and pictures of any content."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from common import pictures
from tests.models import random_weights, tiny_tokenizer

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "smolvlm", "idefics3")
_QWEN_WORDS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
_TILES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4))
_SMOL_WORDS = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *_TILES)
_GEMMA_WORDS = ("<start_of_image>", "<image_soft_token>", "<end_of_image>")
_FIRST = 300  # the number of the first word that a family adds to the tiny tokenizer's
_PART = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}MARK{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 298,
}


def _qwen(family: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    tower: dict[str, Any] = {"depth": 2, "hidden_size": 64, "num_heads": 4, "patch_size": 4, "spatial_patch_size": 4}
    if family == "qwen2_vl":
        tower |= {"embed_dim": 32, "mlp_ratio": 2}
    else:
        tower |= {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "window_size": 16}
        tower |= {"fullatt_block_indexes": [1]}
    config = _TEXT | {
        "vocab_size": _FIRST + len(_QWEN_WORDS),
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "image_token_id": _FIRST,
        "video_token_id": _FIRST + 1,
        "vision_start_token_id": _FIRST + 2,
        "vision_end_token_id": _FIRST + 3,
        "vision_config": {"model_type": family, **tower},
    }
    processor = {"patch_size": 4, "min_pixels": 256, "max_pixels": 64 * 64}
    return config, processor, _PART.replace("MARK", "<|vision_start|><|image_pad|><|vision_end|>")


def _qwen3(family: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    config, processor, template = _qwen("qwen2_5_vl")
    text = {name: config.pop(name) for name in (*_TEXT, "vocab_size")}
    turns = {"rope_type": "default", "type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    del config["rope_scaling"]
    config |= {
        "text_config": {"model_type": f"{family}_text", **text, "head_dim": 16, "rope_scaling": turns},
        "vision_config": {
            "model_type": family, "depth": 2, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64,
            "num_heads": 4, "patch_size": 4, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
        },
        "max_position_embeddings": 4096,
        "eos_token_id": 298,
        "vocab_size": text["vocab_size"],
    }  # fmt: skip
    return config, processor, template


def _smol(family: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    tower: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "patch_size": 8, "num_hidden_layers": 2}
    tower |= {
        "intermediate_size": 64,
        "image_size": 32,
        "model_type": "smolvlm_vision" if family == "smolvlm" else family,
    }
    vocab = {"vocab_size": _FIRST + len(_SMOL_WORDS)}
    config = vocab | {
        "text_config": {"model_type": "llama", **_TEXT, **vocab},
        "vision_config": tower,
        "image_token_id": _FIRST,
        "image_token_index": _FIRST,
        "scale_factor": 2,
        "max_position_embeddings": 4096,
        "eos_token_id": 298,
    }
    kind = "SmolVLMImageProcessor" if family == "smolvlm" else "Idefics3ImageProcessor"
    processor = {
        "image_processor_type": kind,
        "size": {"longest_edge": 64},
        "max_image_size": {"longest_edge": 32},
        "do_image_splitting": True,
    }
    return config, processor, _PART.replace("MARK", "<image>")


def _gemma(family: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    text = _TEXT | {"model_type": "gemma3_text", "head_dim": 16, "sliding_window": 64, "mm_tokens_per_image": 4}
    vocab = {"vocab_size": _FIRST + len(_GEMMA_WORDS)}
    config = vocab | {
        "text_config": text | vocab | {"num_hidden_layers": 7, "query_pre_attn_scalar": 16},
        "vision_config": {
            "model_type": "siglip_vision_model", "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64,
            "num_attention_heads": 4, "patch_size": 8, "image_size": 32,
        },
        "image_token_index": _FIRST + 1, "mm_tokens_per_image": 4, "hidden_size": 64, "eos_token_id": 298,
    }  # fmt: skip
    processor = {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 32, "width": 32}}
    return config, processor, _PART.replace("MARK", _GEMMA_WORDS[0])


def save_tiny_vision(
    directory: Path,
    family: str = "qwen2_vl",
    *,
    text: Mapping[str, Any] = MappingProxyType({}),
    tower: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """Write a random vision model with tokenizer and processor; return the directory.

    `text` and `tower` change a Qwen2-VL's sizes.
    """
    from mlx_vlm.utils import get_model_and_args, update_module_configs

    directory.mkdir(parents=True, exist_ok=True)
    make, words = next(made for begin, made in _MAKERS.items() if family.startswith(begin))
    config, processor, own = make(family)
    config |= {"model_type": family, **text, "vision_config": {**config["vision_config"], **tower}}
    if tower:
        processor |= {"patch_size": tower["patch_size"], "max_pixels": 1 << 20}
        part = config["hidden_size"] // config["num_attention_heads"] // 8
        config["rope_scaling"] = {"type": "mrope", "mrope_section": [2 * part, part, part]}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "preprocessor_config.json").write_text(json.dumps(processor))
    (directory / "processor_config.json").write_text(json.dumps({"image_seq_len": 4, "image_seq_length": 4}))
    tokenizer = tiny_tokenizer(words)
    tokenizer._tokenizer.chat_template = own
    tokenizer.save_pretrained(directory)
    if family == "gemma3":  # its processor asks the tokenizer for its words by name
        file = directory / "tokenizer_config.json"
        named = dict(zip(("boi_token", "image_token", "eoi_token"), words, strict=True))
        file.write_text(json.dumps(json.loads(file.read_text()) | named | {"extra_special_tokens": named}))
    classes, _ = get_model_and_args(config)
    config.setdefault("text_config", {})
    described = classes.ModelConfig.from_dict(config)
    described = update_module_configs(described, classes, config, ["text", "vision"])
    weights = random_weights(classes.Model(described), seed=0)
    mx.save_safetensors(str(directory / "model.safetensors"), weights, {"format": "mlx"})
    return directory


_MAKERS = {
    "qwen3": (_qwen3, _QWEN_WORDS),
    "qwen": (_qwen, _QWEN_WORDS),
    "smolvlm": (_smol, _SMOL_WORDS),
    "idefics3": (_smol, _SMOL_WORDS),
    "gemma3": (_gemma, _GEMMA_WORDS),
}


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Make a picture of blocks: its parts differ from each other, and from those of another seed."""
    rng = np.random.default_rng([seed, width, height])
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8))


def png(image: Image.Image) -> bytes:
    """Encode a picture as the producer does."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def digest(image: Image.Image) -> str:
    """Return the digest of an RGB picture."""
    return pictures.digest(*image.size, image.tobytes())


def url(image: Image.Image) -> str:
    """Return how a job names the picture."""
    return f"sha256:{digest(image)}"
