"""Vision models laid out as the hub has them for MLX, every size made small and every weight random.

After what is public of `mlx-community/Qwen2-VL-2B-Instruct-4bit`, `Qwen2.5-VL-3B-Instruct-4bit` and
`SmolVLM-Instruct-4bit`: weights in shards with an index, the language part in 4 bits and the tower not, the same fields
in config and processor files, the template of pictures in a file of its own. Where versions differ, the harder one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.quantized import quantize

from tests.models import parameters, random_weights, tiny_tokenizer

FIRST = 300  # the number of the first word that a family adds to the tiny tokenizer's
_QWEN_WORDS = (
    "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
_SMOL_WORDS = (
    "<global-img>", *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
    "<fake_token_around_image>", "<image>", "<end_of_utterance>",
)  # fmt: skip
# Like the real ones: a system turn of its own, pictures counted and told by any of three signs, videos, parts or text.
_QWEN_TEMPLATE = (
    "{% set shown = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nBe helpful.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "{% set shown.value = shown.value + 1 %}{% if add_vision_id %}Number {{ shown.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' or 'video' in part %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Qwen2.5-VL's tokenizer_config.json has the template of the text model: it joins strings, and fails over parts.
_QWEN_TEXT_TEMPLATE = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>system\\nBe of help.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if message.role == 'user' or message.role == 'assistant' %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# No kind of content but parts, of which the first decides about a space; and a word of its own for the end of a turn.
_SMOL_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_QUANTIZATION = {"group_size": 64, "bits": 4}
_QWEN_MEANS = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


@dataclass(frozen=True, slots=True)
class Layout:
    """What is in a repository beside the weights and the tokenizer.

    Attributes:
        tokenizer: what tokenizer_config.json has beside what a tokenizer writes.
        files: JSON files by name.
    """

    words: tuple[str, ...]
    config: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    files: Mapping[str, Any]


def _qwen(family: str, *, fast: bool) -> Layout:
    ids = {word: FIRST + at for at, word in enumerate(_QWEN_WORDS)}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    tower: dict[str, Any] = {"depth": 2, "in_chans": 3, "num_heads": 4, "patch_size": 14, "spatial_merge_size": 2}
    tower |= {"spatial_patch_size": 14, "temporal_patch_size": 2}
    if family == "qwen2_vl":
        tower |= {"embed_dim": 64, "mlp_ratio": 4, "hidden_size": 256}
    else:
        tower |= {"hidden_act": "silu", "hidden_size": 64, "intermediate_size": 128, "out_hidden_size": 256}
        tower |= {"window_size": 112, "fullatt_block_indexes": [1], "tokens_per_second": 2}
    config = {
        "architectures": [f"Qwen{'2' if family == 'qwen2_vl' else '2_5'}_VLForConditionalGeneration"],
        "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 298,
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"], "vision_token_id": ids["<|vision_pad|>"],
        "image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"], "hidden_act": "silu",
        "hidden_size": 256, "initializer_range": 0.02, "intermediate_size": 512, "max_position_embeddings": 32768,
        "max_window_layers": 28, "model_type": family, **heads, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
        "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
        "transformers_version": "4.41.2", "use_sliding_window": False, "vision_config": tower,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "vocab_size": FIRST + 20,
        "quantization": _QUANTIZATION, "quantization_config": _QUANTIZATION,
    }  # fmt: skip
    pixels: dict[str, Any] = {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2}
    pixels |= {"merge_size": 2, **_QWEN_MEANS, "image_processor_type": "Qwen2VLImageProcessor"}
    if fast:
        pixels |= {"image_processor_type": "Qwen2VLImageProcessorFast", "size": {"shortest_edge": 3136,
                   "longest_edge": 12845056}, "crop_size": None, "do_resize": True, "resample": 3, "device": None,
                   "input_data_format": None, "min_pixels": None, "max_pixels": None}  # fmt: skip
    name = "Qwen2VLProcessor" if family == "qwen2_vl" else "Qwen2_5_VLProcessor"
    text = _QWEN_TEMPLATE if family == "qwen2_vl" else _QWEN_TEXT_TEMPLATE
    return Layout(
        _QWEN_WORDS,
        config,
        {"chat_template": text, "processor_class": name, "errors": "replace", "bos_token": None, "unk_token": None},
        {
            "preprocessor_config.json": {**pixels, "processor_class": name},
            "chat_template.json": {"chat_template": _QWEN_TEMPLATE},
            "generation_config.json": {"bos_token_id": 0, "do_sample": True, "eos_token_id": [298, 299],
                                       "repetition_penalty": 1.05, "temperature": 1e-06},
        },
    )  # fmt: skip


def _smolvlm() -> Layout:
    ids = {word: FIRST + at for at, word in enumerate(_SMOL_WORDS)}
    vocab = FIRST + len(_SMOL_WORDS)
    text = {
        "_flash_attn_2_enabled": True, "_name_or_path": "a/model", "architectures": ["VLlama3ForCausalLM"],
        "head_dim": 64, "hidden_size": 128, "intermediate_size": 128, "is_llama_config": True,
        "max_position_embeddings": 16384, "mlp_bias": False, "model_type": "llama", "num_attention_heads": 2,
        "num_hidden_layers": 1, "num_key_value_heads": 2, "pad_token_id": 2, "pixel_shuffle_factor": 3,
        "qk_layer_norms": False, "rms_norm_eps": 1e-05, "rope_theta": 273768.0, "torch_dtype": "bfloat16",
        "use_resampler": False, "vocab_size": vocab,
    }  # fmt: skip
    config = {
        "architectures": ["Idefics3ForConditionalGeneration"], "image_seq_len": 81, "image_token_id": ids["<image>"],
        "model_type": "idefics3", "scale_factor": 3, "text_config": text, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.46.0", "use_cache": True, "vocab_size": vocab,
        "vision_config": {
            "hidden_size": 64, "image_size": 384, "intermediate_size": 128, "max_image_size": {"longest_edge": 384},
            "model_type": "idefics3", "num_attention_heads": 4, "num_hidden_layers": 2, "patch_size": 14,
            "size": {"longest_edge": 1920}, "tie_word_embeddings": False,
        },
        "quantization": _QUANTIZATION, "quantization_config": _QUANTIZATION,
    }  # fmt: skip
    name = {"processor_class": "Idefics3Processor"}
    pixels: dict[str, Any] = {"do_convert_rgb": True, "do_image_splitting": True, "do_normalize": True, "do_pad": True}
    pixels |= {"do_rescale": True, "do_resize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
               "image_processor_type": "Idefics3ImageProcessor", "max_image_size": {"longest_edge": 384},
               "resample": 1, "rescale_factor": 0.00392156862745098, "size": {"longest_edge": 768}}  # fmt: skip
    return Layout(
        _SMOL_WORDS,
        config,
        {"chat_template": None, "bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>",
         "truncation_side": "left", "extra_special_tokens": None, "legacy": False, "vocab_size": vocab, **name},
        {
            "preprocessor_config.json": {**pixels, **name},
            "processor_config.json": {"image_seq_len": 81, **name},
            "chat_template.json": {"chat_template": _SMOL_TEMPLATE},
            "generation_config.json": {"bos_token_id": 0, "eos_token_id": ids["<end_of_utterance>"], "pad_token_id": 2},
        },
    )  # fmt: skip


LAYOUTS: Mapping[str, Layout] = {
    "Qwen2-VL-2B-Instruct-4bit": _qwen("qwen2_vl", fast=False),
    "Qwen2.5-VL-3B-Instruct-4bit": _qwen("qwen2_5_vl", fast=False),
    "Qwen2.5-VL-3B-Instruct-4bit, fast processor": _qwen("qwen2_5_vl", fast=True),
    "SmolVLM-Instruct-4bit": _smolvlm(),
}


def save_layout(directory: Path, name: str) -> Path:
    """Write a repository; return its directory."""
    layout = LAYOUTS[name]
    directory.mkdir(parents=True)
    tokenizer = tiny_tokenizer(layout.words)._tokenizer
    tokenizer.chat_template = None
    tokenizer.save_pretrained(directory)
    for file, content in {"config.json": layout.config, **layout.files}.items():
        (directory / file).write_text(json.dumps(content))
    described = directory / "tokenizer_config.json"
    content = json.loads(described.read_text()) | layout.tokenizer
    described.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
    _save_weights(directory, json.loads(json.dumps(layout.config)))
    return directory


def _save_weights(directory: Path, config: dict[str, Any]) -> None:
    from mlx_vlm.utils import get_model_and_args, update_module_configs

    classes, _ = get_model_and_args(config)
    config.setdefault("text_config", {})
    described = classes.ModelConfig.from_dict(config)
    model: Module = classes.Model(update_module_configs(described, classes, config, ["text", "vision"]))
    model.load_weights(list(random_weights(model, seed=0).items()))
    model.set_dtype(mx.bfloat16)
    quantize(model, group_size=64, bits=4, class_predicate=_is_of_the_language_part)
    weights = sorted(parameters(model).items())
    shards = {f"model-0000{n + 1}-of-00002.safetensors": dict(weights[n::2]) for n in range(2)}
    for file, shard in shards.items():
        mx.save_safetensors(str(directory / file), shard, {"format": "mlx"})
    index = {name: file for file, shard in shards.items() for name in shard}
    size = sum(value.nbytes for _, value in weights)
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": index})
    )


def _is_of_the_language_part(path: str, module: Module) -> bool:
    return path.startswith("language_model") and hasattr(module, "to_quantized")
