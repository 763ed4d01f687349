"""Lists are cut by count and by bytes, and lose nothing."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from common.pieces import pieces


@given(st.lists(st.integers(0, 20), max_size=40), st.integers(1, 30), st.integers(1, 8))
def test_pieces_are_within_bounds_full_and_together_the_list(sizes: list[int], most_bytes: int, most: int) -> None:
    cut = list(pieces(sizes, int, most_bytes, most))
    assert [size for piece in cut for size in piece] == sizes
    assert all(len(piece) == 1 or (len(piece) <= most and sum(piece) <= most_bytes) for piece in cut)
    for piece, following in zip(cut, cut[1:], strict=False):
        assert len(piece) == most or sum(piece) + following[0] > most_bytes
