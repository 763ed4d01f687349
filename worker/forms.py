"""Which form of attention computes which rows: split a batch into parts by a choice, and attend part by part.

Knows no times: `worker.crossover` measures and chooses. A fused operation of a library is one more entry of `FORMS`,
added where the library can be imported; its function takes what the others take.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from worker.attention import PRODUCT_TOKENS, Plan, Shared, merged, packed, virtual

Choose = Callable[[int, int, int], str]
"""From a segment's readers, new tokens per reader, and tokens to the name of a form."""


class Attend(Protocol):
    """What a form is: see `worker.attention.packed` for the arguments."""

    def __call__(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        plan: Plan,
        layer: int,
        *,
        mask: mx.array | None,
        scale: float,
    ) -> mx.array: ...


@dataclass(frozen=True, slots=True)
class Form:
    """One way to attend.

    Attributes:
        together: rows with the same value of it, given a row's number and its segments', are computed in one go.
        isolates: whether what is not finite in one row stays in that row.
        decodes, prefills: whether it is worth measuring for one new token per row, and for more.
        least_tokens: of a segment, below which it is the same as another form.
    """

    attend: Attend
    together: Callable[[int, tuple[int, ...]], Hashable]
    isolates: bool
    decodes: bool = False
    prefills: bool = False
    least_tokens: int = 1


FORMS: dict[str, Form] = {
    "merged": Form(merged, lambda row, path: None, isolates=True, decodes=True, prefills=True),
    "virtual": Form(virtual, lambda row, path: None, isolates=False, decodes=True, least_tokens=PRODUCT_TOKENS),
    "packed": Form(packed, lambda row, path: path, isolates=False, decodes=True),
    "alone": Form(packed, lambda row, path: row, isolates=True, prefills=True),
}


def always(name: str) -> Choose:
    """Choose one form for everything."""
    return lambda rows, new_tokens, tokens: name


MERGED = always("merged")  # what serves where nothing was measured


def exactly(rows: int, new_tokens: int, tokens: int) -> str:
    """Choose among the forms that are bit-identical to a row alone; a prefill must not spread what is not finite."""
    return "packed" if new_tokens == 1 else "alone"


@dataclass(frozen=True, slots=True)
class Part:
    """Rows that one form computes together.

    Attributes:
        rows: their numbers in the batch, ascending.
        pick: the same as an array, or None where they are all rows.
        plan: what they read; it counts rows within the part.
    """

    form: Form
    rows: tuple[int, ...]
    pick: mx.array | None
    plan: Plan


class Division:
    """A batch's rows in parts; made when rows come and go.

    Attributes:
        shares: whether any row reads a segment; without one, plain attention will do.
        isolates: whether what is not finite in one row stays in that row, in all parts.
    """

    def __init__(self, shared: Sequence[Shared], num_rows: int, choose: Choose, new_tokens: int) -> None:
        groups: dict[tuple[str, Hashable], list[int]] = {}
        for row, (name, path) in enumerate(_choices(shared, num_rows, choose, new_tokens)):
            groups.setdefault((name, FORMS[name].together(row, path)), []).append(row)
        self.parts = [_part(FORMS[name], shared, rows, num_rows) for (name, _), rows in groups.items()]
        order = [row for part in self.parts for row in part.rows]
        self._back = mx.array(sorted(range(num_rows), key=order.__getitem__))
        self.shares = bool(shared)
        self.isolates = not shared or all(part.form.isolates for part in self.parts)

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, layer: int, *, mask: mx.array | None, scale: float
    ) -> mx.array:
        """Attend to the rows' segments and tails; arguments as `worker.attention.packed`."""
        outs = []
        for part in self.parts:
            rows, own = (queries, keys, values), mask
            if part.pick is not None:
                rows = queries[part.pick], keys[part.pick], values[part.pick]
                own = mask if mask is None or mask.shape[0] == 1 else mask[part.pick]
            outs.append(part.form.attend(*rows, part.plan, layer, mask=own, scale=scale))
        return outs[0] if len(outs) == 1 else mx.concatenate(outs)[self._back]


def _choices(
    shared: Sequence[Shared], num_rows: int, choose: Choose, new_tokens: int
) -> list[tuple[str, tuple[int, ...]]]:
    """Return for each row the form that suits the most work on its path best, and the numbers of its segments.

    A row without a segment goes with the others.
    """
    sizes = [(len(rows), layers[0][0].shape[2]) for layers, rows in shared]
    names = [choose(readers, new_tokens, tokens) for readers, tokens in sizes]
    work = [readers * tokens for readers, tokens in sizes]
    usual = names[max(range(len(shared)), key=work.__getitem__)] if shared else choose(num_rows, new_tokens, 0)
    paths: list[list[int]] = [[] for _ in range(num_rows)]
    for number, (_, rows) in enumerate(shared):
        for row in rows:
            paths[row].append(number)
    return [(names[max(path, key=work.__getitem__)] if path else usual, tuple(path)) for path in paths]


def _part(form: Form, shared: Sequence[Shared], rows: list[int], num_rows: int) -> Part:
    place = {row: i for i, row in enumerate(rows)}
    theirs = [(layers, [place[row] for row in readers if row in place]) for layers, readers in shared]
    plan = Plan([(layers, readers) for layers, readers in theirs if readers], len(rows))
    return Part(form, tuple(rows), mx.array(rows) if len(rows) < num_rows else None, plan)
