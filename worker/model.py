"""Load the model that MLX_MODEL_PATH names and describe it: cache kinds, bytes per token, context length.

Knows no Redis, no queue and no job. Every way to fail is `ModelNotLoaded`, with the reason and the fix. Importing this
room imports MLX, so `worker.platform.prepare()` comes first; the thread that calls `load` is the one that may compute.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import mlx_lm.utils
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from common.errors import ModelNotLoaded, RadixqError
from common.log import logger
from worker import gguf, processor, reader, vision
from worker.platform import DeviceInfo
from worker.processor import Bounds, Processor
from worker.reader import ANY_PICTURE, TEXT_ONLY, LoadedTokenizer

_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
_SHOW_SUPPORTED = "ls $(python -c 'import mlx_lm.models as m; print(m.__path__[0])')"
_EDGE_BYTES = 1 << 20  # of a weight file, read at its beginning and at its end for the digest
# What mlx-lm and transformers raise for a file that is broken or not what they expect. SystemExit comes from importing
# mlx-lm's olmo without a package that it needs; in a thread it would end the thread without a word.
_LIBRARY_ERRORS = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ImportError, OSError, SystemExit)
M = TypeVar("M", bound=Module)
_IN_PLACE = "they need prefixes that are read in place"
NO_PICTURES = "no pictures: "
"""What begins the note that says why a vision model takes none."""

log = logger("worker.model")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to compute, all arrays evaluated, with what the other rooms ask about it."""

    model: Module = field(repr=False)
    tokenizer: TokenizerWrapper = field(repr=False)
    name: str
    digest: str  # names the content of the files: KV of different digests never mixes
    dtype: str  # of the KV, for example "float32"
    num_layers: int  # that keep something: more than there are where a model runs through them several times
    kv_bytes_per_token: int  # one row, all layers, keys and values
    state_bytes: int  # what a row's cache takes besides, however long it is
    context_length: int
    vocab_size: int  # width of the logits, which may exceed the tokenizer's
    cache_kind: str  # "plain", or the classes of the model's caches
    eos_token_ids: frozenset[int]
    notes: tuple[str, ...]  # what a person should know about how it was loaded
    processor: Processor | None = field(default=None, repr=False)  # if it takes pictures, and `model` a VisionModel
    blind: str = TEXT_ONLY  # why no picture is taken: there is no processor, or prefixes are not read in place


def load(
    path_or_id: str, *, dtype: str | None = None, device: DeviceInfo, pictures: Bounds = ANY_PICTURE
) -> LoadedModel:
    """Load weights and tokenizer of a directory, a hub id or a `.gguf` file, and run one token through them.

    `dtype` is float32, float16, bfloat16 (weights are unpacked to it) or stored; None takes float32 on the CPU, unless
    that needs more than half of the memory, and stored on Metal.
    """
    path, name = reader.find(path_or_id)
    read = reader.read(path, name, pictures)
    digest = _digest(path)  # before MLX opens the files: where a disk hangs, it would hold Python's lock, and so all
    seeing, blind = _with_pictures(path, read, dtype, device) if read.processor else (None, read.blind)
    model, notes = seeing or _evaluated(*_read_model(path), dtype, device)
    if seeing is None and _has_tower(path):
        notes += (f"{NO_PICTURES}{blind}",)
    return LoadedModel(
        model=model,
        processor=read.processor if seeing else None,
        blind=blind,
        tokenizer=read.tokenizer,
        name=name,
        digest=digest,
        context_length=read.context_length,
        eos_token_ids=read.eos_token_ids,
        notes=notes,
        **_run_one_token(model, path),
    )


def skeleton(path_or_id: str) -> tuple[LoadedTokenizer, Module]:
    """Return tokenizer and model with no weight read: enough to see what kinds of cache it has."""
    path, name = reader.find(path_or_id)
    read = reader.read(path, name, ANY_PICTURE)
    if read.processor is not None:
        with contextlib.suppress(*_LIBRARY_ERRORS):
            return read, vision.load(path)
    return read, _read_model(path)[0]


def _with_pictures(
    path: Path, read: LoadedTokenizer, dtype: str | None, device: DeviceInfo
) -> tuple[tuple[Module, tuple[str, ...]] | None, str]:
    """Return mlx-vlm's model and its notes, or None if pictures or text come out wrong; and why no picture is taken."""
    assert read.processor is not None
    try:
        model, notes = _evaluated(vision.load(path), None, dtype, device)
        vision.try_out(model, read.processor)
    except RadixqError as error:
        return None, reader.brief(error)
    except _LIBRARY_ERRORS as error:
        log.exception("this model cannot take pictures here")
        return None, reader.brief(error)
    return (model, notes), _IN_PLACE


def _evaluated(model: M, native: mx.Dtype | None, dtype: str | None, device: DeviceInfo) -> tuple[M, tuple[str, ...]]:
    """Bring a model's weights to their type and into memory."""
    target, notes = _choose_dtype(model, dtype, device)
    _convert(model, target, native)
    mx.eval(model.parameters())  # type: ignore[no-untyped-call]
    return model, notes


def _has_tower(path: Path) -> bool:
    return path.is_dir() and processor.has_tower(reader.read_config(path))


def _digest(path: Path) -> str:
    """Hash names, sizes and content; of weight files the first and last megabyte, to stay under a second."""
    try:
        return _hashed(path)
    except OSError as error:
        raise ModelNotLoaded(f"cannot load the weights of {path}: {reader.brief(error)}; download it again") from error


def _hashed(path: Path) -> str:
    names = ("*.json", "*.safetensors", "*.model", "*.jinja")
    files = [path] if path.is_file() else sorted({file for name in names for file in path.glob(name)})
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as content:
            if file.suffix not in (".safetensors", ".gguf"):
                digest.update(content.read())
                continue
            digest.update(content.read(_EDGE_BYTES))
            content.seek(max(0, size - _EDGE_BYTES))
            digest.update(content.read())
    return digest.hexdigest()


# -- weights -------------------------------------------------------------------------------------------------------


def _read_model(path: Path) -> tuple[Module, mx.Dtype | None]:
    """Return the model as stored, lazily, and the dtype to bring its floats to where the file mixes them."""
    if path.is_file():
        header = gguf.read_header(path)
        return gguf.load_model(header, path), header.float_dtype
    model_type = reader.read_config(path)["model_type"]
    try:
        return mlx_lm.utils.load_model(path, lazy=True)[0], None
    except FileNotFoundError as error:
        raise ModelNotLoaded(f"{path} has no model*.safetensors{reader.hint(path)}") from error
    except _LIBRARY_ERRORS as error:
        if f"Model type {model_type} not supported" in str(error):
            raise ModelNotLoaded(
                f"{path} is of type {model_type!r}, which mlx-lm {mlx_lm.__version__} does not know; "
                f"see what it knows: {_SHOW_SUPPORTED}"
            ) from error
        raise ModelNotLoaded(f"cannot load the weights of {path}: {reader.brief(error)}; download it again") from error


def _choose_dtype(model: Module, dtype: str | None, device: DeviceInfo) -> tuple[str, tuple[str, ...]]:
    """Return the name of a dtype, or `stored`, and what there is to say about the choice."""
    if dtype is not None:
        return dtype, ()
    if device.kind == "metal":
        return "stored", ()
    if any("global_scale" in module for module in model.modules()):  # type: ignore[no-untyped-call]
        return "stored", ("its NVFP4 weights cannot be unpacked by mlx-lm, so they stay as stored",)
    num_parameters: int = mlx_lm.utils.get_total_parameters(model)  # type: ignore[no-untyped-call]
    needed, limit = 4 * num_parameters, device.total_memory_bytes // 2
    if needed > limit:
        return "stored", (
            f"float32 would take {needed / 1e9:.1f} GB, more than half of the memory ({limit / 1e9:.1f} GB): weights "
            "stay as stored, which is slower on the CPU; RADIXQ_DTYPE=float32 unpacks them all the same",
        )
    return "float32", ()


def _convert(model: Module, target: str, native: mx.Dtype | None) -> None:
    if target == "stored":
        if native is not None:
            model.set_dtype(native)
        return
    model.set_dtype(_DTYPES[target])  # first the scales, so that unpacking rounds only once
    mlx_lm.utils.dequantize_model(model)
    model.set_dtype(_DTYPES[target])


def _run_one_token(model: Module, path: Path) -> dict[str, Any]:
    """Measure what the model really caches and returns; leaves no memory behind."""
    try:
        cache = make_prompt_cache(model)
        logits = model(mx.zeros((1, 1), mx.int32), cache=cache)
        mx.eval(logits)
    except _LIBRARY_ERRORS as error:
        raise ModelNotLoaded(f"the model of {path} cannot compute one token: {reader.brief(error)}") from error
    kinds = sorted({type(layer).__name__ for layer in cache})
    keys_and_values = [(leaf.keys, leaf.values) for leaf in _leaves(cache) if getattr(leaf, "keys", None) is not None]
    dtype = keys_and_values[0][0].dtype if keys_and_values else logits.dtype
    measured = {
        "num_layers": len(cache),
        "dtype": str(dtype).removeprefix("mlx.core."),
        # [B, H, T, D]; T is what the cache allocated, more than the one token in it
        "kv_bytes_per_token": sum(part.nbytes // part.shape[2] for pair in keys_and_values for part in pair),
        "state_bytes": sum(x.nbytes for leaf in _leaves(cache) for x in _arrays(getattr(leaf, "cache", None))),
        "vocab_size": logits.shape[-1],
        "cache_kind": "plain" if kinds == ["KVCache"] else ", ".join(kinds),
    }
    del cache, logits, keys_and_values
    mx.clear_cache()
    return measured


def _arrays(held: Any) -> list[mx.array]:
    """Return the arrays of a state that does not grow (mlx-lm's ArraysCache keeps a list of them)."""
    return [x for x in held or () if isinstance(x, mx.array)]


def _leaves(cache: Any) -> Iterator[Any]:
    for layer in cache:
        yield from _leaves(layer.caches) if hasattr(layer, "caches") else (layer,)
