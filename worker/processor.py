"""What a picture becomes in a prompt: mlx-vlm's processor of one model, run once per picture. Computes no model.

Used in two processes: where prompts are made, for the tokens that a picture takes; where they run, for its pixels.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from common.errors import ModelNotLoaded, Unsupported
from common.settings import Settings
from worker.pictures import decode, missing
from worker.recent import Recent
from worker.sequence import Picture, Tokens

MAX_PIXELS: Final[int] = Settings.model_fields["max_image_pixels"].default
"""Of a picture, unless the settings say another figure."""

INSTALL = "pip install 'radixq[vision]'"
LEAST_TOKENS = 4
"""A picture of fewer tokens is refused: its keys, 31 bits each, would not tell it surely from every other."""

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


class Processor:
    """The processor of one model.

    Attributes:
        placeholder: the token that the chat template writes once for each picture.
        chat_template: for messages with pictures, or None where the tokenizer's serves.
        ends: tokens that end an answer, besides those of the tokenizer.
    """

    def __init__(self, processor: Any, name: str, max_pixels: int) -> None:
        self._processor, self._name, self._max_pixels = processor, name, max_pixels
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
            made = dict(self._processor(text=[self._text], images=[image], add_special_tokens=False))
            ids = np.array(made.pop("input_ids")).reshape(-1).astype(np.int32)
        except _REFUSED as error:
            raise Unsupported(
                f"{self._name} cannot take picture {digest[:12]} of {image.width} x {image.height} pixels: {error}"
            ) from error
        made.pop("attention_mask", None)
        return Pixels(ids, made)


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


def load(path: Path, config: dict[str, Any], name: str, max_pixels: int) -> Processor:
    """Load the processor of a model directory.

    Raises:
        ModelNotLoaded: files are missing or not what mlx-vlm expects.
    """
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it says that there is no torch, which is not needed
    from mlx_vlm.utils import get_model_and_args, load_processor

    try:
        get_model_and_args(config)  # whose import tells transformers which class to take
        loaded = load_processor(path, add_detokenizer=False, trust_remote_code=False)  # mlx-vlm's default is to trust
        return Processor(loaded, name, max_pixels)
    except (*_REFUSED, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelNotLoaded(f"cannot load the picture processor of {path}: {reason}; download it again") from error
