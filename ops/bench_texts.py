"""Real text for the few-shot workload: an instruction, labelled examples, reports to classify."""

from __future__ import annotations

import itertools

import numpy as np

_LABELS = {
    "heating": ("The radiator in {} stays cold", "There is no hot water in {}", "The heating in {} bangs at night"),
    "light": ("The lamp in {} flickers", "Two bulbs in {} are dead", "The switch in {} does nothing"),
    "door": ("The lock of {} jams", "The door to {} no longer closes", "Somebody broke the handle of {}"),
    "water": ("The tap in {} drips all day", "The drain in {} is blocked", "There is a damp patch on the wall of {}"),
    "noise": (
        "People in {} play music after midnight",
        "A machine in {} hums all night",
        "The dog in {} barks for hours",
    ),
    "waste": ("The bins behind {} overflow", "Somebody left an old sofa in {}", "Nobody collected the paper of {}"),
}
_PLACES = (
    "the kitchen on the third floor", "flat 12", "the laundry room", "the north stairwell", "the bicycle cellar",
    "house number 7", "the shared workshop", "the attic of block C", "flat 3", "the entrance hall", "the guest room",
)  # fmt: skip
_RULES = """\
List {} of the caretaker's office. You sort reports of tenants for the caretaker of a large house. Read the report \
and answer with exactly one word: heating, light, door, water, noise or waste. Give no explanation. A report about \
several things gets the word for the first of them."""


def few_shot_messages(rng: np.random.Generator, *, num_examples: int, num_jobs: int) -> list[list[dict[str, str]]]:
    """Return one chat per job; all share the system message, which differs from one random state to the next."""
    reports = [(label, form.format(place)) for label, forms in _LABELS.items() for form in forms for place in _PLACES]
    order = [reports[i] for i in rng.permutation(len(reports))]
    examples = [f"Report: {text}.\nWord: {label}" for label, text in itertools.islice(order, num_examples)]
    head = _RULES.format(int(rng.integers(10_000, 99_999)))
    system = "\n\n".join([head, *examples])
    asked = itertools.islice(itertools.cycle(order[num_examples:]), num_jobs)
    return [
        [{"role": "system", "content": system}, {"role": "user", "content": f"Report: {text}.\nWord:"}]
        for _, text in asked
    ]
