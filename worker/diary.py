"""One line that outlives the process which wrote it: what it was at. In a file without a name, shared with its parent.

Knows nothing of what the line means.
"""

from __future__ import annotations

import os
from tempfile import TemporaryFile
from typing import Final

_END: Final = b"\n"
_MOST: Final = 4096


class Diary:
    """The line; a child opens its parent's by descriptor."""

    def __init__(self, fd: int | None = None) -> None:
        """Make an empty one, or open one that was inherited."""
        self._file = TemporaryFile() if fd is None else os.fdopen(fd, "r+b")  # noqa: SIM115  # open as long as the process

    def fileno(self) -> int:
        """Return the descriptor to inherit."""
        return self._file.fileno()

    def write(self, line: str) -> None:
        """Replace the line; nothing of it may contain a line's end. Costs one system call."""
        os.pwrite(self.fileno(), line.encode(errors="surrogateescape") + _END, 0)

    def read(self) -> str:
        """Return the line, empty where there is none."""
        return os.pread(self.fileno(), _MOST, 0).partition(_END)[0].decode(errors="surrogateescape")

    def close(self) -> None:
        """Close this process's end."""
        self._file.close()
