"""Measure at load which form of attention is fastest for how many rows and tokens, and choose by it. Knows no job.

A small table for the shape of one model's heads on the device at hand, kept in a file for the next start. Times are
the best of a few, since a device may be busy. A form must be clearly faster than the merged one to be chosen: that one
needs no copies, and keeps what is not finite within its row.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, make_prompt_cache

from common.log import logger
from worker.attention import Shared, Tail
from worker.forms import FORMS, Division, always
from worker.platform import BlasInfo, DeviceInfo

COPIES = "copies"
"""What a form is compared with: plain attention over a copy of the prefix per row. Never used, only measured."""
CLEARLY = 0.85  # of the time of what it would replace
BUDGET_S = 1.0  # for all measurements but the first; what does not fit goes by the nearest that did
POINT_S, MIN_RUNS, MAX_RUNS = 0.05, 2, 8  # as many runs as fit into this time, within bounds
TAIL_TOKENS = 64
DECODE = [(1, 1, 64), (4, 1, 64), (1, 1, 512), (16, 1, 64), (4, 1, 512), (1, 1, 2048), (16, 1, 512), (4, 1, 2048)]
PREFILL = [(1, 64, 0), (1, 64, 512), (1, 64, 2048)]
FIRST = [DECODE[0], *PREFILL[:2]]  # one of each kind, however long they take on a busy machine: they are kept in a file
OWN_TOKENS = 512  # of a row that prefills without a segment
_ERROR = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 2e-1}  # of values of about 1

log = logger("worker.crossover")


@dataclass(frozen=True, slots=True)
class HeadShape:
    """What the time of attention depends on, besides rows and tokens."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Point:
    """Milliseconds by form for `rows` rows with `new_tokens` each, over one segment of `tokens`, if not 0."""

    rows: int
    new_tokens: int
    tokens: int
    ms: Mapping[str, float]

    @property
    def best(self) -> str:
        """The form to use."""
        fastest = min((name for name in self.ms if name in FORMS), key=self.ms.__getitem__, default="merged")
        merged = self.ms.get("merged", math.inf)
        return fastest if self.ms.get(fastest, math.inf) < CLEARLY * merged else "merged"

    @property
    def copies_win(self) -> bool:
        """Whether per-row copies would be clearly faster, had they nothing else against them."""
        return self.ms.get(COPIES, math.inf) < CLEARLY * self.ms.get(self.best, 0.0)


@dataclass(frozen=True, slots=True)
class Crossover:
    """The form that was measured fastest nearest by; where nothing was, merged, and plain where no segment is."""

    points: tuple[Point, ...] = ()

    def __call__(self, rows: int, new_tokens: int, tokens: int) -> str:
        """Return the name of the form for a segment; a `worker.forms.Choose`."""

        def distance(point: Point) -> float:
            return abs(math.log(point.rows / rows)) + abs(math.log(max(1, point.tokens) / max(1, tokens)))

        alike = [
            point
            for point in self.points
            if (point.new_tokens == 1) == (new_tokens == 1) and (point.tokens == 0) == (tokens == 0)
        ]
        unmeasured = "merged" if tokens else "alone"
        return min(alike, key=distance).best if alike else unmeasured

    @property
    def words(self) -> str:
        """Say what it chooses, for someone who reads the metrics: `merged from 4 rows x 64 tokens, else packed`."""
        decode = [point for point in self.points if point.new_tokens == 1]
        prefill = sorted({point.best for point in self.points if point.new_tokens > 1 and point.tokens} - {"merged"})
        said = [_regions(decode), *(f"{name} where prompts are read" for name in prefill)]
        if slower := [_size_text(*_size(point)) for point in sorted(decode, key=_size) if point.copies_win]:
            said.append(f"a copy per row would be faster for {', '.join(slower)}")
        return "; ".join(said)


UNMEASURED = Crossover()


def _size(point: Point) -> tuple[int, int]:
    return point.rows, point.tokens


def _size_text(rows: int, tokens: int) -> str:
    return f"{rows} row{'s' if rows > 1 else ''} x {tokens} tokens"


def _regions(points: list[Point]) -> str:
    """Say which form is chosen where: one of two from some size on, or the exceptions one by one."""
    chosen = {_size(point): point.best for point in sorted(points, key=_size)}
    usual = chosen[max(chosen, key=math.prod)] if chosen else "merged"
    others = {size: name for size, name in chosen.items() if name != usual}
    if not others:
        return usual
    kept = [size for size in chosen if size not in others]
    rows, tokens = (min(values) for values in zip(*kept, strict=True))
    if len(set(others.values())) == 1 and not any(r >= rows and t >= tokens for r, t in others):
        return f"{usual} from {_size_text(rows, tokens)}, else {next(iter(others.values()))}"
    return f"{usual}, but " + ", ".join(f"{name} for {_size_text(*size)}" for size, name in others.items())


# -- measuring -------------------------------------------------------------------------------------------------------


def head_shape(model: Any) -> HeadShape | None:
    """Return the shape of a hooked model's heads, without computing anything; None if no layer shows it."""
    seen: list[HeadShape] = []

    class Watching(KVCache):
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]

        def attend(self, queries: mx.array, keys: mx.array, values: mx.array, **options: Any) -> mx.array:
            dtype = str(keys.dtype).removeprefix("mlx.core.")
            seen.append(HeadShape(queries.shape[1], keys.shape[1], keys.shape[3], values.shape[3], dtype))
            return mx.fast.scaled_dot_product_attention(queries, keys, values, **options)

    model(mx.array([[0]]), cache=[Watching() for _ in make_prompt_cache(model)])
    return max(seen, key=seen.count, default=None)


def measured(model: Any) -> Crossover:
    """Measure for a hooked model's heads now, as `at_load` does where nobody did before."""
    shape = head_shape(model)
    return measure(shape, budget_s=BUDGET_S) if shape else UNMEASURED


def measure(shape: HeadShape, *, budget_s: float) -> Crossover:
    """Time every form at a size of each kind, and at more, of growing cost, until the budget is spent."""
    until, points = time.perf_counter() + budget_s, list[Point]()
    for size in [*FIRST, *sorted({*DECODE, *PREFILL} - {*FIRST}, key=_work)]:
        if size not in FIRST and time.perf_counter() + _expected_s(points[-1], _work(size)) > until:
            break
        points.append(Point(*size, _times(shape, *size)))
    mx.clear_cache()
    return Crossover(tuple(points))


def _work(size: tuple[int, int, int]) -> int:
    rows, new_tokens, tokens = size
    return rows * new_tokens * (tokens or OWN_TOKENS)


def _expected_s(last: Point, work: int) -> float:
    """Return how long a point of so much work takes at least: its arrays are made, and every form runs."""
    once = sum(last.ms.values()) / 1e3 * work / _work((last.rows, last.new_tokens, last.tokens))
    return (2 + MIN_RUNS) * once


def _times(shape: HeadShape, rows: int, new_tokens: int, tokens: int) -> dict[str, float]:
    """Return the milliseconds of every form that gives what copies give; the first call of each warms up."""
    attends = _attends(shape, rows, new_tokens, tokens)
    right, ms = attends[COPIES](), dict.fromkeys(attends, math.inf)
    mx.eval(right)
    for name, attend in list(attends.items()):
        off = float(mx.max(mx.abs(attend() - right)))
        if not off <= _ERROR[shape.dtype]:  # NaN is not
            log.warning("a form of attention is off", extra={"form": name, "off": off})
            del attends[name], ms[name]
    clock = time.process_time if mx.default_device().type == mx.DeviceType.cpu else time.perf_counter
    until, runs = time.perf_counter() + POINT_S, 0
    while runs < MIN_RUNS or (runs < MAX_RUNS and time.perf_counter() < until):
        for name, attend in attends.items():
            began = clock()
            mx.eval(attend())
            ms[name] = min(ms[name], (clock() - began) * 1e3)
        runs += 1
    return ms


def _attends(shape: HeadShape, rows: int, new_tokens: int, tokens: int) -> dict[str, Callable[[], mx.array]]:
    """Return calls that attend with random values: over copies, and in each form that is for such a step."""
    dtype: mx.Dtype = getattr(mx, shape.dtype)
    keys = iter(mx.random.split(mx.random.key(0), 5))

    def random(*sizes: int) -> mx.array:
        return mx.random.normal(sizes, key=next(keys)).astype(dtype)

    widths, scale = (shape.head_dim, shape.value_dim), shape.head_dim**-0.5
    queries = random(rows, shape.heads, new_tokens, shape.head_dim)
    segment = tuple(random(1, shape.kv_heads, tokens, width) for width in widths)
    own = TAIL_TOKENS if tokens else OWN_TOKENS
    tails = tuple(random(rows, shape.kv_heads, own, width) for width in widths)
    copies = [mx.concatenate([mx.repeat(x, rows, axis=0), y], axis=2) for x, y in zip(segment, tails, strict=True)]
    mx.eval(queries, segment, tails, copies)
    shared: list[Shared] = [([(segment[0], segment[1])], range(rows))] if tokens else []
    mask = "causal" if new_tokens > 1 else None
    attends: dict[str, Callable[[], mx.array]] = {
        COPIES: lambda: mx.fast.scaled_dot_product_attention(queries, *copies, scale=scale, mask=mask)
    }
    for name, form in FORMS.items():
        if tokens >= form.least_tokens and (form.decodes if new_tokens == 1 else form.prefills):
            division = Division(shared, rows, always(name), new_tokens)
            attends[name] = partial(division.attend, queries, [Tail(*tails)], 0, scale=scale)
    return attends


# -- the file --------------------------------------------------------------------------------------------------------


def device_key(device: DeviceInfo, blas: BlasInfo) -> str:
    """Name everything that times depend on, besides the shape of the heads."""
    return f"{device.kind}, {device.name}, mlx {device.mlx_version}, BLAS {blas.name}"


def at_load(model: Any, home: Path, device: str) -> Crossover:
    """Return what was measured for a hooked model's heads on this device, measuring now if nobody did before."""
    shape = head_shape(model)
    if shape is None:
        return UNMEASURED
    path = _file(home, device, shape)
    if (kept := _read(path, device, shape)) is not None:
        return kept
    found = measure(shape, budget_s=BUDGET_S)
    _write(path, {"device": device, "shape": asdict(shape), "points": [asdict(point) for point in found.points]})
    return found


def _file(home: Path, device: str, shape: HeadShape) -> Path:
    measured = json.dumps([device, asdict(shape), sorted(FORMS), FIRST, DECODE, PREFILL])
    return home / "crossover" / f"{hashlib.sha256(measured.encode()).hexdigest()[:16]}.json"


def _read(path: Path, device: str, shape: HeadShape) -> Crossover | None:
    """Return the table of a file, or None if there is none, or if it is damaged or somebody else's."""
    try:
        held = json.loads(path.read_text())
        if (held["device"], held["shape"]) != (device, asdict(shape)):
            return None
        points = tuple(
            Point(int(p["rows"]), int(p["new_tokens"]), int(p["tokens"]), dict(p["ms"])) for p in held["points"]
        )
    except (OSError, ValueError, LookupError, TypeError, OverflowError):
        return None
    sizes = [n for p in points for n in (p.rows, p.new_tokens, p.tokens + 1)]
    times = [ms for p in points for ms in p.ms.values()]
    sound = all(n > 0 for n in sizes) and all(isinstance(ms, int | float) and 0 < ms < math.inf for ms in times)
    return Crossover(points) if points and sound and all("merged" in p.ms for p in points) else None


def _write(path: Path, content: dict[str, Any]) -> None:
    """Replace the file as a whole; without it the next start measures again."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps(content, indent=1))
        fresh.replace(path)
