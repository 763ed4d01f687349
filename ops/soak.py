"""Soak the cache: `./ops/soak [--operations N] [--jobs N] [--picture-jobs N] [--seed S]`.

First the tree alone against a plain set of prefixes: after every operation its bytes, tokens, nodes, pins, pinned bytes
and the order of eviction, every thousand operations its content and links. Then tree and engine with a tiny random
model, jobs without end on a small budget: answers are those of the job alone, everything adds up, and what MLX's
allocator holds does not grow. Where mlx-vlm is installed, pictures through a real worker: see soak_pictures.py.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
from collections import Counter

import mlx.core as mx
import numpy as np

from tests.engines import Bench, alone, bench, prompt
from tests.models import tiny
from worker import processor
from worker.radix import Node, RadixTree
from worker.sequence import Finished

CHECK_EVERY = 1_000
"""Operations, or steps, between two proofs of the whole tree."""


class Held:
    """A payload that remembers its tokens."""

    def __init__(self, tokens: tuple[int, ...]) -> None:
        self.tokens, self.nbytes = tokens, 8 * len(tokens)

    def split(self, at: int) -> tuple[Held, Held]:
        """Cut it in two."""
        return Held(self.tokens[:at]), Held(self.tokens[at:])


class Tree:
    """A radix tree under random operations, and the set of prefixes that it must hold."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.tree: RadixTree[Held] = RadixTree()
        self.known: set[tuple[int, ...]] = set()
        self.locked: list[Node[Held]] = []
        self.pins: Counter[tuple[int, ...]] = Counter()  # of every prefix of a locked one
        self.num_nodes = 0  # inserted less evicted; splits add to them

    def operate(self) -> None:
        """Do one thing: mostly insert, often lock or release, sometimes evict."""
        choice = self.rng.random()
        if choice < 0.5:
            self._insert()
        elif choice < 0.9 and self.locked:
            node = self.locked.pop(self.rng.randrange(len(self.locked)))
            self.tree.release(node)
            self.pins -= Counter(prefixes(node))
        else:
            self._evict()
        self._compare()

    def _compare(self) -> None:
        tree, num_known = self.tree, len(self.known)
        counted = (tree.num_tokens, tree.nbytes, tree.num_nodes, tree.pinned_bytes, tree.root.pins)
        right = (num_known, 8 * num_known, self.num_nodes + tree.num_splits, 8 * len(self.pins), len(self.locked))
        if counted != right:
            raise RuntimeError(
                f"(tokens, bytes, nodes, pinned bytes, pins): the tree counts {counted}, the set {right}"
            )

    def _insert(self) -> None:
        tokens = tuple(self.rng.choices(range(4), k=self.rng.randint(1, 12)))
        ids = np.array(tokens, np.int32)
        at = self.tree.match(ids)
        if at.length != max((n for n in range(len(tokens) + 1) if not n or tokens[:n] in self.known), default=0):
            raise RuntimeError(f"{tokens} matched {at.length} tokens")
        node = at.node
        if at.length < len(tokens):
            node = self.tree.insert(at, ids[at.length :], Held(tokens[at.length :]))
            self.num_nodes += 1
        self.known |= {tokens[: n + 1] for n in range(at.length, len(tokens))}
        if len(self.locked) < 50:
            self.tree.lock(node)
            self.locked.append(node)
            self.pins.update(prefixes(node))

    def _evict(self) -> None:
        """Evict, and see that the least recently used went first: every leaf left is younger, or in use."""
        asked = self.rng.randint(0, 400)
        idle = sorted((n.last_used, n) for n in self.tree.nodes() if not n.children and not n.pins)
        gone = self.tree.evict(asked)
        self.num_nodes -= gone.nodes
        if gone.nbytes < asked and self.tree.nbytes != self.tree.pinned_bytes:
            raise RuntimeError(f"asked for {asked} bytes, got {gone.nbytes}, and there was more")
        kept = [node.payload is not None for _, node in idle]
        if sorted(kept) != kept:
            raise RuntimeError("a leaf went before one that was used longer ago")
        self.known = self.stored()

    def stored(self) -> set[tuple[int, ...]]:
        """Return all prefixes in the tree."""
        return {prefix for node in self.tree.nodes() for prefix in prefixes(node)[node.start :]}


def prefixes(node: Node[Held]) -> list[tuple[int, ...]]:
    """Return what ends in the tree on the way to the end of `node`, shortest first."""
    whole = tuple(token for step in node.path() for token in step.tokens.tolist())
    return [whole[: count + 1] for count in range(len(whole))]


def soak_tree(operations: int, seed: int) -> str:
    """Operate on a tree."""
    run = Tree(seed)
    for number in range(operations):
        run.operate()
        if number % CHECK_EVERY == 0:
            run.tree.check()
            if run.stored() != run.known:
                raise RuntimeError(f"after {number} operations the tree holds other prefixes than the set")
    for node in run.locked:
        run.tree.release(node)
    run.tree.evict(run.tree.nbytes)
    run.tree.check()
    if run.tree.nbytes or run.tree.num_nodes:
        raise RuntimeError("bytes are left in an empty tree")
    return f"{operations} operations, {run.tree.num_splits} splits: tokens, bytes, nodes and pins right after each"


def soak_engine(jobs: int, seed: int) -> str:
    """Run jobs of a random tree of prompts on a budget of about ten of them, adding and aborting as they run."""
    rng = random.Random(seed)
    run = bench(
        tiny(num_hidden_layers=1), alone=tiny(num_hidden_layers=1), max_rows=8, chunk_tokens=32, kv_bytes=300_000
    )
    run.watched.engine = None  # keep no logits
    mx.set_cache_limit(0)  # the pool would hide what is held
    heads = [[rng.randrange(290) for _ in range(60)] for _ in range(12)]
    given: dict[str, list[int]] = {}
    held: list[int] = []
    done = wrong = 0
    while done < jobs:
        while len(given) < 16:
            tokens = rng.choice(heads)[: rng.choice((20, 60))] + [rng.randrange(290) for _ in range(rng.randint(1, 30))]
            job_id = str(rng.getrandbits(60))
            given[job_id] = tokens
            run.engine.add(job_id, prompt(tokens, rng.randint(1, 12)))
        if rng.random() < 0.02:
            job_id = rng.choice(list(given))
            run.engine.abort(job_id)
            del given[job_id]
        for event in run.engine.step():
            tokens = given.pop(event.id) if isinstance(event, Finished) else []
            done += 1
            wrong += done % 20 == 0 and not _as_alone(run, tokens, event)
            if done % max(1, jobs // 10) == 0:
                held.append(_held_beside(run))
        run.engine.cache.tree.check() if done % 50 else run.engine.check()
    if wrong:
        raise RuntimeError(f"{wrong} answers were not those of the job alone")
    grown = max(held[len(held) // 2 :]) - max(held[: len(held) // 2])
    if grown > 100_000:
        raise RuntimeError(f"the allocator holds {grown} bytes more in the second half: {held}")
    evicted = run.engine.stats().evicted_nodes
    return f"{done} jobs, {evicted} nodes evicted; beside cache and rows the allocator held {held} bytes"


def _as_alone(run: Bench, tokens: list[int], event: object) -> bool:
    if not isinstance(event, Finished):
        return False
    expected, _ = alone(run.alone, np.array(tokens, np.int32), len(event.tokens))
    return list(event.tokens) == expected


def _held_beside(run: Bench) -> int:
    gc.collect()
    mx.synchronize()
    return mx.get_active_memory() - run.engine.stats().cache_bytes


def _soak_pictures(jobs: int, seed: int) -> str:
    if not processor.installed():
        return "left out, mlx-vlm is not installed"
    from ops.soak_pictures import soak

    return f"{jobs} jobs, {soak(jobs, seed)}"


def main() -> None:
    """Run all and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=1_000_000)
    parser.add_argument("--jobs", type=int, default=5_000)
    parser.add_argument("--picture-jobs", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    for name, work in (
        ("tree", lambda: soak_tree(wanted.operations, wanted.seed)),
        ("engine", lambda: soak_engine(wanted.jobs, wanted.seed)),
        ("pictures", lambda: _soak_pictures(wanted.picture_jobs, wanted.seed)),
    ):
        began = time.monotonic()
        print(f"{name}: {work()} ({time.monotonic() - began:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
