"""From outcomes to figures, a table that a person reads, and a plot. Starts nothing and measures nothing."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from bench_workloads import Workload

BASE, RIGHT = "stock uncached", "mlx-lm one by one"
_PACKAGES = ("mlx", "mlx-lm", "radixq", "rq", "redis", "numpy", "mkl")
Figures = dict[str, Any]
_CLOCKS = {"cpu_s": "CPU seconds", "wall_s": "seconds"}


def heading(quick: bool) -> Figures:
    """Return what is needed to read the figures later: machine, versions, commit, command."""
    return {
        "bench": 1,
        "quick": quick,
        "command": " ".join(["./ops/bench", *sys.argv[1:]]),
        "commit": _commit(),
        "machine": {
            "cpu": _cpu_name(), "cores": os.cpu_count(), "system": platform.platform(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        },
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "load_before": os.getloadavg(),
        "workloads": [],
        "parts": [],
        "failures": [],
    }  # fmt: skip


def heading_text(result: Figures) -> str:
    """Return the heading for a person."""
    machine, versions = result["machine"], result["versions"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, {machine['system']}\n"
        + ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        + f"\ncommit {result['commit']}: {result['command']}\n"
        f"CPU seconds of all threads, one BLAS thread each; load before {result['load_before'][0]:.1f}"
    )


def summary(workload: Workload, outcomes: dict[str, list[Figures]], cost: Figures, ready: list[Figures]) -> Figures:
    """Return one workload's figures; there may be nobody who finished it."""
    if not outcomes:
        return {"name": workload.name, "title": workload.title, "jobs": workload.num_jobs, "contestants": []}
    first = next(iter(outcomes.values()))[0]
    generated = sum(map(len, next((o[0] for n, o in outcomes.items() if n == RIGHT), first)["tokens"]))
    sizes = {"prompt_tokens": first["prompt_tokens"], "distinct_tokens": first["distinct_tokens"]}
    bound = _limit(sizes, generated, cost.get("c", 1.0))
    right = outcomes.get(RIGHT, [None])[0]
    device = next(iter(ready))["device"]
    clock = "cpu_s" if device["kind"] == "cpu" else "wall_s"  # a GPU's work is not in CPU seconds
    return {
        "name": workload.name, "title": workload.title, "jobs": workload.num_jobs, "device": device["name"],
        "blas": sorted({told["blas"] for told in ready}), "clock": clock, **sizes, "generated_tokens": generated,
        **cost, "limit": bound, "limit_by_tokens": _limit(sizes, generated, 1),
        "contestants": [_contestant(name, outcomes, right, bound, clock) for name in outcomes],
    }  # fmt: skip


def _limit(sizes: Figures, generated: int, c: float) -> float:
    """Return R, how many times cheaper the jobs can get when a decoded token costs c prefilled ones.

    For G groups of N jobs this is (P + q + c*o) / (P/N + q + c*o).
    """
    return float((sizes["prompt_tokens"] + c * generated) / (sizes["distinct_tokens"] + c * generated))


def _contestant(
    name: str, outcomes: dict[str, list[Figures]], right: Figures | None, bound: float, clock: str
) -> Figures:
    runs = outcomes[name]
    cpu, wall = [run["cpu_s"] for run in runs], [run["wall_s"] for run in runs]
    prompt, generated = runs[0]["prompt_tokens"], sum(map(len, runs[0]["tokens"]))
    figures: Figures = {
        "name": name, "runs": len(runs), "cpu_s": _spread(cpu), "wall_s": _spread(wall),
        "prompt_tokens_per_s": prompt / float(np.median(wall)),
        "generated_tokens_per_s": generated / float(np.median(wall)),
        "peak_bytes": int(np.median([run["peak_bytes"] for run in runs])),
        "hit_rate": float(np.median([run["cached_tokens"] for run in runs])) / prompt,
        "agreement": None if right is None else _agreement(runs[0], right),
    }  # fmt: skip
    base, own = ([run[clock] for run in outcomes.get(who, [])] for who in (BASE, name))
    if base:
        figures["times_stock"] = float(np.median(base) / np.median(own))
        figures["interval"] = _interval(base, own) if min(len(base), len(own)) >= 3 else None
        figures["of_limit"] = figures["times_stock"] / bound
    return figures


def _spread(values: list[float]) -> Figures:
    return {"median": float(np.median(values)), "min": min(values), "max": max(values), "all": values}


def _interval(base: list[float], own: list[float]) -> list[float]:
    """Return the 95 % bootstrap interval of the median ratio of runs in the same round."""
    ratios = np.array([b / o for b, o in zip(base, own, strict=False)])
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (10_000, len(ratios))), axis=1)
    return [float(x) for x in np.percentile(medians, [2.5, 97.5])]


def _agreement(run: Figures, right: Figures) -> float:
    """Return the share of tokens that are at their place in the answer of mlx-lm one by one."""
    expected = right["text_tokens"] if run["as_text"] else right["tokens"]
    same = total = 0
    for answer, reference in zip(run["tokens"], expected, strict=True):
        total += max(len(answer), len(reference))
        same += sum(a == b for a, b in zip(answer, reference, strict=False))
    return same / total if total else 1.0


def table(figures: Figures) -> str:
    """Return one workload as a table."""
    if not figures["contestants"]:
        return f"\n== {figures['name']}: {figures['title']}\nnobody finished it"
    head = (
        f"{figures['prompt_tokens']:,} prompt tokens ({figures['distinct_tokens']:,} distinct), "
        f"{figures['generated_tokens']:,} generated, {figures['jobs']} jobs, "
        f"{figures['device']}, BLAS {'/'.join(figures['blas'])}"
    )
    if "c" in figures:
        head += (
            f"\na decoded token costs c = {figures['c']:.2f} prefilled ones ({figures['prefill_ms']:.2f} ms), so "
            f"R = {figures['limit']:.2f} (by token count {figures['limit_by_tokens']:.2f})"
        )
    columns = (
        "",
        "CPU s",
        "min..max",
        "wall s",
        "prompt/s",
        "new/s",
        "peak MiB",
        "hits",
        "x stock",
        "of R",
        "tokens =",
    )
    rows = [columns, *map(_row, figures["contestants"])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    lines = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
             for row in rows]  # fmt: skip
    clock = _CLOCKS[figures["clock"]]
    note = f"\n* one run; x stock: {clock} of stock uncached over this, [95 % interval of pairs]"
    return f"\n== {figures['name']}: {figures['title']}\n{head}\n" + "\n".join(lines) + note


def _row(c: Figures) -> tuple[str, ...]:
    cpu, times = c["cpu_s"], f"{c['times_stock']:.2f}" if "times_stock" in c else "-"
    if c.get("interval"):
        times += " [{:.2f} {:.2f}]".format(*c["interval"])
    return (
        c["name"] + ("*" if c["runs"] == 1 else ""),
        f"{cpu['median']:.2f}",
        f"{cpu['min']:.2f}..{cpu['max']:.2f}",
        f"{c['wall_s']['median']:.2f}",
        f"{c['prompt_tokens_per_s']:.0f}",
        f"{c['generated_tokens_per_s']:.0f}",
        f"{c['peak_bytes'] / 2**20:.0f}",
        f"{100 * c['hit_rate']:.1f} %",
        times,
        f"{c['of_limit']:.2f}" if "of_limit" in c else "-",
        "-" if c["agreement"] is None else f"{100 * c['agreement']:.1f} %",
    )


def parts_text(parts: list[Figures]) -> str:
    """Return the parts, a line or a few each."""
    lines = ["\n== parts"] if parts else []
    for figures in parts:
        sentences = _SENTENCES.get(figures["part"], _facts)(figures)
        lines += [f"{figures['part']:<10} {figures['size']}", *(f"{'':<10} {sentence}" for sentence in sentences)]
    return "\n".join(lines)


def _facts(figures: Figures) -> list[str]:
    return [", ".join(f"{name} {_plain(value)}" for name, value in figures.items() if name not in ("part", "size"))]


def _slice(figures: Figures) -> list[str]:
    cpu, wall = figures["cpu_ms"], figures["wall_ms"]
    return [
        f"match and assembly of a cached prefix: {cpu['p50']:.2f} ms of CPU at p50, {cpu['p99']:.2f} at p99; "
        f"by the clock {wall['p50']:.2f} and {wall['p99']:.2f} (goal: p99 under 1 ms)"
    ]


def _latency(figures: Figures) -> list[str]:
    first, each = figures["first_token_ms"], figures["per_token_ms"]
    return [
        f"first token after {first['uncached']:,.0f} ms, with its prefix cached after {first['cached']:,.0f} ms: "
        f"{figures['times_sooner']:.0f} times sooner",
        f"each token after it: {each['uncached']:.1f} ms, cached {each['cached']:.1f} ms (this machine's wall clock)",
    ]


_GOALS_SET_AT = 362  # jobs/s of SimpleWorker on the machine on which 600 jobs/s and 5 ms were set as goals


def _queue(figures: Figures) -> list[str]:
    speed, cpu, spent = figures["jobs_per_s"], figures["cpu_ms"], figures["overhead_ms"]
    jobs = spent["radixq"]["p50"] / 1e3 * speed["rq_simple_worker"]
    return [
        f"{speed['radixq']:.0f} jobs/s with an engine that does nothing (goal: 600), {cpu['radixq']:.2f} CPU ms each",
        f"RQ's SimpleWorker beside it: {speed['rq_simple_worker']:.0f} jobs/s, {cpu['rq_simple_worker']:.2f} CPU ms; "
        f"{figures['times_simple_worker']:.2f} times",
        f"submit to readable result, less the engine: {_percentiles(spent['radixq'])} ms (goal: p50 within 5)",
        f"RQ's SimpleWorker beside it, nothing to do: {_percentiles(spent['rq_simple_worker'])} ms",
        f"the same in jobs of SimpleWorker: {figures['times_simple_worker']:.2f} times its rate (goal: "
        f"{600 / _GOALS_SET_AT:.2f}), p50 is the time of {jobs:.2f} of them (goal: {0.005 * _GOALS_SET_AT:.2f})",
    ]


def _percentiles(of: Figures) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in of.items())


_SENTENCES = {"slice": _slice, "latency": _latency, "queue": _queue}
"""How a part is told to a person; of the others every figure is named."""


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name} {_plain(inner)}" for name, inner in value.items()) + ")"
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def plot(result: Figures, path: Path) -> None:
    """Draw what time each contestant needs, and what memory, workload by workload."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    workloads = [workload for workload in result["workloads"] if workload["contestants"]]
    if not workloads:
        return
    heights = [1.1 + 0.3 * len(workload["contestants"]) for workload in workloads]
    figure, axes = pyplot.subplots(
        len(workloads), 2, figsize=(13, 0.9 + sum(heights)), squeeze=False, width_ratios=(5, 3), height_ratios=heights
    )
    for (left, right), workload in zip(axes, workloads, strict=True):
        _time_bars(left, workload)
        _peak_bars(right, workload)
    machine, versions = result["machine"], result["versions"]
    figure.suptitle("radixq beside mlx-lm: the same jobs, the same model, one BLAS thread", fontsize=13, weight="bold")
    note = f"{machine['cpu']}, {machine['cores']} cores; mlx {versions['mlx']}, mlx-lm {versions['mlx-lm']}; "
    note += f"commit {result['commit']}; medians, black: 95 % interval of pairs, or smallest to largest; * one run"
    figure.text(0.5, 0.006, note, ha="center", fontsize=8, color="#555555")
    figure.tight_layout(rect=(0, 0.02, 1, 0.99))
    figure.savefig(path, dpi=130)


def _time_bars(axis: Any, workload: Figures) -> None:
    """How many times sooner than stock uncached; where that did not run, the seconds."""
    contestants = list(reversed(workload["contestants"]))
    based = all("times_stock" in c for c in contestants)
    clock = workload["clock"]
    values = [c["times_stock"] if based else c[clock]["median"] for c in contestants]
    ends = [max(value, *_whisker(c, based, clock)) for value, c in zip(values, contestants, strict=True)]
    _barh(axis, contestants, values, [f" {value:.2f}x" if based else f" {value:.1f} s" for value in values], ends)
    for i, c in enumerate(contestants):
        axis.plot(_whisker(c, based, clock), [i, i], color="#222222", linewidth=1.5)
    top = max(ends)
    if based:
        bound = workload["limit"]
        axis.axvline(bound, color="#2a9d8f", linestyle="--", linewidth=1.3)
        axis.annotate(f"limit R = {bound:.1f} ", (bound, len(values) - 0.45), fontsize=8, color="#2a9d8f", ha="right")
        top = max(top, bound)
    axis.set_xlim(0, 1.12 * top)
    word = _CLOCKS[clock]
    measure = f"stock uncached's {word} over this" if based else f"{word}, shorter is better"
    axis.set_title(f"{workload['title']}: {measure}", fontsize=9, loc="left")


def _whisker(c: Figures, based: bool, clock: str) -> list[float]:
    return list(c["interval"] or [c["times_stock"]] * 2) if based else [c[clock]["min"], c[clock]["max"]]


def _peak_bars(axis: Any, workload: Figures) -> None:
    contestants = list(reversed(workload["contestants"]))
    peaks = [c["peak_bytes"] / 2**20 for c in contestants]
    _barh(axis, contestants, peaks, [f" {peak:.0f}" for peak in peaks], peaks)
    axis.set_yticks([])
    axis.set_xlim(0, 1.18 * max([1.0, *peaks]))
    axis.set_title("peak MiB beyond the weights", fontsize=9, loc="left")


def _barh(axis: Any, contestants: list[Figures], values: list[float], words: list[str], ends: list[float]) -> None:
    names = [c["name"] + ("*" if c["runs"] == 1 else "") for c in contestants]
    axis.barh(names, values, color=["#d1495b" if c["name"].startswith("radixq") else "#8d99ae" for c in contestants])
    for i, (word, end) in enumerate(zip(words, ends, strict=True)):
        axis.annotate(word, (end, i), va="center", fontsize=8)
    axis.set_ylim(-0.6, len(names) + 0.1)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _commit() -> str:
    try:
        word = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True,
            cwd=Path(__file__).parent,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return word.stdout.strip()


def _cpu_name() -> str:
    if sys.platform == "darwin":
        asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
