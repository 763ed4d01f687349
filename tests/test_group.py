"""The order of the waiting jobs, and the depths at which others leave a prompt."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.group import Chosen, Plan, Waiting
from worker.sequence import Tokens

LEVEL_TOKENS = (1024, 512, 2048, 64)  # systems, few-shots, documents, questions
Path = tuple[int, ...]

prompts = st.lists(st.integers(0, 2), min_size=1, max_size=8).map(tuple)
queues_of_prompts = st.lists(st.tuples(prompts, st.integers(0, 1)), max_size=12)


def waiting(*token_lists: Sequence[int], queue: int = 0) -> list[Waiting]:
    return [Waiting(str(number), tokens(items), queue) for number, items in enumerate(token_lists)]


def tokens(items: Iterable[int]) -> Tokens:
    return np.array(list(items), np.int32)


def ids(chosen: Sequence[Chosen]) -> list[str]:
    return [choice.id for choice in chosen]


def shared(left: Sequence[int], right: Sequence[int]) -> int:
    return next((at for at, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def tree_of_prompts(seed: int) -> tuple[list[Path], dict[str, Tokens]]:
    """Make 8 systems x 4 few-shots x 8 documents x 4 questions, in random order of arrival."""
    rng = np.random.default_rng(seed)
    paths: list[Path] = [(s, f, d, q) for s in range(8) for f in range(4) for d in range(8) for q in range(4)]
    texts = {path[: level + 1]: rng.integers(0, 49_152, LEVEL_TOKENS[level]) for path in paths for level in range(4)}
    random.Random(seed).shuffle(paths)
    pieces = {path: [texts[path[: level + 1]] for level in range(4)] for path in paths}
    return paths, {str(path): np.concatenate(parts).astype(np.int32) for path, parts in pieces.items()}


def computed_tokens(order: Sequence[Path], budget_tokens: int) -> int:
    """Count what a cache computes that evicts its least recently used leaf that the present prompt does not need."""
    used_at: dict[Path, int] = {}
    held = computed = 0
    for now, job in enumerate(order):
        nodes = [job[: level + 1] for level in range(4)]
        missing = [node for node in nodes if node not in used_at]
        used_at |= {node: now for node in nodes if node in used_at}
        for node in missing:
            size = LEVEL_TOKENS[len(node) - 1]
            while held + size > budget_tokens:
                parents = {other[:-1] for other in used_at}
                leaf = min((n for n in used_at if n not in parents and n not in nodes), key=used_at.__getitem__)
                held -= LEVEL_TOKENS[len(leaf) - 1]
                del used_at[leaf]
            used_at[node] = now
            held += size
            computed += size
    return computed


def run_through_window(paths: Sequence[Path], prompts_: dict[str, Tokens], window_jobs: int) -> list[Path]:
    """Run one job at a time; another one arrives for each that was taken."""
    by_id = {str(path): path for path in paths}
    arriving = [Waiting(str(path), prompts_[str(path)]) for path in paths]
    plan = Plan()
    plan.add(arriving[:window_jobs])
    order: list[Path] = []
    while len(plan):
        more = window_jobs + len(order) < len(arriving)
        (choice,) = plan.next(1, more=more)
        plan.remove([choice.id])
        order.append(by_id[choice.id])
        plan.add(arriving[window_jobs + len(order) - 1 : window_jobs + len(order)])
    return order


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_distinct_token_is_computed_once_when_the_window_holds_the_queue(seed: int) -> None:
    paths, prompts_ = tree_of_prompts(seed)
    plan = Plan()
    plan.add(Waiting(str(path), prompts_[str(path)]) for path in paths)
    distinct = plan.num_bytes // 4
    by_id = {str(path): path for path in paths}
    order = [by_id[choice.id] for choice in plan.next(len(paths))]
    assert distinct == 614_400
    assert computed_tokens(order, budget_tokens=sum(LEVEL_TOKENS)) == distinct
    assert computed_tokens(paths, budget_tokens=sum(LEVEL_TOKENS)) > 5 * distinct  # the order of arrival


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_a_window_of_256_jobs_computes_at_most_1_95_times_the_distinct_tokens(seed: int) -> None:
    paths, prompts_ = tree_of_prompts(seed)
    order = run_through_window(paths, prompts_, window_jobs=256)
    assert sorted(order) == sorted(paths)
    assert computed_tokens(order, budget_tokens=sum(LEVEL_TOKENS)) <= 1.95 * 614_400


def test_planning_a_job_costs_the_same_with_ten_times_as_many_waiting() -> None:
    def plan_all(num_jobs: int) -> float:
        rng = np.random.default_rng(0)
        heads = rng.integers(0, 49_152, (100, 900), dtype=np.int32)
        tails = rng.integers(0, 49_152, (num_jobs, 100), dtype=np.int32)
        jobs = [Waiting(str(n), np.concatenate([heads[n % 100], tail])) for n, tail in enumerate(tails)]
        began = time.process_time()
        plan = Plan()
        plan.add(jobs)
        assert plan.num_bytes <= heads.nbytes + tails.nbytes  # a shared prefix is held once
        while len(plan):
            plan.remove(choice.id for choice in plan.next(8))
        return time.process_time() - began

    assert plan_all(10_000) < 30 * min(plan_all(1_000) for _ in range(3))


@given(queues_of_prompts, st.integers(1, 5), st.data())
def test_branches_are_the_common_lengths_with_all_other_known_prompts(
    items: list[tuple[Path, int]], batch: int, data: st.DataObject
) -> None:
    plan = Plan(2, min_branch_tokens=2)
    known: dict[str, Path] = {}
    for number, (prompt, queue) in enumerate(items):
        known[str(number)] = prompt
        plan.add([Waiting(str(number), tokens(prompt), queue)])
    while len(plan):
        for choice in plan.next(batch):
            prompt = known[choice.id]
            lengths = {min(shared(prompt, other), len(prompt) - 1) for id_, other in known.items() if id_ != choice.id}
            assert choice.tokens.tolist() == list(prompt)
            assert choice.branches == tuple(sorted(depth for depth in lengths if depth >= 2))
        gone = data.draw(st.sets(st.sampled_from(sorted(known)))) if known else set()
        plan.remove(gone)
        for job_id in gone:
            del known[job_id]
        queue_of = {job_id: items[int(job_id)][1] for job_id in known}
        distinct = {(queue_of[job_id], prompt[: n + 1]) for job_id, prompt in known.items() for n in range(len(prompt))}
        assert plan.num_bytes == 4 * len(distinct)
    plan.remove(known)
    assert plan.num_bytes == 0


@given(st.lists(prompts, max_size=12))
def test_a_prefix_is_never_left_while_jobs_below_it_wait(items: list[Path]) -> None:
    plan = Plan()
    plan.add(waiting(*items))
    order = [items[int(choice.id)] for choice in plan.next(len(items))]
    assert sorted(order) == sorted(items)
    for depth in range(1, 9):  # the jobs below one prefix are one uninterrupted run
        visits = [prompt[:depth] for prompt in order if len(prompt) >= depth]
        runs = [prefix for at, prefix in enumerate(visits) if at == 0 or visits[at - 1] != prefix]
        assert len(runs) == len(set(runs))


def test_the_largest_subtree_goes_first_and_is_finished_before_the_next() -> None:
    plan = Plan()
    plan.add(waiting([1, 1], [2, 1], [2, 2], [2, 3], [3, 1], [3, 2]))
    assert ids(plan.next(6)) == ["1", "2", "3", "4", "5", "0"]


def test_a_job_that_arrives_in_the_subtree_being_run_goes_before_others() -> None:
    plan = Plan()
    plan.add(waiting([1, 1], [1, 2], [2, 1], [2, 2], [2, 3]))
    assert ids(plan.next(3)) == ["2", "3", "4"]
    plan.add([Waiting("late", tokens([2, 9]))])
    assert ids(plan.next(2)) == ["late", "0"]


def test_a_queue_of_higher_priority_goes_first_and_shares_branches_with_the_lower() -> None:
    plan = Plan(2, min_branch_tokens=2)
    plan.add([Waiting("low", tokens([1, 1, 1, 1]), 1), Waiting("low too", tokens([1, 1, 1, 2]), 1)])
    plan.add([Waiting("high", tokens([1, 1, 5, 5]), 0)])
    first, second, third = plan.next(3)
    assert [first.id, second.id, third.id] == ["high", "low", "low too"]
    assert first.branches == (2,)
    assert second.branches == (2, 3)


def test_equal_prompts_share_all_but_their_last_token() -> None:
    plan = Plan(min_branch_tokens=1)
    plan.add(waiting([1, 2, 3], [1, 2, 3]))
    assert [choice.branches for choice in plan.next(2)] == [(2,), (2,)]


def test_pieces_shorter_than_the_minimum_are_no_branches() -> None:
    plan = Plan()
    plan.add(waiting([*range(15), 50], [*range(15), 60, 61], [*range(15), 60, 62]))
    assert {choice.id: choice.branches for choice in plan.next(3)} == {"0": (), "1": (16,), "2": (16,)}


def test_no_job_is_passed_by_more_later_arrivals_than_allowed() -> None:
    plan = Plan(max_passed=3)
    plan.add([Waiting("alone", tokens([9, 9]))])
    plan.add([Waiting(str(number), tokens([1, number])) for number in range(4)])
    order: list[str] = []
    for number in range(4, 10):
        order += ids(plan.next(1))
        plan.add([Waiting(str(number), tokens([1, number]))])
    assert order.index("alone") == 3


def test_a_thin_subtree_is_left_for_a_large_group_only_while_more_jobs_are_to_come() -> None:
    here, there = [1] * 10, [2] * 10
    family = [[*there, *[3] * 80, last] for last in range(9)]
    for more, following in ((True, "2"), (False, "1")):
        plan = Plan()
        plan.add(waiting([*here, *[4] * 80], [*here, *[5] * 80], *family[:1]))
        plan.next(1)
        plan.add(Waiting(f"family {n}", tokens(prompt)) for n, prompt in enumerate(family[1:]))
        assert ids(plan.next(1, more=more)) == [following]


def test_a_job_that_was_removed_is_not_offered_and_is_new_when_it_comes_again() -> None:
    plan = Plan()
    plan.add(waiting([1, 1], [1, 2]))
    plan.remove(["0", "unknown"])
    assert "0" not in plan
    assert ids(plan.next(2)) == ["1"]
    plan.remove(["1"])
    plan.add([Waiting("1", tokens([7]))])
    assert [choice.tokens.tolist() for choice in plan.next(1)] == [[7]]


def test_an_offered_job_counts_for_the_branches_of_others_until_it_is_removed() -> None:
    plan = Plan(min_branch_tokens=1)
    plan.add(waiting([1, 1, 1], [1, 1, 2], [1, 2, 2]))
    (first,) = plan.next(1)
    (second,) = plan.next(1)
    plan.remove([first.id, second.id])
    (third,) = plan.next(1)
    assert [first.branches, second.branches, third.branches] == [(1, 2), (1, 2), ()]


def test_a_plan_that_lives_long_does_not_grow() -> None:
    plan = Plan()
    rng = random.Random(0)
    for number in range(5_000):
        plan.add([Waiting(str(number), tokens([rng.randrange(5), rng.randrange(5), number]))])
        if number >= 20:
            plan.remove(ids(plan.next(1)))
    (queue,) = plan._queues
    assert len(plan) == 20
    root = queue._trie.root
    assert root.ranks is None or len(root.ranks) <= 4 * 5 + 16
