"""The order of the waiting jobs, and the depths at which others leave a prompt."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterable, Sequence

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worker.group import Chosen, Neighbours, Plan, Waiting
from worker.sequence import Tokens

Path = tuple[int, ...]
Shape = tuple[tuple[int, int], ...]

FOUR_LEVELS: Shape = ((8, 1024), (4, 512), (8, 2048), (4, 64))  # systems, few-shots, documents, questions
LEVEL_TOKENS = tuple(tokens for _, tokens in FOUR_LEVELS)
SHAPES: dict[str, Shape] = {
    "four levels": FOUR_LEVELS,
    "many systems, few questions": ((16, 1024), (8, 512), (4, 1024), (2, 64)),
    "prefixes alone": ((64, 2048), (16, 128)),
    "pairs of long documents": ((4, 256), (128, 3000), (2, 32)),
    "five even levels": ((4, 300), (4, 300), (4, 300), (4, 300), (4, 100)),
    "large heads, small documents": ((4, 2048), (8, 64), (4, 512), (8, 128)),
    "five uneven levels": ((4, 1000), (4, 700), (4, 1500), (4, 400), (4, 50)),
    "few large systems": ((3, 3000), (3, 1000), (20, 600), (6, 40)),
}

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be slow
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


def tree_of_prompts(seed: int, shape: Shape = FOUR_LEVELS) -> tuple[list[Path], dict[str, Tokens]]:
    """Make prompts of a tree, in random order of arrival; `shape` is the number of children and tokens per level."""
    rng = np.random.default_rng(seed)
    paths = list(itertools.product(*(range(num) for num, _ in shape)))
    texts = {
        path[: level + 1]: rng.integers(0, 49_152, shape[level][1]) for path in paths for level in range(len(shape))
    }
    random.Random(seed).shuffle(paths)
    pieces = {path: [texts[path[: level + 1]] for level in range(len(shape))] for path in paths}
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


def beyond_the_last(order: Sequence[Path], shape: Shape) -> int:
    """Count what a cache computes that holds one path: the tokens beyond what a prompt shares with the last."""
    sizes = [size for _, size in shape]
    return sum(sum(sizes[shared(before, job) :]) for before, job in zip([(), *order], order, strict=False))


def run_through_window(
    paths: Sequence[Path], prompts_: dict[str, Tokens], window_jobs: int, *, detours: bool = True
) -> list[Path]:
    """Run one job at a time; another one arrives for each that was taken."""
    by_id = {str(path): path for path in paths}
    arriving = [Waiting(str(path), prompts_[str(path)]) for path in paths]
    plan = Plan()
    plan.add(arriving[:window_jobs])
    order: list[Path] = []
    while len(plan):
        more = detours and window_jobs + len(order) < len(arriving)
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


@pytest.mark.parametrize("seed", [7, 77, 777])
def test_a_window_of_256_jobs_computes_at_most_1_95_times_the_distinct_tokens(seed: int) -> None:
    paths, prompts_ = tree_of_prompts(seed)
    order = run_through_window(paths, prompts_, window_jobs=256)
    assert sorted(order) == sorted(paths)
    assert computed_tokens(order, budget_tokens=sum(LEVEL_TOKENS)) <= 1.95 * 614_400


@pytest.mark.parametrize("name", SHAPES)
def test_detours_cost_no_more_than_finishing_every_subtree_whatever_the_tree(name: str) -> None:
    shape = SHAPES[name]
    paths, prompts_ = tree_of_prompts(len(name), shape)
    with_detours, without = (
        beyond_the_last(run_through_window(paths, prompts_, 256, detours=detours), shape) for detours in (True, False)
    )
    assert with_detours <= 1.02 * without
    assert beyond_the_last(paths, shape) > 1.5 * with_detours  # the order of arrival


def test_a_chain_of_prompts_costs_no_more_per_job_than_a_few_times_that_of_one_ten_times_shorter() -> None:
    def plan_all(num_jobs: int) -> float:
        text = np.arange(num_jobs, dtype=np.int32)
        jobs = [Waiting(str(number), text[: number + 1]) for number in range(num_jobs)]
        random.Random(0).shuffle(jobs)
        began = time.process_time()
        plan = Plan()
        for job in jobs:
            plan.add([job])
        assert plan.num_bytes == text.nbytes
        order: list[str] = []
        while len(plan):
            order += (offered := ids(plan.next(8)))
            plan.remove(offered)
        assert order == [str(number) for number in range(num_jobs)]
        return time.process_time() - began

    assert plan_all(5_000) < 50 * min(plan_all(500) for _ in range(3))  # a walk node by node: 100 times


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


@unhurried
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


@unhurried
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


@unhurried
@given(
    st.lists(st.tuples(prompts, st.integers(0, 3)), min_size=1, max_size=60),
    st.integers(0, 8),
    st.booleans(),
)
def test_whatever_arrives_no_job_is_passed_by_more_later_arrivals_than_allowed(
    items: list[tuple[Path, int]], max_passed: int, more: bool
) -> None:
    plan = Plan(max_passed=max_passed)
    order: list[int] = []
    for number, (prompt, num_offers) in enumerate(items):
        plan.add([Waiting(str(number), tokens(prompt))])
        order += map(int, ids(plan.next(num_offers, more=more)))
    order += map(int, ids(plan.next(len(items))))
    for place, number in enumerate(order):
        assert sum(before > number for before in order[:place]) <= max_passed


# -- several workers ---------------------------------------------------------------------------------------------------


def family(name: str, head: int, num: int) -> list[Waiting]:
    return [Waiting(f"{name}{number}", tokens([1, head, head, number])) for number in range(num)]


def marks(*heads: int) -> frozenset[int]:
    """Return the marks of the turns into the families of these heads."""
    trails = []
    for head in heads:
        plan = Plan()
        plan.add([*family("a", head, 1), Waiting("other", tokens([1, 99]))])
        while plan.next(1)[0].id != "a0":
            pass
        trails.append(plan.trail())
    return frozenset().union(*trails)


def test_a_worker_takes_the_largest_subtree_in_which_no_other_is() -> None:
    plan = Plan()
    plan.add([*family("a", 5, 4), *family("b", 6, 3), *family("c", 7, 2)])
    plan.heed(Neighbours(marks(5)))
    assert ids(plan.next(5)) == ["b0", "b1", "b2", "c0", "c1"]
    assert sorted(ids(plan.next(4))) == ["a0", "a1", "a2", "a3"]  # nothing else is left


def test_when_two_workers_meet_the_junior_leaves() -> None:
    for senior, following in ((marks(5), "b"), (frozenset[int](), "a")):
        plan = Plan()
        plan.add([*family("a", 5, 4), *family("b", 6, 3)])
        assert ids(plan.next(1)) == ["a0"]
        plan.heed(Neighbours(marks(5), senior=senior))
        assert ids(plan.next(1))[0].startswith(following)


def test_a_worker_that_has_nowhere_else_to_go_stays_though_a_senior_is_there() -> None:
    plan = Plan()
    plan.add([*family("a", 5, 4), *family("b", 6, 3)])
    plan.next(1)
    plan.heed(Neighbours(marks(5, 6), senior=marks(5, 6)))
    assert all(job_id.startswith("a") for job_id in ids(plan.next(3)))


def test_a_worker_prefers_prefixes_that_it_holds_and_leaves_those_that_others_hold() -> None:
    plan = Plan()
    plan.add([*family("a", 5, 4), *family("b", 6, 3), *family("c", 7, 2)])
    plan.heed(Neighbours(frozenset(), held=marks(5), own=marks(7)))
    assert [job_id[0] for job_id in ids(plan.next(9))] == [*"cc", *"bbb", *"aaaa"]


def test_workers_that_share_a_subtree_reach_for_different_jobs() -> None:
    def first_jobs(seed: int) -> set[str]:
        plan = Plan(seed=seed)
        plan.add(family("a", 5, 100))
        plan.add([Waiting("other", tokens([2]))])
        plan.next(1)
        plan.heed(Neighbours(plan.trail(), senior=plan.trail()))
        plan.next(1)  # the other one
        return set(ids(plan.next(10)))

    assert len(first_jobs(1) & first_jobs(2)) < 6


@unhurried
@given(st.lists(prompts, max_size=12), st.integers(1, 4), st.data())
def test_with_neighbours_too_every_job_is_offered_once(items: list[Path], batch: int, data: st.DataObject) -> None:
    plan, trails = Plan(), frozenset[int]()
    plan.add(waiting(*items))
    order: list[str] = []
    while len(plan):
        some = st.sets(st.sampled_from(sorted(trails))) if trails else st.just(set())
        running = frozenset(data.draw(some))
        plan.heed(Neighbours(running, senior=frozenset(data.draw(some)) & running, own=trails))
        order += ids(plan.next(batch))
        trails |= plan.trail()
    assert sorted(order) == sorted(str(number) for number in range(len(items)))


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
