"""The BLAS is chosen before MLX loads, once, and says which one it is. Each choice needs a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from worker import platform

pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="a Mac has one BLAS")
_SHOW = "import json; print(json.dumps([info.name, info.path, info.note]))"


def in_a_process(*lines: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([*lines, _SHOW])], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_stock_is_used_when_no_fast_one_is_wanted() -> None:
    name, path, note = in_a_process("from worker import platform", "info = platform.prepare(fast_blas=False)")
    assert (name, path) == ("stock", None)
    assert "RADIXQ_FAST_BLAS=0" in note


def test_too_late_is_said() -> None:
    name, _, note = in_a_process("import mlx.core", "from worker import platform", "info = platform.prepare()")
    assert name == "stock"
    assert "too late" in note


def test_the_first_call_decides() -> None:
    name, _, _ = in_a_process(
        "from worker import platform", "platform.prepare(fast_blas=False)", "info = platform.prepare(fast_blas=True)"
    )
    assert name == "stock"


def test_a_fast_one_gives_the_products_of_numpy() -> None:
    name, path, note = in_a_process(
        "from worker import platform",
        "info = platform.prepare()",
        "import numpy as np, mlx.core as mx",
        "a = np.random.default_rng(0).standard_normal((64, 300)).astype(np.float32)",
        "assert np.allclose(np.array(mx.array(a) @ mx.array(a).T), a @ a.T, atol=1e-3)",
    )
    if name == "stock":
        pytest.skip(f"no fast BLAS is installed: {note}")
    assert path is not None
    assert note == ""


def test_the_device_has_a_name_and_memory() -> None:
    device = platform.device()
    assert device.kind == "cpu"
    assert device.name
    assert 0 < device.working_set_bytes <= device.total_memory_bytes
    assert device.mlx_version.startswith("0.32")
