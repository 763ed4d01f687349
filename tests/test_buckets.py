"""Rows in buckets of like length: the fewest, or the best of the most there may be."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from worker.buckets import MOST_BUCKETS, Room, cells, made, most_cells, sorted_rows

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=9)


def free(needed: list[int], groups: list[tuple[int, ...]]) -> int:
    return sum(max(needed[row] for row in rows) * len(rows) - sum(needed[row] for row in rows) for rows in groups)


def least_free(needed: list[int], num_groups: int) -> int:
    """Try all ways to cut the rows, ordered by length."""
    order, count = sorted(range(len(needed)), key=needed.__getitem__), len(needed)
    cuts = combinations(range(1, count), num_groups - 1)
    return min(free(needed, [tuple(order[a:b]) for a, b in pairwise([0, *cut, count])]) for cut in cuts)


@given(LENGTHS, st.integers(0, 120))
def test_there_are_as_few_groups_as_the_bound_allows_and_none_better(needed: list[int], most_free: int) -> None:
    groups = sorted_rows(needed, most_free)
    assert sorted(row for rows in groups for row in rows) == list(range(len(needed)))
    assert free(needed, groups) == least_free(needed, len(groups))
    assert free(needed, groups) <= most_free or len(groups) == min(MOST_BUCKETS, len(needed))
    assert len(groups) == 1 or least_free(needed, len(groups) - 1) > most_free


def test_rows_of_one_length_are_one_group_and_of_many_at_most_eight() -> None:
    assert sorted_rows([5] * 40, 0) == [tuple(range(40))]
    assert len(sorted_rows(list(range(1, 41)), 0)) == MOST_BUCKETS


@pytest.mark.parametrize("roomy", [True, False])
@given(
    rows=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 20)), min_size=1, max_size=12),
    shared=st.tuples(st.integers(0, 3000), st.integers(0, 3000)),
)
@example(rows=[(2, 0), (2, 0), (2, 1), (1, 1)], shared=(0, 0))
def test_what_is_planned_for_covers_the_buffers_that_rows_get_on_their_way(
    rows: list[tuple[int, int]], shared: tuple[int, int], roomy: bool
) -> None:
    """Whatever they need and share by then."""
    needed, limits = [now for now, _ in rows], [now + more for now, more in rows]
    buckets = made(needed, limits, Room(needed, min(shared), roomy=roomy))
    assert most_cells(limits, max(shared), roomy=roomy) >= cells(buckets)
    assert all(held.columns >= needed[row] for held in buckets for row in held.rows)
