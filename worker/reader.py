"""Find a model's files and load what reads jobs with it: tokenizer, chat template, processor of pictures. No weights.

Knows no Redis, no queue and no job. Every way to fail is `ModelNotLoaded`, with the reason and the fix. Importing this
room imports MLX, through mlx-lm, which loads the tokenizers.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx_lm.utils
from huggingface_hub.errors import HfHubHTTPError
from mlx_lm.tokenizer_utils import TokenizerWrapper

from common.errors import ModelNotLoaded
from worker import gguf, processor
from worker.processor import Bounds, Processor

ANY_PICTURE = Bounds()
TEXT_ONLY = "it reads text only"

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "*.tiktoken")
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "model_max_length")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_MAX_REASON = 300  # characters of a library's message: one that lists all weights is longer than a screen


@dataclass(frozen=True, slots=True)
class LoadedTokenizer:
    """What a process needs that renders and counts tokens but computes nothing.

    Attributes:
        name: hub id, directory name, or file name without `.gguf`.
        processor: of pictures; None where none can be taken, for the reason in `blind`.
    """

    tokenizer: TokenizerWrapper
    name: str
    context_length: int
    eos_token_ids: frozenset[int]
    processor: Processor | None = field(default=None, repr=False)
    blind: str = TEXT_ONLY


def load_tokenizer(path_or_id: str, *, pictures: Bounds = ANY_PICTURE) -> LoadedTokenizer:
    """Load what reads jobs for the model that a directory, a hub id or a `.gguf` file names."""
    return read(*find(path_or_id), pictures)


def read(path: Path, name: str, pictures: Bounds) -> LoadedTokenizer:
    """Load the same from what `find` returned."""
    if path.is_file():
        header = gguf.read_header(path)
        config, tokenizer = gguf.load_config(header, path), gguf.load_tokenizer(header, path)
    else:
        config = read_config(path)
        tokenizer = _read_directory_tokenizer(path, config)
    if not tokenizer.has_chat_template:
        raise ModelNotLoaded(
            f"{path} has no chat template, so it is a base model or a part is missing: take the instruct version"
            + ("" if path.is_file() else ", or add chat_template.jinja")
        )
    seeing, blind = _read_processor(path, config, name, pictures)
    ends = frozenset(tokenizer.eos_token_ids) | (seeing.ends if seeing else frozenset())
    return LoadedTokenizer(tokenizer, name, _context_length(config, path), ends, seeing, blind)


def _read_processor(path: Path, config: dict[str, Any], name: str, pictures: Bounds) -> tuple[Processor | None, str]:
    """Return the processor of pictures, or None and why there is none."""
    if path.is_file() or not processor.has_tower(config):
        return None, TEXT_ONLY
    if not processor.installed():
        return None, f"the worker lacks the part that reads pictures; install it there: {processor.INSTALL}"
    try:
        return processor.load(path, config, name, pictures), ""
    except ModelNotLoaded as error:
        return None, str(error)


def _read_directory_tokenizer(path: Path, config: dict[str, Any]) -> TokenizerWrapper:
    if not any(file for name in _TOKENIZER_FILES for file in path.glob(name)):
        raise ModelNotLoaded(f"{path} has no tokenizer ({', '.join(_TOKENIZER_FILES)}): copy it from the model's page")
    try:
        # Without trust_remote_code, transformers asks on the terminal whether to run the model's own code.
        never: dict[str, Any] = {"trust_remote_code": False}
        ends = config.get("eos_token_id")
        tokenizer: TokenizerWrapper = mlx_lm.utils.load_tokenizer(path, never, ends)  # type: ignore[no-untyped-call]
        beside = path / "chat_template.json"  # where vision models have it, and transformers' tokenizers do not look
        if not tokenizer.has_chat_template and beside.exists():
            never["chat_template"] = json.loads(beside.read_text())["chat_template"]
            tokenizer = mlx_lm.utils.load_tokenizer(path, never, ends)  # type: ignore[no-untyped-call]
    except (Exception, SystemExit) as error:  # Exception itself: tokenizers, for a broken file; SystemExit: see `brief`
        raise ModelNotLoaded(f"cannot load the tokenizer of {path}: {brief(error)}; download it again") from error
    return tokenizer


def _context_length(config: dict[str, Any], path: Path) -> int:
    for part in (config, config.get("text_config") or {}):
        for key in _CONTEXT_KEYS:
            if isinstance(part.get(key), int):
                return int(part[key])
    raise ModelNotLoaded(
        f"the config of {path} names no context length: set max_position_embeddings in it to the longest prompt plus "
        "answer, in tokens, that the model should take"
    )


# -- files ---------------------------------------------------------------------------------------------------------


def find(path_or_id: str) -> tuple[Path, str]:
    """Return a directory or a file that exists, and the model's name."""
    path = Path(os.path.abspath(Path(path_or_id).expanduser()))  # keeps the name of a symbolic link
    if path.is_dir():
        return path, path.name
    if path.exists():
        return path, path.name.removesuffix(".gguf")
    if not _HUB_ID.fullmatch(path_or_id):
        raise ModelNotLoaded(
            f"MLX_MODEL_PATH={path_or_id!r} does not exist: give a directory, a .gguf file or a hub id (owner/name)"
        )
    try:
        return mlx_lm.utils._download(path_or_id), path_or_id  # what mlx_lm.load does with a hub id
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        raise ModelNotLoaded(
            f"MLX_MODEL_PATH={path_or_id!r} is neither a path that exists nor a model that could be fetched from the "
            f"hub ({brief(error)}): check the spelling and the network, or download it and give its directory"
        ) from error


def read_config(directory: Path) -> dict[str, Any]:
    """Return what a model directory's config.json says; it names a type."""
    try:
        config = mlx_lm.utils.load_config(directory)
        if not isinstance(config.get("model_type"), str):
            raise ValueError("it has no model_type")
    except FileNotFoundError as error:
        raise ModelNotLoaded(f"{directory} has no config.json{hint(directory)}") from error
    except (OSError, ValueError, AttributeError) as error:
        raise ModelNotLoaded(f"cannot read {directory}/config.json: {brief(error)}; download it again") from error
    return dict(config)


def hint(directory: Path) -> str:
    """Say what to do about a file that is not in a model directory."""
    inside = sorted(directory.glob("*.gguf"))
    if inside:
        return f": to load the file in it, set MLX_MODEL_PATH={inside[0]}"
    return ": a model directory holds config.json, model*.safetensors and tokenizer files, as on the hub"


def brief(error: BaseException) -> str:
    """Return a library's words on one line, not too long."""
    if isinstance(error, SystemExit):
        return "mlx-lm needs a package for it that is not installed"
    return " ".join(str(error).split())[:_MAX_REASON]
