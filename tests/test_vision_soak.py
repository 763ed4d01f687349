"""Questions on ten pictures in random order, through a real server and a real worker: each picture is computed once."""

from __future__ import annotations

import pytest

pytest.importorskip("mlx_vlm", reason="radixq[vision] is not installed")

from ops.soak_pictures import SIZES, soak


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_many_questions_on_ten_pictures_see_and_compute_each_once() -> None:
    """One result for each job, and mlx-vlm's text for a sample of them: `soak` sees to that."""
    out = soak(60, seed=1, kv_bytes=1 << 30)
    assert out.vision_runs == len(SIZES)
    assert out.computed_tokens <= 1.05 * out.distinct_tokens


@pytest.mark.long
@pytest.mark.timeout(900)
def test_with_little_room_what_is_held_stays_within_it() -> None:
    out = soak(120, seed=2, kv_bytes=600_000)
    assert out.evicted_nodes > 0
    assert max(out.held["MLX"]) < 2_000_000
