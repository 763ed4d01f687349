"""What a picture becomes in a prompt: mlx-vlm's processor of one model, run once per picture. Computes no model.

Used in two processes: where prompts are made, for the tokens that a picture takes; where they run, for its pixels.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from common.errors import ModelNotLoaded, Unsupported
from common.settings import Settings
from worker.pictures import decode, missing
from worker.recent import Recent
from worker.sequence import Picture, Tokens

INSTALL = "pip install 'radixq[vision]'"
LEAST_TOKENS = 4
"""A picture of fewer tokens is refused: its keys, 31 bits each, would not tell it surely from every other."""

_LONG = 10  # times as long as wide: said where a picture is refused, since processors bound it, Qwen2-VL's at 200
_LAYOUT_BYTES = 32 << 20
# What a processor raises over a picture that it does not take; nothing of ours runs in it.
_REFUSED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, OSError)


def has_tower(config: dict[str, Any]) -> bool:
    """Return whether a model's config.json names a vision tower, of a kind that mlx-vlm itself knows.

    One that names code of its own is left to mlx-lm, which refuses it; mlx-vlm would run it.
    """
    return isinstance(config.get("vision_config"), dict) and "model_file" not in config


def installed() -> bool:
    """Return whether mlx-vlm is there, without importing it."""
    return importlib.util.find_spec("mlx_vlm") is not None


def keys(digest: str, count: int) -> Tokens:
    """Return what stands in a prompt's tokens for a picture: negative, 31 bits of the digest each, over and over."""
    words = np.frombuffer(bytes.fromhex(digest), ">u4")
    return np.resize(-1 - (words & 0x7FFFFFFF).astype(np.int64), count).astype(np.int32)


@dataclass(frozen=True, slots=True)
class Layout:
    """What one picture takes in a prompt: see `Picture`."""

    ids: Tokens
    grid: tuple[int, ...]
    nbytes: int = 0


class Pixels(NamedTuple):
    """What the processor makes of one picture: its tokens, int32 [n], and the model's other inputs by name."""

    ids: Tokens
    inputs: dict[str, Any]


class Bounds(NamedTuple):
    """What a picture may have in pixels.

    Attributes:
        taken: at most, or it is refused.
        shown: to the model, which gets a larger picture scaled down; None: as many as the model's own files say.
    """

    taken: int = Settings.model_fields["max_image_pixels"].default
    shown: int | None = None

    @classmethod
    def of(cls, settings: Settings) -> Bounds:
        """Return what the settings say."""
        return cls(settings.max_image_pixels, settings.max_pixels)


class Processor:
    """The processor of one model.

    Attributes:
        placeholder: the token that the chat template writes once for each picture.
        chat_template: for messages with pictures, or None where the tokenizer's serves.
        ends: tokens that end an answer, besides those of the tokenizer.
    """

    def __init__(self, processor: Any, name: str, bounds: Bounds) -> None:
        self._processor, self._name, self._max_pixels = processor, name, bounds.taken
        if bounds.shown is not None:
            _show_at_most(getattr(processor, "image_processor", None), bounds.shown)
        tokenizer = processor.tokenizer
        template = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
        self.chat_template = template if isinstance(template, str) else None
        self._text = _mark(processor, self.chat_template or "")
        self.placeholder = int(tokenizer.convert_tokens_to_ids(self._text)) if self._text else -1
        self.ends = frozenset(int(token) for token in getattr(processor, "additional_eos_token_ids", ()))
        self._layouts: Recent[Layout] = Recent(_LAYOUT_BYTES)

    def layout(self, digest: str, fetch: Callable[[str], bytes | None]) -> Layout:
        """Return what a picture takes in a prompt; `fetch` gets its PNG where it was not seen lately.

        Raises:
            ImageUnreadable, ImageTooLarge: it is gone, or not a picture of that digest.
            Unsupported: the processor refuses it, or makes too few tokens of it.
        """
        known = self._layouts.get(digest)
        if known is not None:
            return known
        data = fetch(digest)
        ids, inputs = self.pixels(digest, data)
        if len(ids) < LEAST_TOKENS:
            raise Unsupported(f"{self._name} makes only {len(ids)} tokens of picture {digest[:12]}; send a larger one")
        grid = inputs.get("image_grid_thw")
        patches = () if grid is None else tuple(int(n) for n in np.array(grid).reshape(-1))
        made = Layout(ids, patches, len(data or b""))
        self._layouts.put(digest, made, ids.nbytes)
        return made

    def pixels(self, digest: str, data: bytes | memoryview | None) -> Pixels:
        """Run the processor on a picture. Raises as `layout`."""
        if data is None:
            raise missing(digest)
        image = decode(digest, data, max_pixels=self._max_pixels)
        try:
            return self._run(image)
        except _REFUSED as error:
            times = max(image.size) // min(image.size)
            shape = f", one side {times:,} times the other" if times >= _LONG else ""
            raise Unsupported(
                f"{self._name} cannot take picture {digest[:12]} of {image.width:,} x {image.height:,} pixels{shape}; "
                f"send it in another shape or size, for example in parts (its processor says: {error})"
            ) from error

    def count(self, width: int, height: int) -> int:
        """Return how many tokens a picture of this size takes."""
        return len(self._run(Image.new("RGB", (width, height))).ids)

    def _run(self, image: Image.Image) -> Pixels:
        made = dict(self._processor(text=[self._text], images=[image], add_special_tokens=False))
        ids = np.array(made.pop("input_ids")).reshape(-1).astype(np.int32)
        made.pop("attention_mask", None)
        return Pixels(ids, made)


def _show_at_most(image_processor: Any, num_pixels: int) -> None:
    """Let a processor scale larger pictures down; one that gives every picture the same size stays as it is."""
    own = getattr(image_processor, "max_pixels", None)
    if own is not None:  # Qwen2-VL and its like
        image_processor.max_pixels = min(own, num_pixels)
        image_processor.min_pixels = min(image_processor.min_pixels, num_pixels)
        return
    edge = _edge(image_processor, "size")
    tile = _edge(image_processor, "max_image_size")
    if edge and tile:  # Idefics 3 and its like: as many tiles as cover the picture, once its longer edge is `edge`
        image_processor.size = {"longest_edge": min(edge, max(1, isqrt(num_pixels) // tile) * tile)}


def _edge(image_processor: Any, name: str) -> int | None:
    return dict(getattr(image_processor, name, None) or {}).get("longest_edge")


def _mark(processor: Any, template: str) -> str:
    """Return the word that stands for a picture before the processor has seen it: the one that the template writes."""
    words = [word for name in ("image_token", "boi_token") if (word := str(getattr(processor, name, None) or ""))]
    return next((word for word in words if word in template), words[0] if words else "")


def place(tokens: Tokens, digests: Iterable[str], layouts: Iterable[Layout], placeholder: int) -> Any:
    """Put pictures where their placeholders are; return the prompt's tokens and its `Picture`s."""
    pieces: list[Tokens] = []
    pictures: list[Picture] = []
    begin = depth = 0
    for at, digest, layout in zip(np.flatnonzero(tokens == placeholder), digests, layouts, strict=True):
        start = depth + int(at) - begin
        depth = start + len(layout.ids)
        pieces += [tokens[begin:at], keys(digest, len(layout.ids))]
        pictures.append(Picture(start, depth, digest, layout.ids, layout.grid, layout.nbytes))
        begin = int(at) + 1
    return np.concatenate([*pieces, tokens[begin:]]), tuple(pictures)


def load(path: Path, config: dict[str, Any], name: str, bounds: Bounds) -> Processor:
    """Load the processor of a model directory.

    Raises:
        ModelNotLoaded: files are missing or not what mlx-vlm expects.
    """
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it says that there is no torch, which is not needed
    from mlx_vlm.utils import get_model_and_args, load_processor

    try:
        get_model_and_args(config)  # whose import tells transformers which class to take
        loaded = load_processor(path, add_detokenizer=False, trust_remote_code=False)  # mlx-vlm's default is to trust
        return Processor(loaded, name, bounds)
    except (*_REFUSED, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelNotLoaded(f"cannot load the picture processor of {path}: {reason}; download it again") from error
