"""Which form of attention computes which rows: split a batch into parts by a choice, and attend part by part.

Knows no times: `worker.crossover` measures and chooses. A fused operation of a library is one more entry of `FORMS`,
added where the library can be imported; its function takes what the others take.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from worker.attention import PRODUCT_TOKENS, Plan, Shared, Tail, merged, packed, plain, virtual

Choose = Callable[[int, int, int], str]
"""From a segment's readers, new tokens per reader, and tokens to the name of a form of `FORMS`.

New tokens are one in a decode step and more in a prefill, where one choice serves all chunks, also one of one column.
For a prefill without any segment readers are all rows and tokens 0; any name but "merged" then means `PLAIN`.
"""


class Attend(Protocol):
    """What a form is: see `worker.attention.plain` for the arguments."""

    def __call__(
        self, queries: mx.array, tails: Sequence[Tail], plan: Plan, layer: int, *, scale: float
    ) -> mx.array: ...


@dataclass(frozen=True, slots=True)
class Form:
    """One way to attend.

    Attributes:
        together: rows with the same value of it, given a row's number and its segments', are computed in one go; None
            where all are, whatever they read.
        isolates: whether what is not finite in one row stays in that row.
        decodes, prefills: whether it is worth measuring for one new token per row, and for more.
        least_tokens: of a segment, below which it is the same as another form.
    """

    attend: Attend
    together: Callable[[int, tuple[int, ...]], Hashable] | None
    isolates: bool
    decodes: bool = False
    prefills: bool = False
    least_tokens: int = 0


FORMS: dict[str, Form] = {
    "merged": Form(merged, None, isolates=True, decodes=True, prefills=True),
    "virtual": Form(virtual, None, isolates=False, decodes=True, least_tokens=PRODUCT_TOKENS),
    "packed": Form(packed, lambda row, path: path, isolates=False, decodes=True),
    "alone": Form(packed, lambda row, path: row, isolates=True, prefills=True),
}

PLAIN = Form(plain, None, isolates=True)
"""For rows that read no segment, unless they are computed together with rows that do. Nobody chooses it."""


def always(name: str) -> Choose:
    """Choose one form for everything."""
    return lambda rows, new_tokens, tokens: name


MERGED = always("merged")  # what serves where nothing was measured


def exactly(rows: int, new_tokens: int, tokens: int) -> str:
    """Choose among the forms that are bit-identical to a row alone; a prefill must not spread what is not finite."""
    return "packed" if new_tokens == 1 else "alone"


@dataclass(frozen=True, slots=True)
class Lines:
    """The lines of one bucket on which rows of a part lie.

    Attributes:
        bucket: its number.
        pick: the lines' numbers in the bucket, int32 [b]; None where they are all.
        rows: the rows' numbers in the part, int32 [b]; None where they are all of its rows, in order.
    """

    bucket: int
    pick: mx.array | None
    rows: mx.array | None

    def of(self, tails: Sequence[Tail]) -> Tail:
        """Return these lines out of all buckets'."""
        keys, values, mask, _ = tails[self.bucket]
        if self.pick is not None:
            keys, values, mask = keys[self.pick], values[self.pick], None if mask is None else mask[self.pick]
        return Tail(keys, values, mask, self.rows)


@dataclass(frozen=True, slots=True)
class Part:
    """Rows that one form computes together.

    Attributes:
        rows: their numbers in the batch, ascending.
        pick: the same as an array, int32; None where they are all rows.
        plan: what they read; it counts rows within the part.
        lines: where their tails are, at most one entry per bucket.
    """

    form: Form
    rows: tuple[int, ...]
    pick: mx.array | None
    plan: Plan
    lines: Sequence[Lines]


class Division:
    """A batch's rows in parts; made when rows come and go, used by every layer of every step.

    Attributes:
        parts: each row is in one of them.
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
        """Divide rows 0 to `num_rows` - 1.

        Args:
            shared: the segments, root side first; the keys and values of each row's tail are given to `attend`.
            new_tokens: as `Choose` takes them: more than one in a prefill, also for a chunk of one column.
            buckets: which rows' tails lie together, in the order of their lines; None: all do, as numbered.
        """
        groups: dict[tuple[Form, Hashable], list[int]] = {}
        for row, (form, path) in enumerate(_choices(shared, num_rows, choose, new_tokens)):
            groups.setdefault((form, form.together(row, path) if form.together else None), []).append(row)
        lying = [range(num_rows)] if buckets is None else buckets
        self.parts = [_part(form, shared, rows, num_rows, lying) for (form, _), rows in groups.items()]
        self._back = _sorting([row for part in self.parts for row in part.rows])
        self.isolates = all(part.form.isolates for part in self.parts)

    def attend(self, queries: mx.array, tails: Sequence[Tail], layer: int, *, scale: float) -> mx.array:
        """Attend to the rows' segments and tails: [B, H, L, D] to [B, H, L, Dv].

        `tails` has all lines of each bucket, in the buckets' order; their `rows` are not read.
        """
        outs = []
        for part in self.parts:
            theirs = queries if part.pick is None else queries[part.pick]
            lines = [lines.of(tails) for lines in part.lines]
            outs.append(part.form.attend(theirs, lines, part.plan, layer, scale=scale))
        return outs[0] if len(outs) == 1 else mx.concatenate(outs)[self._back]


def _sorting(order: Sequence[int]) -> mx.array:
    """Return what sorts things that come in this order of their numbers: int32, where each number is found."""
    return mx.array(sorted(range(len(order)), key=order.__getitem__))


def _choices(
    shared: Sequence[Shared], num_rows: int, choose: Choose, new_tokens: int
) -> list[tuple[Form, tuple[int, ...]]]:
    """Return for each row the form that suits the most work on its path best, and the numbers of its segments.

    A row without a segment goes with the others, if theirs is a form for all rows, and else is plain. Without any
    segment, steps are plain, and prefills where merged is slower.
    """
    if not shared:
        merges = new_tokens > 1 and choose(num_rows, new_tokens, 0) == "merged"
        return [(FORMS["merged"] if merges else PLAIN, ())] * num_rows
    sizes = [(len(rows), layers[0][0].shape[2]) for layers, rows in shared]
    forms = [FORMS[choose(readers, new_tokens, tokens)] for readers, tokens in sizes]
    work = [readers * tokens for readers, tokens in sizes]
    usual = forms[max(range(len(shared)), key=work.__getitem__)]
    without = PLAIN if usual.together else usual
    paths: list[list[int]] = [[] for _ in range(num_rows)]
    for number, (_, rows) in enumerate(shared):
        for row in rows:
            paths[row].append(number)
    return [(forms[max(path, key=work.__getitem__)] if path else without, tuple(path)) for path in paths]


def _part(
    form: Form, shared: Sequence[Shared], rows: list[int], num_rows: int, buckets: Sequence[Sequence[int]]
) -> Part:
    place = {row: i for i, row in enumerate(rows)}
    theirs = [(layers, [place[row] for row in readers if row in place]) for layers, readers in shared]
    lines, order = list[Lines](), list[int]()
    for number, bucket in enumerate(buckets):
        if picked := [line for line, row in enumerate(bucket) if row in place]:
            numbers = [place[bucket[line]] for line in picked]
            in_order = numbers == list(range(len(rows)))
            whole = len(picked) == len(bucket)
            lines.append(Lines(number, None if whole else mx.array(picked), None if in_order else mx.array(numbers)))
            order += numbers
    back = _sorting(order) if len(lines) > 1 or order != sorted(order) else None
    plan = Plan([(layers, readers) for layers, readers in theirs if readers], len(rows), back)
    pick = mx.array(rows) if len(rows) < num_rows else None
    return Part(form, tuple(rows), pick, plan, lines)
