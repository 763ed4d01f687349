"""What the order of the jobs costs: tokens computed, trees of many shapes, and the time that planning takes."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence

import numpy as np
import pytest

from tests.effort import lines_run
from tests.models import tiny_tokenizer
from worker.group import Plan, Waiting
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
    "three levels": ((16, 2000), (8, 800), (8, 100)),
    "six levels": ((4, 1500), (2, 300), (4, 900), (2, 600), (4, 300), (4, 40)),
    "skewed": ((8, 1024), (16, 512), (8, 2048), (8, 64)),  # 1,024 of these jobs, the first of each level most often
}


def shared(left: Path, right: Path) -> int:
    return next((at for at, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def tree_of_prompts(
    seed: int, shape: Shape = FOUR_LEVELS, num_jobs: int | None = None
) -> tuple[list[Path], dict[str, Tokens]]:
    """Make prompts of a tree, in random order of arrival; `shape` is the number of children and tokens per level.

    With `num_jobs` only so many of them, the n-th child of a node 1/n times as likely as its first.
    """
    rng = np.random.default_rng(seed)
    paths = list(itertools.product(*(range(num) for num, _ in shape)))
    if num_jobs:
        weights = np.array([1 / np.prod(np.add(path, 1)) for path in paths])
        picked = rng.choice(len(paths), num_jobs, replace=False, p=weights / weights.sum())
        paths = [paths[at] for at in picked]
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
    shape = tuple((num, tokens // 8) for num, tokens in SHAPES[name])  # only ratios count
    paths, prompts_ = tree_of_prompts(len(name), shape, 1024 if name == "skewed" else None)
    with_detours, without = (
        beyond_the_last(run_through_window(paths, prompts_, 256, detours=detours), shape) for detours in (True, False)
    )
    assert with_detours <= 1.05 * without
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
            order += (offered := [choice.id for choice in plan.next(8)])
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


def test_planning_jobs_costs_a_small_part_of_tokenising_them() -> None:
    letters, rng = "abcdefgh ,.", random.Random(0)
    pieces = {
        path: "".join(rng.choices(letters, k=512))
        for level in (1, 2, 3)
        for path in itertools.product(range(4), repeat=level)
    }
    texts = ["".join(pieces[path[: level + 1]] for level in range(3)) for path in pieces if len(path) == 3]
    rng.shuffle(texts)
    encode = tiny_tokenizer().encode
    began = time.process_time()
    jobs = [Waiting(str(number), np.array(encode(text), np.int32)) for number, text in enumerate(texts)]
    tokenising = time.process_time() - began

    def plan_all() -> float:
        began = time.process_time()
        plan = Plan(2)
        for at in range(0, len(jobs), 8):  # as the window does it: some are offered while others arrive
            plan.add(jobs[at : at + 8])
            plan.remove([choice.id for choice in plan.next(4)])
            assert plan.num_bytes
        while len(plan):
            plan.remove([choice.id for choice in plan.next(4)])
        return time.process_time() - began

    assert min(plan_all() for _ in range(20)) < tokenising / 10  # alone on the machine a thirtieth


@pytest.mark.parametrize("more", [False, True], ids=["all known", "more to come"])
@pytest.mark.parametrize("tail", [0, 30], ids=["growing prompts", "comb"])
def test_a_job_whose_prompt_forks_often_costs_by_the_tokens_of_its_prompt(tail: int, more: bool) -> None:
    def cost_per_token(num_jobs: int) -> float:
        rng = np.random.default_rng(0)
        chain = rng.integers(0, 49_152, 20 * num_jobs, dtype=np.int32)
        prompts = [
            np.concatenate([chain[: 20 * (number + 1)], rng.integers(0, 49_152, tail, dtype=np.int32)])
            for number in rng.permutation(num_jobs)
        ]

        def work() -> None:
            plan = Plan()
            for number, prompt in enumerate(prompts):
                plan.add([Waiting(str(number), prompt)])
                assert number % 64 or plan.num_bytes
            while len(plan):
                plan.remove([choice.id for choice in plan.next(8, more=more)])

        return lines_run(work) / sum(map(len, prompts))

    assert cost_per_token(400) < 1.3 * cost_per_token(100)
