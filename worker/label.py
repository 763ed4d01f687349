"""Give every worker process of one home a label of its own: it names its metrics, its prefixes and its results.

Knows no Redis. A lock on a file is held until the process ends, however it ends, so a restarted worker gets the label
of its dead predecessor back.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import secrets
import socket
from pathlib import Path

from common.errors import SettingsError


def claim(wanted: str, home: Path) -> str:
    """Return `wanted`, or `wanted-2`, `wanted-3` and so on: the first that no live process of this home has.

    Raises:
        SettingsError: the home cannot be written.
    """
    directory = home / "labels"
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        return _claim(wanted, directory)
    except OSError as error:
        raise SettingsError(f"RADIXQ_HOME cannot be used: {error}; name a directory that can be written") from error


def unique(label: str) -> str:
    """Return a name for the process, of which no other ever had the same: a restart must not meet its predecessor's."""
    parts = dict.fromkeys((label, socket.gethostname(), str(os.getpid()), secrets.token_hex(3)))
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", ".".join(parts))


def _claim(wanted: str, directory: Path) -> str:
    for number in itertools.count(1):
        label = wanted if number == 1 else f"{wanted}-{number}"
        lock = os.open(directory / re.sub(r"[^A-Za-z0-9_.-]", "-", label), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        return label  # the lock stays open as long as the process
    raise AssertionError("unreachable")
