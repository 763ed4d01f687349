"""The benchmark works and its JSON has what its readers rely on; how fast anything is, no test says."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCH = [sys.executable, str(ROOT / "ops" / "bench.py")]
CONTESTANTS = {
    "mlx-lm one by one", "batch_generate", "stock uncached", "stock, KV copied", "mlx_lm.server", "radixq engine",
    "radixq whole",
}  # fmt: skip
PARTS = {"attention", "step", "join", "tree", "slice", "latency", "pictures", "queue", "reading"}


@pytest.fixture
def workloads(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "ops"))
    return importlib.import_module("bench_workloads")


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*BENCH, *arguments], capture_output=True, text=True, timeout=800, check=False, stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_one_command_measures_every_contestant_and_part_and_writes_table_json_and_plot(tmp_path: Path) -> None:
    done = bench("--quick", "--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png"))
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads((tmp_path / "out.json").read_text())
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert result["machine"]["cores"]
    assert result["versions"]["mlx-lm"]
    assert result["commit"]
    assert "--quick" in result["command"]
    (workload,) = result["workloads"]
    assert f"== {workload['name']}" in done.stdout
    _check_contestants(workload)
    assert {part["part"] for part in result["parts"]} == PARTS


def _check_contestants(workload: dict[str, Any]) -> None:
    found = {contestant["name"]: contestant for contestant in workload["contestants"]}
    assert set(found) == CONTESTANTS
    for contestant in found.values():
        assert contestant["agreement"] == 1.0, contestant["name"]
        assert contestant["cpu_s"]["min"] <= contestant["cpu_s"]["median"] <= contestant["cpu_s"]["max"]
        assert len(contestant["cpu_s"]["all"]) == contestant["runs"]
        assert contestant["times_stock"] > 0
        assert contestant["prompt_tokens_per_s"] > 0
        assert contestant["generated_tokens_per_s"] > 0
    best = 1 - workload["distinct_tokens"] / workload["prompt_tokens"]
    assert found["radixq engine"]["hit_rate"] == pytest.approx(best)
    assert found["radixq whole"]["hit_rate"] == pytest.approx(best)
    assert found["stock uncached"]["hit_rate"] == 0
    assert workload["c"] > 0
    assert workload["limit"] > 1


def outcome(seconds: float) -> dict[str, Any]:
    return {
        "tokens": [[1, 2]], "text_tokens": [[1, 2]], "as_text": False, "prompt_tokens": 10, "distinct_tokens": 5,
        "cached_tokens": 5, "cpu_s": seconds, "wall_s": 10.0 - seconds, "peak_bytes": 1 << 20,
    }  # fmt: skip


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "ops"))
    return importlib.import_module("bench_report")


@pytest.mark.parametrize("names", [("batch_generate", "radixq engine"), ("stock uncached", "radixq engine")])
def test_table_and_plot_do_without_contestants_that_did_not_run(
    report: ModuleType, workloads: ModuleType, names: tuple[str, ...], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    ready = [{"blas": "mkl", "device": {"kind": "cpu", "name": "a machine"}}]
    outcomes = {name: [outcome(4.0), outcome(2.0), outcome(3.0)] for name in names}
    figures = report.summary(workloads.QUICK["gsp-quick"], outcomes, {}, ready)
    assert [contestant["cpu_s"]["median"] for contestant in figures["contestants"]] == [3.0, 3.0]
    assert all(name in report.table(figures) for name in names)
    report.plot({**report.heading(True), "workloads": [figures]}, tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("kind", "times"), [("cpu", 2.0), ("metal", 8 / 6)])
def test_on_metal_the_wall_clock_is_compared_since_cpu_seconds_hold_no_work_of_a_gpu(
    report: ModuleType, workloads: ModuleType, kind: str, times: float
) -> None:
    ready = [{"blas": "accelerate", "device": {"kind": kind, "name": "a machine"}}]
    outcomes = {"stock uncached": [outcome(4.0)], "radixq engine": [outcome(2.0)]}
    if kind == "metal":
        outcomes = {"stock uncached": [outcome(2.0)], "radixq engine": [outcome(4.0)]}
    figures = report.summary(workloads.QUICK["gsp-quick"], outcomes, {}, ready)
    assert figures["contestants"][1]["times_stock"] == pytest.approx(times)


def test_a_wrong_name_is_answered_with_the_names_there_are() -> None:
    done = bench("--workload", "gsp-511")
    assert done.returncode == 2
    assert "gsp-512" in done.stderr


def test_the_distinct_tokens_of_groups_are_one_prefix_each_and_all_questions(workloads: ModuleType) -> None:
    made = workloads.QUICK["gsp-quick"]
    prompts = [job.tokens for job in made.jobs(0, None)]
    alike = sum(workloads.distinct_tokens([a[96:], b[96:]]) < 16 for a in prompts for b in prompts if a is not b)
    assert not alike  # no two questions begin alike with this seed, or the next line would be off by a few
    assert workloads.distinct_tokens(prompts) == 2 * 96 + 8 * 8


def test_no_prompt_of_one_round_shares_a_prefix_with_another_round(workloads: ModuleType) -> None:
    made = workloads.WORKLOADS["documents"]
    first, second = ([job.tokens for job in made.jobs(seed, None)] for seed in (0, 1))
    assert max(workloads.common_prefix(a, b) for a in first[:8] for b in second[:8]) < workloads.MIN_SHARED_TOKENS
