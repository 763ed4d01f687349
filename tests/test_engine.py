"""The engine on a tiny model: what is computed, what is shared, how rows come and go."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest

from common.messages import Sampling
from tests.engines import Bench, alone, bench, family, prompt
from tests.models import tiny, tiny_tokenizer
from worker.sequence import Failed, Finished, Prompt


def shared(count: int, prefix: int, own: int = 5, *, seed: int = 0, max_tokens: int = 4) -> dict[str, Prompt]:
    """Return `count` prompts with one prefix, knowing of each other as the scout would tell them."""
    rng = np.random.default_rng(seed)
    common = rng.integers(0, 290, prefix).tolist()
    tails = [[i % 290, *rng.integers(0, 290, own - 1).tolist()] for i in range(count)]
    return {str(i): prompt([*common, *tail], max_tokens, [prefix]) for i, tail in enumerate(tails)}


def distinct_tokens(prompts: dict[str, Prompt]) -> int:
    """Count the nodes of an uncompressed trie over all prompts."""
    return len({p.tokens[: i + 1].tobytes() for p in prompts.values() for i in range(len(p.tokens))})


def test_usage_adds_up_and_matches_what_the_model_computed() -> None:
    run = bench()
    done = run.run(family(np.random.default_rng(0), jobs=20), seed=0)
    stats = run.engine.stats()
    usages = [f.usage for f in done.values()]
    assert stats.prefill_tokens == sum(u.prefill_tokens for u in usages) == stats.computed_tokens
    assert stats.prompt_tokens == sum(u.prompt_tokens for u in usages)
    assert stats.prompt_tokens == stats.cached_tokens + stats.prefill_tokens
    assert (
        stats.completion_tokens
        == sum(u.completion_tokens for u in usages)
        == sum(len(run.tokens(job_id)) for job_id in done)
    )


@pytest.mark.parametrize("together", [True, False])
def test_a_cold_prefix_is_computed_once_for_many_jobs(together: bool) -> None:
    prompts = shared(24, 200)
    run = bench(max_rows=8)
    done = run.run(prompts, seed=None if together else 3)
    assert run.engine.stats().computed_tokens == distinct_tokens(prompts)
    assert sum(f.usage.prefill_tokens >= 200 for f in done.values()) == 1


def test_the_last_of_a_herd_starts_no_later_than_one_prefill_after_the_first() -> None:
    run = bench(max_rows=64, chunk_tokens=256)
    prompts = shared(64, 2000)
    for job_id, job in prompts.items():
        run.engine.add(job_id, job)
    calls_at_start: dict[str, int] = {}
    while run.engine.busy:
        run.engine.step()
        for job_id in run.watched.logits:
            calls_at_start.setdefault(job_id, len(run.watched.calls))
    assert run.engine.stats().computed_tokens == 2000 + 64 * 5
    assert max(calls_at_start.values()) - min(calls_at_start.values()) <= 2000 / 256


def test_jobs_that_do_not_know_of_each_other_share_what_a_running_row_holds() -> None:
    first, second = (Prompt(p.tokens, p.sampling) for p in shared(2, 100, max_tokens=30).values())
    run = bench()
    run.engine.add("0", first)
    while not run.engine.running:
        run.engine.step()
    done = run.run({"1": second})
    assert done["1"].usage.cached_tokens == 100
    assert run.engine.stats().computed_tokens == distinct_tokens({"0": first, "1": second})
    for job_id, job in (("0", first), ("1", second)):
        assert run.tokens(job_id) == alone(run.alone, job.tokens, 30)[0]


@pytest.mark.parametrize("seed", range(3))
def test_what_a_lone_row_gives_to_the_tree_is_not_written_over_by_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first = prompt(rng.integers(0, 290, 14).tolist(), 40)
    run = bench(chunk_tokens=16)
    run.engine.add("a", first)
    while len(run.watched.logits["a"]) < 4:
        run.engine.step()
    held = [*first.tokens.tolist(), *run.tokens("a")[:3]]
    longer = {name: prompt([*held, *rng.integers(0, 290, 200).tolist()], 6) for name in "bc"}
    run.run({"b": longer["b"]})
    run.run({"c": longer["c"]})
    for name, job in {"a": first, **longer}.items():
        event = run.ended[name]
        assert isinstance(event, Finished)
        assert list(event.tokens) == alone(run.alone, job.tokens, job.max_tokens)[0], name


def test_one_long_tail_does_not_widen_the_buffers_of_all_rows(held_bytes: Callable[[], int]) -> None:
    run = bench(max_rows=32, chunk_tokens=64)
    for i in range(24):
        run.engine.add(f"short {i}", prompt([i, *range(2, 8)], 120))
    while len(run.engine.running) < 24:
        run.engine.step()
    run.engine.add("long", prompt([280, *(i % 250 for i in range(3000))], 4))
    rectangle = 25 * 3000 * run.engine._loaded.kv_bytes_per_token
    before = held_bytes()
    mx.reset_peak_memory()
    run.run({})
    assert len(run.ended) == 25
    assert mx.get_peak_memory() - before < rectangle / 2


def test_a_follow_up_turn_hits_all_but_the_last_generated_token() -> None:
    run = bench()
    turn = prompt(range(40), 10)
    run.run({"first": turn})
    said = run.tokens("first")
    follow_up = prompt([*turn.tokens.tolist(), *said, 7, 8, 9])
    done = run.run({"second": follow_up})
    assert done["second"].usage.cached_tokens == 40 + len(said) - 1
    assert run.tokens("second") == alone(run.alone, follow_up.tokens, 8)[0]


def test_the_same_prompt_again_computes_its_last_token_only() -> None:
    run = bench()
    run.run({"first": prompt(range(50))})
    done = run.run({"second": prompt(range(50))})
    assert done["second"].usage.prefill_tokens == 1
    assert run.tokens("second") == run.tokens("first")


def test_a_prompt_of_one_token_runs() -> None:
    run = bench()
    done = run.run({"a": prompt([5]), "b": prompt([5]), "c": prompt([6])})
    assert {f.usage.prompt_tokens for f in done.values()} == {1}
    assert run.tokens("a") == run.tokens("b") == alone(run.alone, np.array([5], np.int32), 8)[0]


def test_nothing_is_held_twice() -> None:
    """With all rows running, KV is one prefix and the tails; at the end it is one tree of distinct tokens."""
    prompts = shared(8, 256, max_tokens=60)
    run = bench(max_rows=8)
    for job_id, job in prompts.items():
        run.engine.add(job_id, job)
    per_token = run.engine._loaded.kv_bytes_per_token
    peak = 0
    while run.engine.busy:
        run.engine.step()
        if len(run.engine.running) == 8:
            peak = max(peak, run.engine.stats().cache_bytes)
    assert peak <= 1.1 * per_token * (256 + 8 * 65)
    kept = {job_id: [*p.tokens.tolist(), *run.tokens(job_id)[:-1]] for job_id, p in prompts.items()}
    assert run.engine.cache.tree.num_tokens == distinct_tokens({k: prompt(v) for k, v in kept.items()})
    assert run.engine.stats().cache_bytes == per_token * run.engine.cache.tree.num_tokens


def test_memory_that_the_counters_say_was_freed_is_freed(held_bytes: Callable[[], int]) -> None:
    run = bench(max_rows=8, chunk_tokens=512)
    run.run(shared(4, 2048, own=500), seed=1)
    run.watched.logits.clear()
    before, held = held_bytes(), run.engine.cache.tree.nbytes
    run.engine.cache.tree.evict(held)
    assert before - held_bytes() == pytest.approx(held, rel=0.01)


def test_rows_never_exceed_the_limit_and_join_while_others_decode() -> None:
    run = bench(max_rows=3)
    prompts = shared(9, 64, max_tokens=12)
    for job_id, job in prompts.items():
        run.engine.add(job_id, job)
    sizes = []
    while run.engine.busy:
        run.engine.step()
        sizes.append(len(run.engine.running))
    assert max(sizes) == 3
    assert run.engine.stats().batch_rows_max == 3


def test_a_long_prompt_does_not_stop_the_rows_that_decode() -> None:
    run = bench(chunk_tokens=16)
    run.engine.add("short", prompt(range(2, 12), 40))
    run.engine.step()
    run.engine.add("long", prompt([i % 290 for i in range(400)], 2))
    lengths = []
    for _ in range(20):
        run.engine.step()
        lengths.append(len(run.watched.logits["short"]))
    assert all(b == a + 1 for a, b in pairwise(lengths))
    assert "long" not in run.engine.running


@pytest.mark.parametrize("when", [0, 1, 3, 8])
def test_an_aborted_job_leaves_and_the_others_do_not_notice(when: int) -> None:
    prompts = shared(4, 80, max_tokens=12)
    run = bench(chunk_tokens=32)
    for job_id, job in prompts.items():
        run.engine.add(job_id, job)
    for _ in range(when):
        run.engine.step()
    run.engine.abort("1")
    done = run.run({})
    assert set(done) == {"0", "2", "3"}
    for job_id in done:
        assert run.tokens(job_id) == alone(run.alone, prompts[job_id].tokens, 12)[0]
    assert run.engine.cache.tree.root.pins == 0


def test_a_job_that_can_never_fit_fails_alone_and_says_why() -> None:
    run = bench(kv_bytes=60_000)
    run.run({"big": prompt([i % 290 for i in range(300)], 50), "small": prompt(range(20), 4)})
    failed = run.ended["big"]
    assert isinstance(failed, Failed)
    assert failed.error.code == "context_length_exceeded"
    assert "RADIXQ_KV_BYTES" in str(failed.error)
    assert isinstance(run.ended["small"], Finished)


def test_under_pressure_jobs_wait_and_all_finish_within_the_budget() -> None:
    run = bench(kv_bytes=150_000, max_rows=8)
    prompts = {str(i): prompt([i, *range(100)], 20) for i in range(12)}
    for job_id, job in prompts.items():
        run.engine.add(job_id, job)
    blocked = 0
    while run.engine.busy:
        for event in run.engine.step():
            assert isinstance(event, Finished)
            run.ended[event.id] = event
        blocked += run.engine.blocked
        assert run.engine.cache.tree.nbytes <= 150_000
    assert len(run.ended) == 12
    assert blocked > 0


def text_of(run: Bench, job_id: str) -> str:
    """Return what the tokenizer makes of a job's tokens."""
    kept = [t for t in run.tokens(job_id) if t not in run.eos]
    return str(tiny_tokenizer().decode(kept, skip_special_tokens=True))


def test_text_is_what_the_tokenizer_decodes_and_length_says_that_it_was_cut() -> None:
    run = bench()
    done = run.run({str(i): prompt(range(i, i + 30), 25) for i in range(5)})
    for job_id, event in done.items():
        assert text_of(run, job_id).startswith(event.text)
        assert event.finish_reason == ("length" if event.usage.completion_tokens == 25 else "stop")


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it() -> None:
    run = bench()
    whole = run.run({"whole": prompt(range(30), 40)})["whole"].text
    stop = whole[10:13]
    cut = run.run({"cut": prompt(range(30), 40, stop=(stop,))})["cut"]
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.usage.completion_tokens <= 40


def test_greedy_and_sampled_rows_share_a_batch_and_a_seed_gives_the_same_answer_alone() -> None:
    warm = prompt(range(20), 12, temperature=0.8, top_p=0.9, seed=7)
    only = bench().run({"a": warm})["a"].text
    mates = {str(i): prompt(range(i, i + 9), 12) for i in range(3)}
    run = bench()
    done = run.run({**mates, "a": warm, "b": prompt(range(20), 12, temperature=0.8, top_p=0.9, seed=8)})
    assert done["a"].text == only
    assert done["b"].text != only
    for job_id, job in mates.items():
        assert run.tokens(job_id) == alone(run.alone, job.tokens, 12)[0]


def test_engines_on_one_model_class_do_not_disturb_a_stock_model() -> None:
    stock, tokens = tiny(), np.arange(40, dtype=np.int32)
    before = alone(stock, tokens, 10)[0]
    bench().run(shared(4, 60))
    assert alone(stock, tokens, 10)[0] == before
    assert Sampling().temperature == 0
