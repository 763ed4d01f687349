"""Pictures in the engine: a model of mlx-vlm that is called like one of mlx-lm, and what a row with pictures feeds it.

The engine's rows, batch and tree know tokens. Here the tokens of a picture become embeddings, computed once for each
picture, and rows get positions of their own where the model's follow height and width. Knows no queue and no tree.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import KVCache, make_prompt_cache
from numpy.typing import NDArray
from PIL import Image

from common import pictures
from common.errors import InternalError, Unsupported
from common.messages import Sampling
from worker.probe import off
from worker.processor import Processor, place
from worker.recent import Recent
from worker.sequence import Picture, Prompt, Tokens

Positions = NDArray[np.int32]
Inputs = dict[str, mx.array]
_EMBEDDED = ("inputs_embeds", "position_ids", "rope_deltas")  # of what mlx-vlm makes of a picture


class VisionModel(Module):
    """A model of mlx-vlm in mlx-lm's form: tokens and caches in, logits out.

    mlx-vlm keeps the positions of what ran last on the model, which is wrong for rows that differ and for a text after
    a picture; so positions are passed with every call of a model that has any.
    """

    def __init__(self, inner: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inner = inner
        self._in_space = hasattr(inner.language_model, "get_rope_index")

    @property
    def layers(self) -> Any:
        """The layers of the language model."""
        return self.inner.layers

    @property
    def in_space(self) -> bool:
        """Whether positions have three parts (M-RoPE)."""
        return self._in_space

    def make_cache(self) -> list[Any]:
        """Return caches for one row: the model's own kinds, else plain ones."""
        language = self.inner.language_model
        if hasattr(language, "make_cache"):
            return list(language.make_cache())
        return [KVCache() for _ in self.layers]  # type: ignore[no-untyped-call]

    def embed(self, ids: mx.array) -> mx.array:
        """Return the embeddings of text, [B, L, D]."""
        return self.inner.get_input_embeddings(ids).inputs_embeds  # type: ignore[no-any-return]

    def __call__(
        self,
        inputs: mx.array,
        cache: Any = None,
        inputs_embeds: mx.array | None = None,
        position_ids: mx.array | None = None,
    ) -> mx.array:
        """Return logits [B, L, V] for tokens [B, L], or their embeddings; `position_ids` are [3, B, L]."""
        options: dict[str, Any] = {}
        if self._in_space:
            options["position_ids"] = _plain(inputs, cache) if position_ids is None else position_ids
        out = self.inner.language_model(inputs, inputs_embeds=inputs_embeds, cache=cache, **options)
        return out.logits  # type: ignore[no-any-return]


def _plain(inputs: mx.array, cache: Any) -> mx.array:
    """Return the positions of text, whatever the rows' offsets."""
    starts = mx.array(cache[0].offset if cache else 0).reshape(-1, 1)
    rows, columns = inputs.shape
    return mx.broadcast_to((starts + mx.arange(columns))[None], (3, rows, columns))


@dataclass(frozen=True, slots=True)
class View:
    """One row's pictures.

    Attributes:
        positions: [3, P] of the prompt's tokens, and `delta` to add to the depth of all later ones; None where a
            position is a token's depth.
    """

    pictures: tuple[Picture, ...]
    positions: Positions | None = None
    delta: int = 0

    def at(self, start: int, count: int) -> Positions:
        """Return the positions of `count` tokens from depth `start`."""
        assert self.positions is not None
        known = self.positions[:, start : start + count]
        later = np.arange(start, start + count, dtype=np.int32)[known.shape[1] :] + self.delta
        return np.concatenate([known, np.broadcast_to(later, (3, len(later)))], axis=1)


class Sight:
    """Pictures of one model: features, each computed once while it is held, and positions. Not thread-safe.

    Attributes:
        runs: how often the vision tower ran.
    """

    def __init__(self, model: VisionModel, processor: Processor, max_bytes: int) -> None:
        self.runs = 0
        self._model, self._processor = model, processor
        self._features: Recent[mx.array] = Recent(max_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes of the features held."""
        return self._features.nbytes

    def view(self, prompt: Prompt) -> View:
        """Return how a row sees its pictures."""
        if not self._model.in_space:
            return View(prompt.pictures)
        ids = prompt.tokens.copy()
        for picture in prompt.pictures:
            ids[picture.start : picture.stop] = picture.ids
        grids = mx.array([picture.grid for picture in prompt.pictures])
        positions, delta = self._model.inner.language_model.get_rope_index(mx.array(ids)[None], image_grid_thw=grids)
        return View(prompt.pictures, np.array(positions[:, 0]).astype(np.int32), int(np.array(delta).reshape(-1)[0]))

    def inputs(self, views: Sequence[View | None], starts: Sequence[int], block: Tokens) -> Inputs:
        """Return what the model is fed for tokens [B, L] beside them, row b's from depth `starts[b]`.

        The keys in `block` that stand for pictures are replaced by the model's tokens. None is a row of text.
        """
        fed: Inputs = {}
        seen = _spans(views, starts, block)
        if seen:
            embedded = self._model.embed(mx.array(block))
            for row, begin, end, picture, skip in seen:
                embedded[row, begin:end] = self._feature(picture)[skip : skip + end - begin].astype(embedded.dtype)
            fed["inputs_embeds"] = embedded
        if self._model.in_space:
            count = block.shape[1]
            lines = [
                np.broadcast_to(np.arange(start, start + count, dtype=np.int32), (3, count))
                if view is None
                else view.at(start, count)
                for view, start in zip(views, starts, strict=True)
            ]
            fed["position_ids"] = mx.array(np.stack(lines, axis=1))
        return fed

    def _feature(self, picture: Picture) -> mx.array:
        """Return a picture's embeddings, [n, D]."""
        held = self._features.get(picture.digest)
        if held is not None:
            return held
        out = self._model.inner.get_input_embeddings(mx.array(picture.ids)[None], **self.pixels(picture))
        more = [name for name, value in vars(out).items() if value is not None and name not in _EMBEDDED]
        if more:
            raise Unsupported(f"its pictures come with {more[0]}, which is not supported here")
        feature: mx.array = out.inputs_embeds[0]
        mx.eval(feature)
        self.runs += 1
        self._features.put(picture.digest, feature, feature.nbytes)
        return feature

    def pixels(self, picture: Picture) -> Inputs:
        """Return what the model takes of a picture beside its tokens."""
        ids, inputs = self._processor.pixels(picture.digest, picture.data)
        if not np.array_equal(ids, picture.ids):
            raise InternalError(
                f"the picture {picture.digest[:12]} has {len(ids)} tokens here, {len(picture.ids)} there"
            )
        return inputs


def _spans(
    views: Sequence[View | None], starts: Sequence[int], block: Tokens
) -> list[tuple[int, int, int, Picture, int]]:
    """Return (row, first column, last column, picture, tokens of it before) for the pictures in a block.

    Writes their tokens into it.
    """
    found = []
    for row, (view, start) in enumerate(zip(views, starts, strict=True)):
        for picture in view.pictures if view else ():
            begin, end = max(picture.start, start), min(picture.stop, start + block.shape[1])
            if begin < end:
                skip = begin - picture.start
                block[row, begin - start : end - start] = picture.ids[skip : skip + end - begin]
                found.append((row, begin - start, end - start, picture, skip))
    return found


def load(path: Path) -> VisionModel:
    """Load a model directory lazily, as stored."""
    from mlx_vlm.utils import load_model

    return VisionModel(load_model(path, lazy=True))


def try_out(model: VisionModel, processor: Processor) -> None:
    """Run a small picture between words, in pieces and as mlx-vlm does.

    Raises:
        Unsupported: the model takes more of a picture than embeddings and positions, keeps more than plain KV, or the
            results differ.
    """
    kinds = sorted({type(cache).__name__ for cache in make_prompt_cache(model)} - {KVCache.__name__})
    if kinds:
        raise Unsupported(f"it keeps {', '.join(kinds)} of a prompt, and pictures are taken where all is plain KVCache")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    digest, file = pictures.digest(*image.size, image.tobytes()), io.BytesIO()
    image.save(file, "PNG")
    layout = processor.layout(digest, lambda _: file.getvalue())
    begin = getattr(model.inner.config, "vision_start_token_id", 1)
    words = np.array([1, 2, begin, processor.placeholder, 3, 4, 5], np.int32)
    tokens, placed = place(words, [digest], [layout], processor.placeholder)
    seen = replace(placed[0], data=file.getvalue())
    sight = Sight(model, processor, 0)
    ours = _in_pieces(model, sight, Prompt(tokens, Sampling(), pictures=(seen,)))
    theirs = _at_once(model, sight, seen, tokens)
    if not off(ours, theirs) <= 1:
        raise Unsupported("its results change when a picture is computed in pieces")


def _in_pieces(model: VisionModel, sight: Sight, prompt: Prompt) -> mx.array:
    """Return the last logits of a prompt that is cut in the middle of its picture and before its last token."""
    cache, view = make_prompt_cache(model), sight.view(prompt)
    (picture,) = prompt.pictures
    cuts = [0, (picture.start + picture.stop) // 2, len(prompt.tokens) - 1, len(prompt.tokens)]
    for start, stop in itertools.pairwise(cuts):
        block = prompt.tokens[None, start:stop].copy()
        logits = model(mx.array(block), cache=cache, **sight.inputs([view], [start], block))
    return logits[:, -1]


def _at_once(model: VisionModel, sight: Sight, picture: Picture, tokens: Tokens) -> mx.array:
    """Return the last logits as mlx-vlm computes them."""
    ids = tokens.copy()
    ids[picture.start : picture.stop] = picture.ids
    inputs = sight.pixels(picture)
    return model.inner(mx.array(ids)[None], cache=make_prompt_cache(model), **inputs).logits[:, -1]  # type: ignore[no-any-return]
