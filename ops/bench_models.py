"""Write the benchmark's models as directories that mlx-lm loads: `python ops/bench_models.py NAME DIRECTORY`.

NAME is `smollm2`, converted from the .gguf file, or the fields of a `Shape` joined by hyphens. The random models never
answer with a special token (its row of the output matrix is zero), so all contestants give the same number of tokens.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from bench_workloads import SMOLLM2, Shape, smollm2_path

from worker import platform

_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
CONTEXT_TOKENS = 32_768


def main() -> None:
    """Write one model."""
    name, directory = sys.argv[1], Path(sys.argv[2])
    platform.prepare()
    directory.mkdir(parents=True)
    if name == SMOLLM2:
        _convert(smollm2_path(), directory)
    else:
        _random(Shape(*map(int, name.split("-"))), directory)


def _convert(gguf_path: Path, directory: Path) -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from worker import gguf, model

    loaded = model.load(str(gguf_path), dtype="float32", device=platform.device())
    header = gguf.read_header(gguf_path)
    config = {**gguf.load_config(header, gguf_path), "eos_token_id": sorted(loaded.eos_token_ids)}
    _save(directory, config, dict(tree_flatten(loaded.model.parameters())), mx)
    loaded.tokenizer._tokenizer.save_pretrained(directory)


def _random(shape: Shape, directory: Path) -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.utils import _get_classes

    config = {
        "model_type": "llama", "hidden_size": shape.hidden, "num_hidden_layers": shape.layers,
        "intermediate_size": shape.inter, "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-6, "vocab_size": shape.vocab, "max_position_embeddings": CONTEXT_TOKENS,
        "rope_theta": 10_000.0, "tie_word_embeddings": False, "eos_token_id": shape.vocab - 1,
    }  # fmt: skip
    model_class, args_class = _get_classes(config)
    rng = np.random.default_rng(0)
    names = dict(tree_flatten(model_class(args_class.from_dict(config)).parameters()))
    weights = {name: mx.array(_weight(rng, value.shape)) for name, value in sorted(names.items())}
    weights["lm_head.weight"][shape.vocab - 2 :] = 0.0  # the special tokens
    _save(directory, config, weights, mx)
    _tokenizer(shape.vocab).save_pretrained(directory)


def _weight(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """Spread logits so far that rounding rarely changes which is the largest."""
    if len(shape) == 1:
        return (1 + 0.1 * rng.standard_normal(shape)).astype(np.float32)
    return (rng.standard_normal(shape, np.float32) * np.float32(1.5 / np.sqrt(shape[-1]))).astype(np.float32)


def _save(directory: Path, config: dict[str, Any], weights: dict[str, Any], mx: Any) -> None:
    mx.save_safetensors(str(directory / "model.safetensors"), weights, {"format": "mlx"})
    (directory / "config.json").write_text(json.dumps(config))


def _tokenizer(vocab: int) -> Any:
    """Make one with a word per token: t0, t1, ... A chat renders to its messages' words and nothing else."""
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    entries = {**{f"t{i}": i for i in range(vocab - 2)}, "<unk>": vocab - 2, "<eos>": vocab - 1}
    tokenizer = Tokenizer(WordLevel(entries, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.decoder = decoders.Replace("t", " t")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>", chat_template=_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


if __name__ == "__main__":
    main()
