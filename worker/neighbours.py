"""Tell other workers where this one is in the tree of prompts, and read where they are: `radixq:prefixes:WORKER`.

Lives in the scout's process. Knows no plan and no prompt; marks are what `worker.group.Plan.trail` makes. A worker's
set holds `run:MARK` for the way to its last offer and `held:MARK` for the ways to those before; it vanishes soon after
its worker.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final, cast

import redis

from common import keys
from worker.group import Neighbours

if TYPE_CHECKING:
    from redis.client import Pipeline

_MOST_HELD: Final = 128
_MOST_WORKERS: Final = 64
_AGAIN_S: Final = keys.PREFIXES_TTL_S / 3
_RUN, _HELD = b"run:", b"held:"


def ask_who(pipe: Pipeline) -> None:
    """Append the question which workers are on this server."""
    pipe.zrevrange(keys.WORKERS, 0, _MOST_WORKERS - 1)


class Neighbourhood:
    """One worker's set, and those of the others."""

    def __init__(self, client: redis.Redis, label: str, model: str) -> None:
        """Take the worker's label, which no other may have; marks of other models are told apart."""
        self._redis = client
        self._label = label
        self._model = model
        self._running: frozenset[int] = frozenset()
        self._held: dict[int, None] = {}  # oldest first
        self._write_at = 0.0  # monotonic

    def tell(self, trail: frozenset[int]) -> None:
        """Publish where this worker is, when it moved and now and then; an empty trail: nowhere."""
        now = time.monotonic()
        if trail == self._running and now < self._write_at:
            return
        for mark in trail:
            self._held.pop(mark, None)
            self._held[mark] = None
        while len(self._held) > _MOST_HELD:
            del self._held[next(iter(self._held))]
        self._running, self._write_at = trail, now + _AGAIN_S
        key = keys.prefixes(self._label)
        with self._redis.pipeline() as pipe:
            pipe.delete(key)
            if self._held:
                pipe.sadd(key, *map(self._run, trail), *map(self._hold, self._held.keys() - trail))
                pipe.expire(key, keys.PREFIXES_TTL_S)
            pipe.execute()

    def read(self, labels: Iterable[bytes]) -> Neighbours | None:
        """Return what the others said; None if nobody else is there. `labels` answers `ask_who`."""
        others = sorted(label.decode(errors="replace") for label in labels if label != self._label.encode())
        if not others:
            return None
        with self._redis.pipeline(transaction=False) as pipe:
            for label in others:
                pipe.smembers(keys.prefixes(label))
            sets = dict(zip(others, cast(list[set[bytes]], pipe.execute()), strict=True))
        if not any(sets.values()):
            return None
        senior = [members for label, members in sets.items() if label < self._label]
        return Neighbours(
            running=self._marks(_RUN, sets.values()),
            senior=self._marks(_RUN, senior),
            held=self._marks(_HELD, sets.values()),
            own=frozenset(self._held),
        )

    def _run(self, mark: int) -> bytes:
        return _RUN + self._name(mark)

    def _hold(self, mark: int) -> bytes:
        return _HELD + self._name(mark)

    def _name(self, mark: int) -> bytes:
        return f"{mark:08x}:{self._model}".encode()

    def _marks(self, kind: bytes, sets: Iterable[set[bytes]]) -> frozenset[int]:
        name = re.compile(kind + rb"([0-9a-f]{8}):" + re.escape(self._model.encode()))
        found = (name.fullmatch(member) for members in sets for member in members)
        return frozenset(int(match[1], 16) for match in found if match)
