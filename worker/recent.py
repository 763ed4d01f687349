"""What was used last, up to so many bytes. Knows nothing of what it holds."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

T = TypeVar("T")


class Recent(Generic[T]):
    """Values by name; when they come to more than `max_bytes`, those used longest ago go. The last one stays.

    Attributes:
        nbytes: what it holds now.
    """

    def __init__(self, max_bytes: int) -> None:
        self.nbytes = 0
        self._max_bytes = max_bytes
        self._held: OrderedDict[str, tuple[T, int]] = OrderedDict()

    def get(self, name: str) -> T | None:
        """Return a value, which is the last used from now on."""
        if name not in self._held:
            return None
        self._held.move_to_end(name)
        return self._held[name][0]

    def put(self, name: str, value: T, nbytes: int) -> None:
        """Keep a value that is not held."""
        self._held[name] = value, nbytes
        self.nbytes += nbytes
        while self.nbytes > self._max_bytes and len(self._held) > 1:
            _, (_, freed) = self._held.popitem(last=False)
            self.nbytes -= freed
