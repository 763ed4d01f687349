"""Snapshots that own their memory and nobody else's, and rows that run one after another."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from tests.families import build
from worker.kv import KV, Path
from worker.radix import Match, RadixTree
from worker.solo import Snapshot, Solo, arrays

KINDS = [  # windows, states, both, lists of caches, chunks, several caches per layer, keys alone, a class of its own
    "gemma3_text", "mamba", "jamba", "qwen3_5", "rwkv7", "recurrent_gemma", "baichuan_m1", "llama4",
    "longcat_flash_ngram", "deepseek_v32", "deepseek_v41",
]  # fmt: skip
PROMPT = np.random.default_rng(0).integers(0, 290, 100).astype(np.int32)


def run(model: Any, caches: list[Any], start: int, stop: int) -> mx.array:
    """Run a part of the prompt; return the last logits."""
    logits: mx.array = model(mx.array(PROMPT[start:stop])[None], cache=caches)[:, -1]
    mx.eval(logits, arrays(caches))
    return logits


def after(model: Any, tokens: int) -> list[Any]:
    caches = make_prompt_cache(model)
    run(model, caches, 0, tokens)
    return caches


def restored(snapshot: Snapshot) -> list[Any]:
    assert snapshot.caches is not None
    return copy.deepcopy(snapshot.caches)


def row(model: Any, batch: Solo, tokens: list[int]) -> mx.array:
    return batch.forward(model, np.array([tokens], np.int32), [len(tokens)])


@pytest.mark.parametrize("name", KINDS)
def test_a_snapshot_counts_the_bytes_that_are_freed_with_it(held_bytes: Callable[[], int], name: str) -> None:
    model = build(name)
    caches = after(model, 40)
    run(model, caches, 40, 70)  # now what a layer keeps may be a slice of more
    before = held_bytes()
    snapshot = Snapshot(caches)
    assert held_bytes() - before == pytest.approx(snapshot.nbytes, rel=0.01)
    del caches
    held = held_bytes()
    nbytes = snapshot.nbytes
    del snapshot
    assert held - held_bytes() == pytest.approx(nbytes, rel=0.01)


@pytest.mark.parametrize("name", KINDS)
def test_rows_that_go_on_do_not_change_a_snapshot(name: str) -> None:
    model = build(name)
    caches = after(model, 40)
    snapshot = Snapshot(caches)
    first = run(model, restored(snapshot), 40, 60)
    for start in range(40, 90, 10):
        run(model, caches, start, start + 10)  # the row it was taken from
    batch = Solo(lambda: make_prompt_cache(model), snapshots=True)
    batch.open([Path([(snapshot, 40)]), Path([(snapshot, 40)])])
    for start in range(40, 90, 10):
        block = np.stack([PROMPT[start : start + 10], PROMPT[start - 5 : start + 5]])
        mx.eval(batch.forward(model, block, [10, 10]))
    batch.leave(0)
    assert mx.array_equal(run(model, restored(snapshot), 40, 60), first)


@pytest.mark.parametrize("name", KINDS)
def test_a_row_from_a_snapshot_gives_the_logits_of_the_whole_prompt(name: str) -> None:
    model = build(name)
    batch = Solo(lambda: make_prompt_cache(model), snapshots=True)
    batch.open([Path([(Snapshot(after(model, 40)), 40)])])
    whole = run(model, make_prompt_cache(model), 0, 90)
    assert np.allclose(row(model, batch, PROMPT[40:90].tolist()), whole, atol=1e-4)


def test_evicting_a_snapshot_frees_its_bytes_while_the_others_stay(held_bytes: Callable[[], int]) -> None:
    model, tree = build("jamba"), RadixTree[Snapshot]()
    for depth in (20, 50, 80):
        at, caches = tree.match(PROMPT[:depth]), after(model, depth)
        mx.clear_cache()
        tree.insert(at, PROMPT[at.length : depth], Snapshot(caches))
    del caches
    before = held_bytes()
    gone = tree.evict(1)
    assert gone.nodes == 1
    assert before - held_bytes() == pytest.approx(gone.nbytes, rel=0.01)
    tree.check()
    left = tree.match(PROMPT)
    assert left.length == 50
    assert left.node.payload is not None
    assert left.node.payload.caches is not None
    assert mx.array_equal(run(model, left.node.payload.caches, 50, 60), run(model, after(model, 50), 50, 60))


def test_a_split_leaves_the_state_at_the_end_and_can_be_filled_above() -> None:
    model, tree = build("gemma3_text"), RadixTree[Snapshot]()
    whole = Snapshot(after(model, 60))
    node = tree.insert(Match(tree.root, 0), PROMPT[:60], whole)
    other = np.concatenate([PROMPT[:40], PROMPT[80:90]])
    tree.insert(tree.match(other), other[40:], Snapshot(after(model, 10)))
    upper = node.parent
    assert upper is not None
    assert (upper.nbytes, node.payload) == (0, whole)
    tree.fill(tree.match(PROMPT[:40]), Snapshot(after(model, 40)))
    assert upper.nbytes > 0
    tree.check()


def test_a_copied_prefix_belongs_to_its_row(held_bytes: Callable[[], int]) -> None:
    model = build("deepseek_v3")
    caches = after(model, 40)
    kv = [KV([(c.keys[:, :, a:b], c.values[:, :, a:b]) for c in caches]) for a, b in [(0, 25), (25, 40)]]
    path = Path([(kv[0], 25), (kv[1], 9)])
    before = [np.array(x) for x in arrays([kv[0].layers, kv[1].layers])]
    batch = Solo(lambda: make_prompt_cache(model), snapshots=False)
    batch.open([path, path])
    logits = batch.forward(model, np.stack([PROMPT[34:60], PROMPT[60:86]]), [26, 26])
    assert np.allclose(logits[:1], run(model, after(model, 34), 34, 60), atol=1e-4)
    now = arrays([kv[0].layers, kv[1].layers])
    assert all(np.array_equal(x, y) for x, y in zip(before, now, strict=True))
    own = batch.tail(1, 4, 20)
    assert isinstance(own, KV)
    assert [k.shape[2] for k, _ in own.layers] == [16, 16]
    held, nbytes = held_bytes(), own.nbytes
    del own
    assert held - held_bytes() == pytest.approx(nbytes, rel=0.01)


def test_rows_join_run_with_others_and_leave() -> None:
    model = build("mamba")
    batch, joining = (Solo(lambda: make_prompt_cache(model), snapshots=True) for _ in range(2))
    batch.open([Path(), Path()])
    batch.forward(model, np.stack([PROMPT[:30], PROMPT[30:60]]), [30, 12])
    joining.open([Path()])
    joining.forward(model, PROMPT[None, 60:90], [30])
    batch.join(joining)
    assert batch.lengths == [30, 12, 30]
    logits = batch.forward(model, PROMPT[90:93, None], [1, 0, 1])
    assert not mx.any(logits[1]), "a row without tokens"
    batch.leave(0)
    assert batch.lengths == [31, 12]
    going_on = batch.forward(model, PROMPT[94:96, None], [1, 1])
    expected = [[*PROMPT[60:90], PROMPT[92], PROMPT[94]], [*PROMPT[30:42], PROMPT[95]]]
    for got, tokens in zip(going_on, expected, strict=True):
        alone = model(mx.array(np.array(tokens))[None], cache=make_prompt_cache(model))[0, -1]
        assert np.allclose(got, alone, atol=1e-4)
