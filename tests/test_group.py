"""The order of the waiting jobs, and the depths at which others leave a prompt."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worker.group import Chosen, Neighbours, Plan, Waiting
from worker.sequence import Tokens
from worker.trie import WIDTH

Path = tuple[int, ...]

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


@unhurried
@given(st.lists(st.tuples(prompts, st.integers(0, 1), st.integers(0, 3)), max_size=30), st.booleans(), st.data())
def test_the_last_prompt_is_followed_as_far_as_jobs_wait_on_its_way(
    items: list[tuple[Path, int, int]], more: bool, data: st.DataObject
) -> None:
    plan = Plan(2)
    prompt_of: dict[str, Path] = {}
    last: Path = ()
    for number, (prompt, queue, num_offers) in enumerate(items):
        prompt_of[str(number)] = prompt
        plan.add([Waiting(str(number), tokens(prompt), queue)])
        for _ in range(num_offers):
            open_ = {i for i in prompt_of if not plan._home[i]._jobs[i].offered}
            first = {i for i in open_ if plan._home[i] is plan._queues[0]} or open_
            lengths = {i: shared(last, prompt_of[i]) for i in first}
            for choice in plan.next(1, more=more):
                assert more or lengths[choice.id] == max(lengths.values())
                last = prompt_of[choice.id]
        gone = data.draw(st.sets(st.sampled_from(sorted(prompt_of))))
        plan.remove(gone)
        for job_id in gone:
            del prompt_of[job_id]


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


def test_a_prompt_that_agrees_with_the_last_one_is_found_where_nodes_were_joined() -> None:
    plan = Plan(min_branch_tokens=1)
    plan.add([Waiting("last", tokens([1, 2, 3, 4, 5])), Waiting("other", tokens([1, 9, 9]))])
    assert ids(plan.next(1)) == ["last"]
    plan.remove(["last"])
    plan.add([Waiting("near", tokens([1, 2, 3, 4, 7]))])
    assert plan.num_bytes, "it is in the tree before the other leaves"
    plan.remove(["other"])
    trie = plan._queues[0]._grown()
    assert trie.held(plan._last) == (trie.root.largest(), 4 * WIDTH)
