"""Know the hardware: open a fast BLAS before MLX loads, say which device and how much memory there is, and what failed.

The only place that asks what machine this is. Knows no model and no settings; MLX is imported only by `device()`.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from common.errors import InternalError, OutOfMemory, RadixqError

_MKL_LP64 = 0  # 32-bit sizes: what MLX passes to cblas
_MKL_SEQUENTIAL = 1  # one thread: twice the threads decode no faster, and RQ and the tokenizer want the other core
_OPENBLAS = (
    "/usr/lib/*/openblas-pthread/libblas.so.3",  # Debian and Ubuntu: libopenblas0-pthread
    "/usr/lib/*/libopenblas.so.0",
    "/usr/lib64/libopenblas.so.0",  # Fedora: openblas
    "/usr/lib/libopenblas.so.0",  # Alpine, Arch
)

_HOW_TO_GET_ONE = (
    "no fast BLAS found, matrix products run about 40 times slower: "
    "pip install mkl (x86-64), or apt install libopenblas0-pthread"
)


@dataclass(frozen=True, slots=True)
class BlasInfo:
    """Which BLAS multiplies matrices; `stock` is the one inside the MLX wheel, `accelerate` the Mac's own."""

    name: Literal["mkl", "openblas", "stock", "accelerate"]
    path: str | None = None
    note: str = ""  # why it is not a faster one, and what to do


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """The device MLX computes on."""

    kind: Literal["metal", "cpu"]
    name: str
    total_memory_bytes: int
    working_set_bytes: int  # what the device recommends to use at most; on the CPU all memory
    mlx_version: str


_prepared: BlasInfo | None = None


def prepare(*, fast_blas: bool = True) -> BlasInfo:
    """Open a fast BLAS so that MLX binds to it; must run before the first `import mlx.core`.

    Does nothing on a Mac. The first call decides for the whole process; later calls return what it found.
    """
    global _prepared
    if _prepared is None:
        _prepared = _choose(fast_blas)
    return _prepared


def device() -> DeviceInfo:
    """Describe the default device of MLX."""
    import mlx.core as mx

    info = mx.device_info()
    memory = int(info.get("memory_size", 0)) or _physical_memory_bytes()
    return DeviceInfo(
        kind="metal" if mx.metal.is_available() else "cpu",
        name=str(info.get("device_name") or platform.machine()),
        total_memory_bytes=memory,
        working_set_bytes=int(info.get("max_recommended_working_set_size", 0)) or memory,
        mlx_version=metadata.version("mlx"),
    )


def _choose(fast_blas: bool) -> BlasInfo:
    if sys.platform == "darwin":
        return BlasInfo("accelerate")
    if not fast_blas:
        return BlasInfo("stock", note="a faster BLAS was not asked for (RADIXQ_FAST_BLAS=0)")
    if "mlx.core" in sys.modules:
        return BlasInfo("stock", note="mlx was imported before worker.platform.prepare(), too late for another BLAS")
    return _open_mkl() or _open_openblas() or BlasInfo("stock", note=_HOW_TO_GET_ONE)


def _open_mkl() -> BlasInfo | None:
    for path in _mkl_paths():
        library = _open(path)
        if library is not None:
            library.MKL_Set_Interface_Layer(_MKL_LP64)
            library.MKL_Set_Threading_Layer(_MKL_SEQUENTIAL)
            return BlasInfo("mkl", str(path))
    return None


def _mkl_paths() -> list[Path]:
    """Ask pip where it put the library: it depends on the kind of installation."""
    try:
        files = metadata.files("mkl") or []
    except metadata.PackageNotFoundError:
        return []
    return [Path(str(file.locate())).resolve() for file in files if file.name.startswith("libmkl_rt.so")]


def _open_openblas() -> BlasInfo | None:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read once, when the library is opened
    for pattern in _OPENBLAS:
        for path in sorted(Path("/").glob(pattern.lstrip("/"))):
            if _open(path) is not None:
                return BlasInfo("openblas", str(path))
    return None


def _open(path: Path) -> ctypes.CDLL | None:
    """Open for the whole process: symbols found here win over those of libraries loaded later."""
    try:
        return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return None


def _physical_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def translated(error: Exception) -> RadixqError:
    """Return what MLX threw as an error of ours; that memory ran out it says in words only."""
    if isinstance(error, RadixqError):
        return error
    words = str(error).lower()
    if isinstance(error, MemoryError) or "malloc" in words or "memory" in words or "resource limit" in words:
        return OutOfMemory(f"the device ran out of memory ({error})")
    return InternalError(f"{type(error).__name__} in the model; the worker's log has the details")
