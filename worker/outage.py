"""Which errors of Redis a worker waits out: they pass by themselves, or once its owner has acted. Sends nothing."""

from __future__ import annotations

from typing import Final

from redis import exceptions

_CLASSES: Final = (
    exceptions.ConnectionError,  # away, loading its data, or refusing the password
    exceptions.TimeoutError,
    exceptions.OutOfMemoryError,
    exceptions.ReadOnlyError,
    exceptions.ClusterDownError,
    exceptions.NoPermissionError,
)
_WORDS: Final = ("MISCONF", "NOREPLICAS", "BUSY ", "UNBLOCKED")
"""How the others begin: the disk is full, replicas are missing, a script holds the server up, a failover."""


def is_outage(error: exceptions.RedisError) -> bool:
    """Return whether to try again later; anything else is a defect, or damage that stays."""
    return isinstance(error, _CLASSES) or str(error).startswith(_WORDS)
