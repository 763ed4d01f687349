"""Which form of attention computes which rows: split a batch into parts by a choice, and attend part by part.

Knows no times: `worker.crossover` measures and chooses. A fused operation of a library is one more entry of `FORMS`,
added where the library can be imported; its function takes what the others take.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from worker.attention import PRODUCT_TOKENS, Plan, Private, Shared, Tail, merged, packed, virtual

Choose = Callable[[int, int, int], str]
"""From a segment's readers, new tokens per reader, and tokens to the name of a form."""


class Attend(Protocol):
    """What a form is: see `worker.attention.packed` for the arguments."""

    def __call__(self, queries: mx.array, private: Private, plan: Plan, layer: int, *, scale: float) -> mx.array: ...


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
    least_tokens: int = 0


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


Held = tuple[mx.array, mx.array, mx.array | None]
"""Keys, values and mask of a bucket of tails, as in `worker.attention.Tail`."""


@dataclass(frozen=True, slots=True)
class Own:
    """The lines of a bucket that rows of a part lie in.

    Attributes:
        lines: None where they are all, in order.
        rows: their numbers in the part, or None where they are all of its rows, in order.
    """

    bucket: int
    lines: mx.array | None
    rows: mx.array | None


@dataclass(frozen=True, slots=True)
class Part:
    """Rows that one form computes together.

    Attributes:
        rows: their numbers in the batch, ascending.
        pick: the same as an array, or None where they are all rows.
        plan: what they read; it counts rows within the part.
        own: where their tails are.
        back: sorts the rows of these by number, if there are several.
    """

    form: Form
    rows: tuple[int, ...]
    pick: mx.array | None
    plan: Plan
    own: Sequence[Own]
    back: mx.array | None

    def private(self, held: Sequence[Held]) -> Private:
        """Return the tails of these rows, out of all buckets'."""
        tails = []
        for own in self.own:
            keys, values, mask = held[own.bucket]
            if own.lines is not None:
                keys, values, mask = keys[own.lines], values[own.lines], None if mask is None else mask[own.lines]
            tails.append(Tail(keys, values, mask, own.rows))
        return Private(tails, self.back)


class Division:
    """A batch's rows in parts; made when rows come and go.

    Attributes:
        isolates: whether what is not finite in one row stays in that row, in all parts.
    """

    def __init__(
        self,
        shared: Sequence[Shared],
        num_rows: int,
        choose: Choose,
        new_tokens: int,
        buckets: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """`buckets` says which rows' tails lie together, in the order of their lines; None: all do, as numbered."""
        groups: dict[tuple[str, Hashable], list[int]] = {}
        for row, (name, path) in enumerate(_choices(shared, num_rows, choose, new_tokens)):
            groups.setdefault((name, FORMS[name].together(row, path)), []).append(row)
        tails = [range(num_rows)] if buckets is None else buckets
        self.parts = [_part(FORMS[name], shared, rows, num_rows, tails) for (name, _), rows in groups.items()]
        self._back = _sorting([row for part in self.parts for row in part.rows])
        self.isolates = not shared or all(part.form.isolates for part in self.parts)

    def attend(self, queries: mx.array, held: Sequence[Held], layer: int, *, scale: float) -> mx.array:
        """Attend to the rows' segments and tails: [B, H, L, D] to [B, H, L, Dv]."""
        outs = []
        for part in self.parts:
            own = queries if part.pick is None else queries[part.pick]
            outs.append(part.form.attend(own, part.private(held), part.plan, layer, scale=scale))
        return outs[0] if len(outs) == 1 else mx.concatenate(outs)[self._back]


def _sorting(order: Sequence[int]) -> mx.array:
    """Return what sorts things that come in this order of their numbers."""
    return mx.array(sorted(range(len(order)), key=order.__getitem__))


def _choices(
    shared: Sequence[Shared], num_rows: int, choose: Choose, new_tokens: int
) -> list[tuple[str, tuple[int, ...]]]:
    """Return for each row the form that suits the most work on its path best, and the numbers of its segments.

    A row without a segment goes with the others. Without any, steps are plain, and prefills where merged is slower.
    """
    if not shared:
        merges = new_tokens > 1 and choose(num_rows, new_tokens, 0) == "merged"
        return [("merged" if merges else "packed", ())] * num_rows
    sizes = [(len(rows), layers[0][0].shape[2]) for layers, rows in shared]
    names = [choose(readers, new_tokens, tokens) for readers, tokens in sizes]
    work = [readers * tokens for readers, tokens in sizes]
    usual = names[max(range(len(shared)), key=work.__getitem__)]
    paths: list[list[int]] = [[] for _ in range(num_rows)]
    for number, (_, rows) in enumerate(shared):
        for row in rows:
            paths[row].append(number)
    return [(names[max(path, key=work.__getitem__)] if path else usual, tuple(path)) for path in paths]


def _part(
    form: Form, shared: Sequence[Shared], rows: list[int], num_rows: int, buckets: Sequence[Sequence[int]]
) -> Part:
    place = {row: i for i, row in enumerate(rows)}
    theirs = [(layers, [place[row] for row in readers if row in place]) for layers, readers in shared]
    plan = Plan([(layers, readers) for layers, readers in theirs if readers], len(rows))
    own, order = list[Own](), list[int]()
    for number, bucket in enumerate(buckets):
        lines = [line for line, row in enumerate(bucket) if row in place]
        if lines:
            numbers = [place[bucket[line]] for line in lines]
            in_order = numbers == list(range(len(rows)))
            whole = len(lines) == len(bucket)
            own.append(Own(number, None if whole else mx.array(lines), None if in_order else mx.array(numbers)))
            order += numbers
    pick = mx.array(rows) if len(rows) < num_rows else None
    back = _sorting(order) if len(own) > 1 or order != sorted(order) else None
    return Part(form, tuple(rows), pick, plan, own, back)
