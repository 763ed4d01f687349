"""The radix tree against a brute-force set of prefixes, and its invariants after every step."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator
from typing import Self

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule, run_state_machine_as_test
from mlx_lm.models.cache import PromptTrie

from tests.engines import examples
from worker.radix import Match, Node, RadixTree, common_prefix
from worker.sequence import Tokens


class Held:
    """A payload that remembers its tokens, eight bytes for each."""

    def __init__(self, tokens: tuple[int, ...]) -> None:
        self.tokens = tokens

    @property
    def nbytes(self) -> int:
        return 8 * len(self.tokens)

    def split(self, at: int) -> tuple[Self, Self]:
        return type(self)(self.tokens[:at]), type(self)(self.tokens[at:])


class Sized:
    """A payload that is only its size."""

    def __init__(self, tokens: int) -> None:
        self.nbytes = 8 * tokens

    def split(self, at: int) -> tuple[Self, Self]:
        return type(self)(at), type(self)(self.nbytes // 8 - at)


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def add(tree: RadixTree[Held], *tokens: int) -> Node[Held]:
    at = tree.match(ids(*tokens))
    rest = tokens[at.length :]
    return tree.insert(at, ids(*rest), Held(rest)) if rest else at.node


def stored(tree: RadixTree[Held]) -> set[tuple[int, ...]]:
    """Return every prefix in the tree, checking that each node's payload holds the node's own tokens."""
    prefixes = set()
    for node in tree.nodes():
        assert node.payload is not None
        assert node.payload.tokens == tuple(node.tokens.tolist())
        whole = tuple(t for n in node.path() for t in n.tokens.tolist())
        prefixes |= {whole[: i + 1] for i in range(node.start, node.end)}
    return prefixes


def test_match_of_nothing_in_an_empty_tree_ends_at_the_root() -> None:
    tree: RadixTree[Held] = RadixTree()
    for tokens in (ids(), ids(1), ids(1, 2)):
        assert tree.match(tokens) == Match(tree.root, 0)


@pytest.mark.parametrize("shared", [0, 1, 2, 5, 6])
def test_match_stops_at_the_first_other_token_wherever_it_is(shared: int) -> None:
    tree: RadixTree[Held] = RadixTree()
    add(tree, 1, 2, 3, 4, 5, 6)
    assert tree.match(ids(*[1, 2, 3, 4, 5, 6][:shared], 99)).length == shared
    assert tree.match(ids(*[1, 2, 3, 4, 5, 6][:shared])).length == shared


def test_match_changes_nothing() -> None:
    tree: RadixTree[Held] = RadixTree()
    add(tree, 1, 2, 3)
    before = [(n.start, n.tokens.tolist(), n.last_used, n.pins) for n in tree.nodes()]
    tree.match(ids(1, 2, 9))
    assert [(n.start, n.tokens.tolist(), n.last_used, n.pins) for n in tree.nodes()] == before


def test_a_branch_splits_the_node_and_handles_on_it_stay_right() -> None:
    tree: RadixTree[Held] = RadixTree()
    long = add(tree, 1, 2, 3, 4)
    tree.lock(long)
    add(tree, 1, 2, 9)
    assert [n.tokens.tolist() for n in long.path()] == [[1, 2], [3, 4]]
    assert tree.pinned_bytes == 32
    tree.check()
    tree.release(long)
    assert tree.pinned_bytes == 0
    tree.check()


def test_two_branches_with_the_same_first_token_are_refused() -> None:
    tree: RadixTree[Held] = RadixTree()
    stale = tree.match(ids(1, 2))
    add(tree, 1, 2)
    with pytest.raises(ValueError, match="already has a branch with token 1"):
        tree.insert(stale, ids(1, 2), Held((1, 2)))


def test_eviction_takes_the_least_recently_used_leaf_and_a_lock_counts_as_use() -> None:
    tree: RadixTree[Held] = RadixTree()
    first = add(tree, 1, 1)
    add(tree, 2, 2)
    tree.lock(first)
    tree.release(first)
    assert tree.evict(1) == (1, 16)
    assert stored(tree) == {(1,), (1, 1)}


def test_a_parent_left_childless_goes_in_the_same_pass() -> None:
    tree: RadixTree[Held] = RadixTree()
    add(tree, 1, 2, 3)
    add(tree, 1, 2, 4)
    assert tree.num_nodes == 3
    assert tree.evict(10**9) == (3, 32)
    assert tree.nbytes == tree.num_nodes == tree.num_tokens == 0


def test_a_pinned_path_is_never_evicted() -> None:
    tree: RadixTree[Held] = RadixTree()
    add(tree, 1, 2, 3)
    leaf = add(tree, 1, 2, 4)
    tree.lock(leaf)
    tree.evict(10**9)
    assert stored(tree) == {(1,), (1, 2), (1, 2, 4)}


def test_release_without_lock_is_an_error() -> None:
    tree: RadixTree[Held] = RadixTree()
    with pytest.raises(RuntimeError, match="not locked"):
        tree.release(add(tree, 1))


def test_check_finds_a_wrong_counter() -> None:
    tree: RadixTree[Held] = RadixTree()
    add(tree, 1, 2)
    tree.nbytes += 1
    with pytest.raises(RuntimeError, match="counters"):
        tree.check()


def four_levels(seed: int) -> list[np.ndarray]:
    """Return 128 prompts of 2,176 tokens in random order: systems, few-shot blocks, documents, questions."""
    rng = np.random.default_rng(seed)

    def below(prefix: np.ndarray, levels: list[tuple[int, int]]) -> list[np.ndarray]:
        if not levels:
            return [prefix]
        (count, size), rest = levels[0], levels[1:]
        pieces = [rng.integers(0, 50_000, size).astype(np.int32) for _ in range(count)]
        return [prompt for piece in pieces for prompt in below(np.concatenate([prefix, piece]), rest)]

    prompts = below(np.empty(0, np.int32), [(2, 1024), (2, 512), (4, 576), (8, 64)])
    return [prompts[i] for i in rng.permutation(len(prompts))]


@pytest.fixture
def _no_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def _no_coverage() -> Iterator[None]:
    """Trace nothing: coverage slows our code down and not mlx-lm's."""
    traces = sys.gettrace()
    sys.settrace(None)
    yield
    sys.settrace(traces)


def seconds_of_ours(prompts: list[Tokens]) -> float:
    tree: RadixTree[Sized] = RadixTree()
    began = time.process_time()
    for prompt in prompts:
        at = tree.match(prompt)
        node = tree.insert(at, prompt[at.length :], Sized(len(prompt) - at.length))
        tree.lock(node)
        tree.release(node)
    spent = time.process_time() - began
    tree.check()
    return spent


@pytest.mark.usefixtures("_no_collection", "_no_coverage")
def test_match_and_insert_with_pins_are_forty_times_faster_than_mlx_lms_trie() -> None:
    ratios = []
    for seed in range(5):
        prompts = four_levels(seed)
        lists = [prompt.tolist() for prompt in prompts]
        gc.collect()  # the last trie must not be collected on our time
        ours = min(seconds_of_ours(prompts) for _ in range(3))  # what else the machine does only adds to it
        trie = PromptTrie()  # type: ignore[no-untyped-call]
        began = time.process_time()
        for prompt_list in lists:
            trie.search("model", prompt_list)
            trie.add("model", prompt_list, object())
        ratios.append((time.process_time() - began) / ours)
    assert sorted(ratios)[2] >= 40, ratios


def test_sixty_thousand_tokens_are_compared_in_bulk_wherever_they_differ() -> None:
    tokens = np.arange(60_000, dtype=np.int32)
    tree: RadixTree[Held] = RadixTree()
    tree.insert(tree.match(tokens), tokens, Held(tuple(tokens.tolist())))
    for at in (0, 1, 30_000, 59_999):
        other = tokens.copy()
        other[at] = -1
        assert tree.match(other).length == common_prefix(tokens, other) == at


def test_another_policy_evicts_in_its_own_order() -> None:
    tree: RadixTree[Held] = RadixTree(lambda node: node.nbytes)
    for tokens in ((1, 1, 1), (2, 2), (3,), (4, 4, 4, 4)):
        node = add(tree, *tokens)
        tree.lock(node)
        tree.release(node)
    left = []
    while tree.num_nodes:
        tree.evict(1)
        tree.check()
        left.append(sorted(node.first for node in tree.nodes()))
    assert left == [[1, 2, 4], [1, 4], [4], []]


class Operations(RuleBasedStateMachine):
    """Random inserts, locks, releases and evictions beside a plain set of prefixes."""

    locked = Bundle("locked")

    def __init__(self) -> None:
        super().__init__()
        self.tree: RadixTree[Held] = RadixTree()
        self.model: set[tuple[int, ...]] = set()
        self.pinned: list[Node[Held]] = []

    @rule(target=locked, tokens=st.lists(st.integers(0, 2), min_size=1, max_size=9))
    def insert_and_lock(self, tokens: list[int]) -> Node[Held]:
        at = self.tree.match(ids(*tokens))
        assert at.length == max((len(p) for p in self.model if tuple(tokens[: len(p)]) == p), default=0)
        node = add(self.tree, *tokens)
        self.model |= {tuple(tokens[: i + 1]) for i in range(len(tokens))}
        self.tree.lock(node)
        self.pinned.append(node)
        return node

    @rule(node=consumes(locked))
    def release(self, node: Node[Held]) -> None:
        self.tree.release(node)
        self.pinned.remove(node)

    @rule(nbytes=st.integers(0, 100))
    def evict(self, nbytes: int) -> None:
        before = self.tree.nbytes
        kept = {n for node in self.pinned for n in node.path()}
        evicted = self.tree.evict(nbytes)
        assert before - self.tree.nbytes == evicted.nbytes
        assert evicted.nbytes >= nbytes or self.tree.nbytes == self.tree.pinned_bytes
        assert kept <= set(self.tree.nodes())
        self.model = stored(self.tree)

    @invariant()
    def holds(self) -> None:
        self.tree.check()
        assert stored(self.tree) == self.model
        assert self.tree.num_tokens == len(self.model)


def test_random_operations_agree_with_a_set_of_prefixes() -> None:
    chosen = settings(max_examples=examples(60), stateful_step_count=40, deadline=None)
    run_state_machine_as_test(Operations, settings=chosen)
