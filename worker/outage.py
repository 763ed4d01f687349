"""Which errors of Redis a worker waits out: they pass by themselves, or once its owner has acted. Sends nothing."""

from __future__ import annotations

import time
from typing import Final

from redis import exceptions

# The first that fits counts. What redis-py says may quote the command that failed, and with it a job's text.
_CLASSES: Final = {
    exceptions.BusyLoadingError: "it is still loading its data",
    exceptions.AuthenticationError: "it refuses our credentials; put the right ones into the Redis URL",
    exceptions.NoPermissionError: "it denies us a command; see its ACL",
    exceptions.OutOfMemoryError: "its memory is full (maxmemory)",
    exceptions.ReadOnlyError: "it is a read-only replica; connect to the primary",
    exceptions.ClusterDownError: "its cluster or its primary is down",
    exceptions.TimeoutError: "it does not answer in time",
    exceptions.ConnectionError: "",
}
_FIRST_S: Final = 0.05
_LONGEST_S: Final = 5.0
_WORDS: Final = {
    "OOM ": _CLASSES[exceptions.OutOfMemoryError],
    "READONLY ": _CLASSES[exceptions.ReadOnlyError],
    "MISCONF": "it cannot write its file; is the disk full?",
    "NOREPLICAS": "too few replicas are there",
    "BUSY ": "a script holds it up",
    "UNBLOCKED": "its role has changed",
}


def is_outage(error: exceptions.RedisError) -> bool:
    """Return whether to try again later; anything else is a defect, or damage that stays."""
    return explain(error) is not None


def explain(error: exceptions.RedisError) -> str | None:
    """Return what is the matter with the server, in a few words; None if this is no outage."""
    for kind, words in _CLASSES.items():
        if isinstance(error, kind):
            return words or str(error).strip().splitlines()[0]
    said = str(error).rpartition("caused error: ")[2]  # in a pipeline, after the command
    if said.startswith("Error running script"):  # before Redis 7 the script's own error follows
        said = said.rpartition(": -")[2]
    return next((words for start, words in _WORDS.items() if said.startswith(start)), None)


class Absence:
    """How long to leave a server alone that is away, and what of it is worth a line in the log; true while it lasts."""

    def __init__(self) -> None:
        self._pause_s = self._until = 0.0
        self._told: set[type[exceptions.RedisError]] = set()

    def __bool__(self) -> bool:
        return self._pause_s > 0

    @property
    def pausing(self) -> bool:
        """Whether it is too early to try again."""
        return time.monotonic() < self._until

    def prolong(self, error: exceptions.RedisError) -> bool:
        """Pause, longer each time; return whether the error is of a kind that nobody was told of yet."""
        self._pause_s = min(_LONGEST_S, 2 * self._pause_s or _FIRST_S)
        self._until = time.monotonic() + self._pause_s
        news = type(error) not in self._told
        self._told.add(type(error))
        return news

    def end(self) -> None:
        """It is back."""
        self._pause_s = self._until = 0.0
        self._told.clear()
