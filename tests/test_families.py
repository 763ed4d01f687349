"""Every family's tokens equal mlx-lm's for each job alone: found in the tree, chunked, batched, and turn after turn."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlx_lm.models
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache, make_prompt_cache

from common.errors import ModelNotLoaded
from common.messages import Sampling
from tests.engines import Bench, Watched, alone
from tests.families import FAMILIES, RUNNING, WINDOW, build
from tests.models import CHECKOUT, EOS, save_tiny, tiny_tokenizer
from tests.test_parity import first_difference_is_a_tie
from worker import platform, probe
from worker.cache import Limits
from worker.engine import Engine
from worker.model import LoadedModel, load
from worker.sequence import Finished, Prompt

ONE_OF_EACH_KIND = ("llama", "phi3", "gpt_neox", "deepseek_v3", "jamba", "gemma3_text")
ROOT, BRANCH = WINDOW + 9, WINDOW  # tokens: a prefix is longer than a window, and so is what follows it


def family_bench(name: str, *, chunk_tokens: int, kv_bytes: int = 1 << 30) -> Bench:
    """Build the engine that a worker would run the family with, and a twin of the model."""
    model = build(name)
    loaded = LoadedModel(
        model=model,
        tokenizer=tiny_tokenizer(),
        name=name,
        digest="",
        dtype="float32",
        num_layers=len(make_prompt_cache(model)),
        kv_bytes_per_token=1024,
        state_bytes=0,
        context_length=4096,
        vocab_size=300,
        cache_kind="",
        eos_token_ids=frozenset({EOS}),
        notes=(),
    )
    way = probe.reuse(model, loaded.context_length)
    assert way == FAMILIES[name].way
    limits = Limits(max_rows=2, chunk_tokens=chunk_tokens, kv_bytes=kv_bytes)
    return Bench(Engine(loaded, limits, exact=False, reuse=way), Watched(model), build(name))


def tree(rng: np.random.Generator, jobs: int) -> dict[str, Prompt]:
    """Return prompts of two levels, with the branch points that the plan of a queue reveals."""
    root, *branches = (rng.integers(0, 290, size) for size in (ROOT, BRANCH, BRANCH + 7))
    prompts = {}
    for number in range(jobs):
        shared = np.concatenate([root, branches[number % 2]])
        tokens = np.concatenate([shared, rng.integers(0, 290, rng.integers(1, 9))])
        answer = Sampling(max_tokens=3 + number % 3)
        prompts[str(number)] = Prompt(tokens.astype(np.int32), answer, (ROOT, len(shared)))
    return prompts


def next_turn(prompt: Prompt, answer: Finished, rng: np.random.Generator) -> Prompt:
    tokens = np.concatenate([prompt.tokens, answer.tokens, rng.integers(0, 290, 5)])
    return Prompt(tokens.astype(np.int32), Sampling(max_tokens=3))


def run(bench: Bench, prompts: dict[str, Prompt], rng: np.random.Generator, seed: int | None = None) -> int:
    """Run prompts and a turn that follows the first; assert that all tokens are mlx-lm's; return the number of ties."""
    finished = bench.run(prompts, seed=seed)
    assert len(finished) == len(prompts), bench.ended
    prompts["turn"] = next_turn(prompts["0"], finished["0"], rng)
    finished = bench.run({"turn": prompts["turn"]})
    ties = 0
    for job_id, job in prompts.items():
        tokens, logprobs = alone(bench.alone, job.tokens, job.sampling.max_tokens or 0)
        ties += first_difference_is_a_tie(job_id, list(finished[job_id].tokens), tokens, logprobs)
    return ties


@pytest.mark.parametrize("name", RUNNING)
def test_a_family_gives_mlx_lms_tokens_and_reuses_what_the_table_says(name: str) -> None:
    bench, rng = family_bench(name, chunk_tokens=16), np.random.default_rng(0)
    prompts = tree(rng, jobs=3)
    assert run(bench, prompts, rng) <= 1
    cached = [event.usage.cached_tokens for event in bench.ended.values() if isinstance(event, Finished)]
    if FAMILIES[name].way == "none":
        assert cached == [0, 0, 0, 0]
    else:
        shared = prompts["0"].branches[1]
        assert sorted(cached) == [0, ROOT, shared, len(prompts["turn"].tokens) - 6], (
            "of the first, the next branch, ..."
        )


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "jamba", "qwen3_5", "gemma3_text"])
def test_under_pressure_every_way_of_reuse_waits_and_all_jobs_finish_unchanged(name: str) -> None:
    rng = np.random.default_rng(3)
    prompts = tree(rng, jobs=8)
    longest = max(len(job.tokens) + job.max_tokens for job in prompts.values())
    step = 0 if FAMILIES[name].way == "shared" else KVCache.step  # by which mlx-lm's own caches grow
    bench = family_bench(name, chunk_tokens=16, kv_bytes=int(1.2 * (longest + step) * 1024))
    engine, finished, waited = bench.engine, dict[str, Finished](), 0
    for job_id, job in prompts.items():
        engine.add(job_id, job)
    while engine.busy:
        finished |= {event.id: event for event in engine.step() if isinstance(event, Finished)}
        waited += engine.blocked
    assert len(finished) == 8
    assert waited + engine.stats().evicted_nodes > 3, "or there was no pressure"
    for job_id, job in prompts.items():
        tokens, logprobs = alone(bench.alone, job.tokens, job.max_tokens)
        first_difference_is_a_tie(job_id, list(finished[job_id].tokens), tokens, logprobs)


@pytest.mark.parametrize(
    "name",
    [
        name if name in ONE_OF_EACH_KIND else pytest.param(name, marks=[pytest.mark.slow, pytest.mark.long])
        for name in RUNNING
    ],
)
def test_the_kv_of_a_family_is_counted_as_what_the_allocator_holds(name: str, held_bytes: Callable[[], int]) -> None:
    """Keys and values may be views of one product, which must not live on with them."""
    bench = family_bench(name, chunk_tokens=512)
    bench.watched.engine = None  # keep no logits
    before = held_bytes()
    assert len(bench.run(tree(np.random.default_rng(0), jobs=3))) == 3
    assert held_bytes() - before <= 1.02 * bench.engine.stats().cache_bytes + 4096


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", RUNNING)
def test_a_family_gives_mlx_lms_tokens_in_other_trees_orders_and_chunks(name: str) -> None:
    ties = 0
    for seed, chunk_tokens in enumerate((5, 33, 512)):
        bench, rng = family_bench(name, chunk_tokens=chunk_tokens), np.random.default_rng(seed + 1)
        ties += run(bench, tree(rng, jobs=7), rng, seed)
    assert ties <= 2


def test_every_model_of_mlx_lm_is_in_the_table() -> None:
    (directory,) = mlx_lm.models.__path__
    models = {path.stem for path in Path(directory).glob("*.py") if "\nclass Model(" in path.read_text()}
    assert models - set(FAMILIES) == set()
    assert sum(family.way == "shared" for family in FAMILIES.values()) >= 20
    assert len(RUNNING) >= 40


def test_a_family_whose_prefix_is_not_shared_says_why() -> None:
    assert [name for name, family in FAMILIES.items() if (family.way == "shared") == bool(family.why)] == []


def test_the_table_in_the_docs_is_up_to_date() -> None:
    subprocess.run([sys.executable, CHECKOUT / "ops" / "families.py", "--check"], check=True)


def test_a_model_that_runs_through_its_layers_twice_has_a_cache_for_each_time(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "loops", "nanbeige", num_loops=2)
    loaded = load(str(directory), device=platform.device())
    assert (loaded.num_layers, loaded.cache_kind) == (4, "plain")
    assert loaded.kv_bytes_per_token == 4 * 2 * 2 * 16 * 4


def test_a_family_that_ends_the_process_is_refused(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "olmo")
    config = directory / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"olmo"'))
    with pytest.raises(ModelNotLoaded, match="needs a package"):
        load(str(directory), device=platform.device())
