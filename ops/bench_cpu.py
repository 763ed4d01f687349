"""The clocks: CPU seconds of a process and all below it, on Linux and on a Mac; which clock counts on which device."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path


def clock_s(kind: str) -> float:
    """Return the time that counts on a device of this kind: CPU seconds of this process, or on Metal the wall clock's.

    CPU seconds bear other programs on the machine better, but a GPU's work is not among them.
    """
    return time.process_time() if kind == "cpu" else time.perf_counter()


def tree_cpu_s(root: int) -> float:
    """Return user and system time of process `root` and its living descendants."""
    usage = _linux() if sys.platform == "linux" else _mac()
    below = {root}
    while more := {pid for pid, (parent, _) in usage.items() if parent in below} - below:
        below |= more
    return sum(seconds for pid, (_, seconds) in usage.items() if pid in below)


def _linux() -> dict[int, tuple[int, float]]:
    ticks, usage = os.sysconf("SC_CLK_TCK"), {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
        usage[int(stat.parent.name)] = (int(fields[1]), (int(fields[11]) + int(fields[12])) / ticks)
    return usage


def _mac() -> dict[int, tuple[int, float]]:
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,time="], capture_output=True, text=True, check=True).stdout
    usage = {}
    for line in listed.splitlines():
        pid, parent, clock = line.split()
        seconds = 0.0
        for part in clock.split(":"):  # [hours:]minutes:seconds.hundredths
            seconds = 60 * seconds + float(part)
        usage[int(pid)] = (int(parent), seconds)
    return usage
