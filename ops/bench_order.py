"""What a window of 256 jobs costs, tree by tree: `python -m ops.bench_order [--seeds N ...]`. No model, no clock.

Prints tokens computed over distinct ones, with a cache of one path, the mean of the seeds: in the order of arrival;
finishing every subtree; as `worker.group` has it; and by the same rule for one who knows which jobs are still to come,
which no plan can: what it misses, no better guess would have saved.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from statistics import mean

from tests.test_order import SHAPES, Path, Shape, beyond_the_last, run_through_window, shared, tree_of_prompts

WINDOW_JOBS = 256
SETTLED = 0.01
"""What a segment weighs that no later job needs: it has to be computed once anyway, now or at the end."""


def main() -> None:
    """Print a line for each tree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    seeds = parser.parse_args().seeds
    print(f"{'':30}{'arrival':>10}{'subtrees':>10}{'plan':>10}{'foreseen':>10}")
    for name, whole in SHAPES.items():
        shape = tuple((num, tokens // 8) for num, tokens in whole)  # only ratios count
        ratios = [measure(shape, seed, 1024 if name == "skewed" else None) for seed in seeds]
        print(f"{name:30}" + "".join(f"{mean(column):10.3f}" for column in zip(*ratios, strict=True)), flush=True)


def measure(shape: Shape, seed: int, num_jobs: int | None) -> list[float]:
    """Return the four ratios."""
    paths, prompts = tree_of_prompts(seed, shape, num_jobs)
    orders = [
        paths,
        run_through_window(paths, prompts, WINDOW_JOBS, detours=False),
        run_through_window(paths, prompts, WINDOW_JOBS),
        foreseen(paths, [tokens for _, tokens in shape]),
    ]
    distinct = sum(shape[len(node) - 1][1] for node in {node for path in paths for node in nodes_of(path)})
    return [beyond_the_last(order, shape) / distinct for order in orders]


def nodes_of(path: Path) -> list[Path]:
    """Return the nodes on the way of a job, the root left out."""
    return [path[:level] for level in range(1, len(path) + 1)]


def foreseen(paths: Sequence[Path], sizes: Sequence[int]) -> list[Path]:
    """Run one job at a time, another one arriving for each, by the plan's rule with the future known."""
    waiting: Counter[Path] = Counter()
    coming = Counter(node for path in paths for node in nodes_of(path))
    order: list[Path] = []
    for number, path in enumerate(paths):
        waiting.update(nodes_of(path))
        coming -= Counter(nodes_of(path))
        if number >= WINDOW_JOBS - 1:
            order.append(_serve(waiting, _cheapest(waiting, coming, order[-1] if order else (), sizes)))
    while waiting:
        order.append(_serve(waiting, _held(waiting, order[-1])))
    return order


def _held(waiting: Counter[Path], last: Path) -> Path:
    """Return the deepest node on the way of the last job below which jobs wait."""
    return next((node for node in reversed(nodes_of(last)) if node in waiting), ())


def _serve(waiting: Counter[Path], node: Path) -> Path:
    """Take a job out, the largest subtree at every turn."""
    while children := [child for child in waiting if child[:-1] == node]:
        node = max(children, key=waiting.__getitem__)
    waiting -= Counter(nodes_of(node))
    return node


def _cheapest(waiting: Counter[Path], coming: Counter[Path], last: Path, sizes: Sequence[int]) -> Path:
    held = _held(waiting, last)
    weight = {node: sizes[len(node) - 1] * (1 if node in coming else SETTLED) for node in waiting}
    way: dict[Path, float] = {held[:level]: 0.0 for level in range(len(held) + 1)}
    back = {held[:level]: float(sum(sizes[level : len(held)])) for level in range(len(held) + 1)}
    for node in sorted(waiting, key=len):
        if node not in way:
            fork = node[: shared(node, held)]
            way[node] = weight[node] + (way[node[:-1]] if node[:-1] != fork else back[fork])
    fresh = dict.fromkeys(waiting, 0.0)
    for node in sorted(waiting, key=len, reverse=True):
        fresh[node] += weight[node]
        if len(node) > 1:
            fresh[node[:-1]] += fresh[node]
    beyond = [node for node in waiting if node != held[: len(node)]]
    return min(beyond, key=lambda node: (way[node] - weight[node] + fresh[node]) / waiting[node])


if __name__ == "__main__":
    main()
