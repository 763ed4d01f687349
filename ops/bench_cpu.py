"""CPU seconds of a process and all below it, on Linux and on a Mac. Knows nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


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
