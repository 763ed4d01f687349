"""Pictures in half precision: features are mlx-vlm's own in that type, answers part only at near-ties."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mlx_vlm", reason="radixq[vision] is not installed")

from tests.test_vision import JOBS, TALL
from tests.vision_engines import bench, reference, same
from tests.vision_models import FAMILIES
from worker.vision import Sight, VisionModel


@pytest.mark.parametrize(("dtype", "tie"), [("float16", 0.02), ("bfloat16", 0.1)])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_half_precision_answers_part_from_mlx_vlms_only_where_two_tokens_are_about_as_likely(
    family: str, dtype: str, tie: float
) -> None:
    engine = bench(family, dtype=dtype, max_rows=8)
    assert engine.loaded.dtype == dtype
    got = engine.run({name: engine.prompt(*parts) for name, parts in JOBS.items()})
    for name, parts in JOBS.items():
        theirs, logprobs = engine.alone(*parts)
        assert all(np.isfinite(row).all() for row in logprobs)
        assert same(got[name], theirs, logprobs, tie), f"{name}: {got[name]} for {theirs}"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_half_precision_pictures_become_what_mlx_vlm_makes_of_them(family: str, dtype: str) -> None:
    engine = bench(family, dtype=dtype)
    (shown,) = engine.prompt("see", TALL, "what?").pictures
    assert isinstance(engine.loaded.model, VisionModel)
    assert engine.loaded.processor is not None
    sight = Sight(engine.loaded.model, engine.loaded.processor, 0)
    ours = sight._feature(shown)
    inner, _ = reference(engine.path, dtype)
    theirs = inner.get_input_embeddings(mx.array(shown.ids)[None], **sight.pixels(shown)).inputs_embeds[0]
    assert mx.isfinite(ours).all().item()
    assert mx.array_equal(ours, theirs).item()
