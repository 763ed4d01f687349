"""One contestant in a process of its own: `python ops/bench_contestants.py CONTESTANT WORKLOAD DIRECTORY`.

Reads requests from stdin, one JSON object a line, and answers each with one: `{"run": SEED}` runs the workload once,
`{"cost": SEED}` measures c. Says nothing else on stdout. Knows no other contestant.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from bench_workloads import MIN_SHARED_TOKENS, QUICK, WORKLOADS, Job, Workload, distinct_tokens

from worker import platform

BLAS = platform.prepare()  # before anything imports MLX

import mlx.core as mx  # noqa: E402
import mlx_lm  # noqa: E402
import numpy as np  # noqa: E402
from bench_cpu import clock_s  # noqa: E402
from bench_served import Server, Whole  # noqa: E402
from mlx_lm.generate import BatchGenerator, batch_generate, generate_step  # noqa: E402
from mlx_lm.models.cache import BatchKVCache, KVCache, make_prompt_cache  # noqa: E402

from common.messages import Sampling  # noqa: E402
from worker import crossover, hook, model  # noqa: E402
from worker.cache import Limits  # noqa: E402
from worker.engine import Engine  # noqa: E402
from worker.group import Plan, Waiting  # noqa: E402
from worker.runner import SPARE_PROMPTS  # noqa: E402
from worker.sequence import Finished, Prompt  # noqa: E402

DEVICE = platform.device()
CHUNK_TOKENS = 512  # RADIXQ_PREFILL_CHUNK_TOKENS
KV_BYTES = 8 << 30


@dataclass(slots=True)
class Outcome:
    """What one run gave and cost.

    Attributes:
        tokens: per job, in order of arrival, without the end of text.
        distinct_tokens: tokens of the prompts' trie, which someone who shares everything computes.
        cached_tokens: prompt tokens whose KV was not computed for their job.
        peak_bytes: of MLX, beyond the weights.
        as_text: the tokens are those of the answer's text, since the contestant gave no others.
    """

    tokens: list[list[int]] = field(default_factory=list)
    prompt_tokens: int = 0
    distinct_tokens: int = 0
    cached_tokens: int = 0
    cpu_s: float = 0.0
    wall_s: float = 0.0
    peak_bytes: int = 0
    as_text: bool = False


class Contestant(Protocol):
    """Runs jobs and fills in the outcome's tokens and cached tokens."""

    tokenizer: Any

    def run(self, jobs: list[Job], workload: Workload, outcome: Outcome) -> None:
        """Run all jobs."""
        ...

    def cpu_s(self) -> float:
        """CPU seconds used so far, of all threads and processes that belong to it."""
        ...


class Stock:
    """What the contestants in this process share: the model as mlx-lm loads it."""

    def __init__(self, directory: str) -> None:
        self.model, self.tokenizer = mlx_lm.load(directory)[:2]
        self.ends = set(self.tokenizer.eos_token_ids)

    def cpu_s(self) -> float:
        """All threads of this process."""
        return time.process_time()

    def generator(self, workload: Workload) -> BatchGenerator:
        """Make mlx-lm's continuous batch, its own options but the number of rows."""
        return BatchGenerator(
            self.model, max_tokens=workload.answer, stop_tokens=[[end] for end in self.ends],
            completion_batch_size=workload.rows,
        )  # fmt: skip


class OneByOne(Stock):
    """mlx-lm, each prompt alone, nothing kept: the tokens that count as right."""

    def run(self, jobs: list[Job], workload: Workload, outcome: Outcome) -> None:
        """Run all jobs."""
        for job in jobs:
            answer: list[int] = []
            for token, _ in generate_step(mx.array(job.tokens), self.model, max_tokens=workload.answer):
                if token in self.ends:
                    break
                answer.append(int(token))
            outcome.tokens.append(answer)


class BatchGenerate(Stock):
    """`mlx_lm.batch_generate`, the function that mlx-lm offers for many prompts."""

    def run(self, jobs: list[Job], workload: Workload, outcome: Outcome) -> None:
        """Run all jobs."""
        prompts = [job.tokens for job in jobs]
        answers = batch_generate(
            self.model, self.tokenizer, prompts, max_tokens=workload.answer, return_token_ids=True,
            completion_batch_size=workload.rows,
        )  # fmt: skip
        outcome.tokens = answers.token_ids


class Uncached(Stock):
    """`BatchGenerator` in order of arrival, every prompt computed whole."""

    def run(self, jobs: list[Job], workload: Workload, outcome: Outcome) -> None:
        """Run all jobs."""
        generator = self.generator(workload)
        outcome.tokens = _drain(generator, generator.insert([job.tokens for job in jobs]))

    def cost(self, jobs: list[Job], workload: Workload) -> dict[str, float]:
        """Return milliseconds of a prefilled and of a decoded token, and c, their ratio.

        Decoded in a full batch after the question alone, so that reading a long prefix is not counted in.
        """
        prompt = jobs[0].tokens
        own = prompt[-min(len(prompt), max(16, workload.question)) :]
        rows = min(workload.rows, len(jobs))
        prefilled = _median(3, lambda: mx.eval([c.state for c in self._prefill(prompt)])) / len(prompt)
        caches = [self._prefill(own) for _ in range(rows)]
        batch = [BatchKVCache.merge(list(layers)) for layers in zip(*caches, strict=True)]
        column = mx.array([[own[-1]]] * rows)
        decoded = _median(7, lambda: mx.eval(mx.argmax(self.model(column, cache=batch)[:, -1], axis=-1))) / rows
        return {"prefill_ms": prefilled * 1e3, "decode_ms": decoded * 1e3, "c": decoded / prefilled}

    def _prefill(self, tokens: Sequence[int], step: int = 2048) -> list[Any]:
        cache = make_prompt_cache(self.model)
        for start in range(0, len(tokens), step):
            self.model(mx.array([tokens[start : start + step]]), cache=cache)
            mx.eval([layer.state for layer in cache])
        return cache


class Copied(Uncached):
    """The best use of stock parts: each prefix computed once, its KV copied into every row, groups one by one."""

    def run(self, jobs: list[Job], workload: Workload, outcome: Outcome) -> None:
        """Run all jobs."""
        order = sorted(range(len(jobs)), key=lambda i: jobs[i].group)
        prefixes: dict[int, list[Any]] = {}
        for job in jobs:
            if job.shared >= MIN_SHARED_TOKENS and job.group not in prefixes:
                prefixes[job.group] = self._prefill(job.tokens[: job.shared])
                outcome.cached_tokens -= job.shared
        kept = {i: jobs[i].shared if jobs[i].group in prefixes else 0 for i in order}
        outcome.cached_tokens += sum(kept.values())
        caches = [_same_arrays(prefixes[jobs[i].group]) if kept[i] else make_prompt_cache(self.model) for i in order]
        generator = self.generator(workload)
        uids = generator.insert([jobs[i].tokens[kept[i] :] for i in order], caches=caches)
        answers = dict(zip(order, _drain(generator, uids), strict=True))
        outcome.tokens = [answers[i] for i in range(len(jobs))]


class Ours(Stock):
    """The engine in process, with the product's own order of jobs; each run begins with an empty tree."""

    def __init__(self, directory: str) -> None:
        mx.set_cache_limit(1 << 30)
        self.loaded = model.load(directory, dtype="stored", device=platform.device())
        self.tokenizer, self.ends = self.loaded.tokenizer, self.loaded.eos_token_ids
        hook.install(self.loaded.model)
        self.measured = crossover.measured(self.loaded.model)

    def run(self, jobs: list[Job], workload: Workload, outcome: Outcome) -> None:
        """Run all jobs."""
        limits = Limits(workload.rows, CHUNK_TOKENS, KV_BYTES)
        engine = Engine(self.loaded, limits, exact=False, crossover=self.measured)
        plan, sampling = Plan(), Sampling(temperature=0.0, max_tokens=workload.answer)
        plan.add(Waiting(str(i), np.array(job.tokens, np.int32)) for i, job in enumerate(jobs))
        done: dict[int, Finished] = {}
        given = 0
        while len(done) < len(jobs):
            for chosen in plan.next(workload.rows + SPARE_PROMPTS - (given - len(done))):
                engine.add(chosen.id, Prompt(chosen.tokens, sampling, chosen.branches))
                given += 1
            for event in engine.step():
                if not isinstance(event, Finished):
                    raise RuntimeError(f"a job did not finish: {event}")
                done[int(event.id)] = event
                plan.remove([event.id])
        outcome.tokens = [[token for token in done[i].tokens if token not in self.ends] for i in range(len(jobs))]
        outcome.cached_tokens = sum(event.usage.cached_tokens for event in done.values())


CONTESTANTS: dict[str, Any] = {
    "mlx-lm one by one": OneByOne,
    "batch_generate": BatchGenerate,
    "stock uncached": Uncached,
    "stock, KV copied": Copied,
    "mlx_lm.server": Server,
    "radixq engine": Ours,
    "radixq whole": Whole,
}


def _drain(generator: BatchGenerator, uids: Sequence[int]) -> list[list[int]]:
    answers: dict[int, list[int]] = {uid: [] for uid in uids}
    left = len(answers)
    while left:
        for response in generator.next()[1]:
            if response.finish_reason != "stop":
                answers[response.uid].append(int(response.token))
            left -= response.finish_reason is not None
    generator.close()
    return list(answers.values())


def _same_arrays(caches: list[KVCache]) -> list[KVCache]:
    """Return caches on the same arrays; the batch copies them when the row joins."""
    again = []
    for cache in caches:
        copy = KVCache()
        copy.state = cache.state
        again.append(copy)
    return again


def _median(times: int, work: Any) -> float:
    """Return the median seconds of a call, after one to warm up."""
    work()
    seconds = []
    for _ in range(times):
        began = clock_s(DEVICE.kind)
        work()
        seconds.append(clock_s(DEVICE.kind) - began)
    return float(np.median(seconds))


def measure(contestant: Contestant, workload: Workload, seed: int) -> Outcome:
    """Run the workload once and say what it took."""
    jobs = workload.jobs(seed, contestant.tokenizer)
    prompts = [job.tokens for job in jobs]
    outcome = Outcome(prompt_tokens=sum(map(len, prompts)), distinct_tokens=distinct_tokens(prompts))
    mx.clear_cache()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    cpu, wall = contestant.cpu_s(), time.perf_counter()
    contestant.run(jobs, workload, outcome)
    outcome.cpu_s, outcome.wall_s = contestant.cpu_s() - cpu, time.perf_counter() - wall
    outcome.peak_bytes = outcome.peak_bytes or mx.get_peak_memory() - held
    return outcome


def _answer(contestant: Contestant, workload: Workload, request: dict[str, int]) -> dict[str, Any]:
    if "cost" in request:
        assert isinstance(contestant, Uncached)
        return contestant.cost(workload.jobs(request["cost"], contestant.tokenizer), workload)
    outcome = measure(contestant, workload, request["run"])
    tokenizer = contestant.tokenizer
    again = [tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False) for ids in outcome.tokens]
    return {**asdict(outcome), "text_tokens": again}


@contextlib.contextmanager
def _private_stdout() -> Iterator[Any]:
    """Keep stdout for the answers: what libraries print goes to stderr."""
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)
        yield answers


def main() -> None:
    """Answer until stdin ends."""
    name, workload_name, directory = sys.argv[1:4]
    workload = {**WORKLOADS, **QUICK}[workload_name]
    with _private_stdout() as answers, contextlib.ExitStack() as stack:
        contestant = CONTESTANTS[name](directory)
        if hasattr(contestant, "__exit__"):
            stack.enter_context(contestant)
        measure(contestant, workload.small(), seed=10_000)
        print(json.dumps({"ready": name, "blas": BLAS.name, "device": asdict(DEVICE)}), file=answers)
        for line in sys.stdin:
            print(json.dumps(_answer(contestant, workload, json.loads(line))), file=answers)
    os._exit(0)  # mlx_lm.server's threads have no way to be asked to end


if __name__ == "__main__":
    main()
