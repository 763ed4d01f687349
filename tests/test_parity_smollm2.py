"""SmolLM2 on real prompts: every job in the batch gives mlx-lm's tokens for that job alone, in float32."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from common.messages import Sampling
from tests.engines import Bench, Watched
from tests.engines import alone as mlx_lm_alone
from tests.models import smollm2_path
from tests.test_parity import first_difference_is_a_tie
from worker import hook, model, platform
from worker.cache import Limits
from worker.engine import Engine
from worker.sequence import Prompt

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SYSTEMS = [
    "You are the help desk of a public library. Answer in one or two plain sentences. Opening hours are 9 to 18 from "
    "Tuesday to Saturday. A card costs nothing. Books can be kept for four weeks and renewed twice.",
    "Classify the review as positive, negative or mixed. Answer with one word.\n\nReview: The soup was cold.\n"
    "negative\nReview: Lovely staff, and the cake was perfect.\npositive\nReview: Good coffee, rude waiter.\nmixed",
    "You translate short English sentences into French. Give the translation and nothing else.",
]
QUESTIONS = [
    [
        "When do you open on Sunday?",
        "How long may I keep a book?",
        "What does a card cost?",
        "Can I renew a book three times?",
        "Where is the toilet?",
        "Do you lend 📚 e-books?",
        "How much is 12 times 12?",
        "Ist die Bibliothek montags offen?",
        "I lost my card.",
        "Which book should a child of 7 read?",
        "Thank you!",
        "Are dogs allowed?",
    ],
    [
        "Review: I waited an hour.",
        "Review: Best pizza in town!",
        "Review: Nice view, bad wine.",
        "Review: 10/10",
        "Review: Never again.",
        "Review: The room was clean but loud.",
        "Review: meh",
        "Review: They forgot my order twice.",
        "Review: A warm welcome and great bread.",
        "Review: Okay for the price.",
        "Review: 素晴らしい!",
        "Review: Too salty, too small, too late.",
    ],
    [
        "Good morning.",
        "Where is the station?",
        "I have two cats and 1,234 books.",
        "The weather is nice today.",
        "She does not like coffee.",
        "How old are you?",
        "We will arrive at 9:45.",
        "My house is red.",
        "Close the door, please.",
        "I do not understand.",
        "They sing well.",
        "See you tomorrow!",
    ],
]
MAX_TOKENS = 12


@pytest.fixture(scope="module")
def loaded() -> model.LoadedModel:
    return model.load(str(smollm2_path()), dtype="float32", device=platform.device())


def prompts(tokenizer: Any) -> dict[str, Prompt]:
    """Return all jobs, the groups taking turns as they would arrive from several services."""
    jobs = {}
    for number, turn in enumerate(zip(*QUESTIONS, strict=True)):
        for group, question in enumerate(turn):
            messages = [{"role": "system", "content": SYSTEMS[group]}, {"role": "user", "content": question}]
            tokens = np.array(tokenizer.apply_chat_template(messages, add_generation_prompt=True), np.int32)
            jobs[f"{group}-{number}"] = Prompt(tokens, Sampling(max_tokens=MAX_TOKENS))
    return jobs


def test_three_groups_of_real_prompts_give_the_tokens_of_mlx_lm_alone(loaded: model.LoadedModel) -> None:
    jobs = prompts(loaded.tokenizer)
    (eos,) = loaded.eos_token_ids
    alone = {job_id: mlx_lm_alone(loaded.model, job.tokens, MAX_TOKENS, eos=eos) for job_id, job in jobs.items()}
    hook.install(loaded.model)
    watched = Watched(loaded.model)
    limits = Limits(max_rows=12, chunk_tokens=256, kv_bytes=1 << 30)
    engine = Engine(replace(loaded, model=watched), limits, exact=False)  # type: ignore[arg-type]
    watched.engine = engine
    bench = Bench(engine, watched, loaded.model, loaded.eos_token_ids)
    done = bench.run(jobs)
    ties = sum(first_difference_is_a_tie(job_id, bench.tokens(job_id), *alone[job_id]) for job_id in jobs)
    print(f"{len(jobs)} jobs, {ties} ties")
    assert ties <= 3
    assert sum(f.usage.cached_tokens for f in done.values()) > 0.5 * sum(f.usage.prompt_tokens for f in done.values())
