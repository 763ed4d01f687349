"""A file per worker process that is locked as long as it lives and holds its last words if it crashes.

The lock ends with the process, however that ends, and no other process can be taken for it, whatever its pid. A crash
(a signal that the process raised itself, as `abort` does) leaves its traceback; a process that was killed leaves none.
Knows no Redis.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import os
import time
from pathlib import Path
from typing import IO, Final
from urllib.parse import quote

from common.errors import SettingsError

_KEPT: Final = 20  # crash reports
_WAIT_S: Final = 1.0  # for somebody who looks whether we live
_SILENT_S: Final = 86_400.0  # after a day nobody will ask for the file of a dead process that left no words


class Life:
    """The life of this process, under its worker's name."""

    def __init__(self, home: Path, name: str) -> None:
        self._path = _path(home, name)
        self._file: IO[str] | None = None

    def begin(self) -> None:
        """Hold the lock, and from now on write down a crash.

        Raises:
            SettingsError: a living process has this name, or the directory cannot be written.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            file = self._opened()
            _clear(self._path.parent)
        except OSError as error:
            raise SettingsError(f"RADIXQ_HOME cannot be used: {error}; name a directory that can be written") from error
        file.truncate(0)
        self._file = file
        self.beat()
        faulthandler.enable(file)

    def _opened(self) -> IO[str]:
        """Return our file, locked; made again where somebody removed it between the two."""
        while True:
            file = self._path.open("a+")
            try:
                _lock(file, _WAIT_S)
            except BlockingIOError:
                file.close()
                raise SettingsError(f"a worker named {self._path.name!r} runs on this machine already") from None
            if _is_at(file, self._path):
                return file
            file.close()

    def beat(self) -> None:
        """Write down that we live, for who comes after our death: the file's time is our last sign of life."""
        if self._file is not None:
            os.utime(self._file.fileno())

    def end(self) -> None:
        """Leave nothing behind. Idempotent."""
        if self._file is not None:
            faulthandler.disable()
            self._path.unlink(missing_ok=True)
            self._file.close()
            self._file = None


def last_words(home: Path, name: str) -> str | None:
    """Return what a dead worker of this machine left, "" if nothing; None: it lives, or was never here."""
    try:
        with _path(home, name).open("r+", errors="replace") as file:
            _lock(file, 0)
            return file.read()
    except (FileNotFoundError, BlockingIOError):
        return None


def bury(home: Path, name: str) -> None:
    """Remove the file of a dead worker; its last words stay in `crashes`, with those of some before it.

    Several workers may do so at once.
    """
    path, crashes = _path(home, name), home / "crashes"
    with contextlib.suppress(FileNotFoundError):  # somebody else was here first
        if path.stat().st_size == 0:
            path.unlink()
            return
        crashes.mkdir(exist_ok=True, mode=0o700)
        path.replace(crashes / f"{path.name}.txt")
        for old in sorted(crashes.iterdir(), key=lambda report: report.stat().st_mtime)[:-_KEPT]:
            old.unlink(missing_ok=True)


def _clear(directory: Path) -> None:
    """Remove what was left by processes that died long ago, and without words, on a server to which nobody came back.

    A file is removed under its lock and only while it is the one of that name, so that nobody else's can be hit.
    """
    for path in directory.iterdir():
        with contextlib.suppress(OSError), path.open("r+") as file:  # its process lives, or it is somebody else's
            _lock(file, 0)
            about = os.fstat(file.fileno())
            if about.st_size == 0 and time.time() - about.st_mtime > _SILENT_S and _is_at(file, path):
                path.unlink()


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _path(home: Path, name: str) -> Path:
    return home / "workers" / quote(name, safe="")


def _lock(file: IO[str], wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.02)
