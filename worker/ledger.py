"""What a worker process has in its hands, written in Redis, so that nothing is lost with it: `radixq:flights:WORKER`.

One field per job and execution: the queue it came from, and, of a job that runs alone, how far it came. An entry is
written and removed in the scripts and transactions that move the job, and only its worker, or who takes over from it,
writes it: watching the key tells whether it was taken away.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import cast

from redis import Redis

from common import keys
from worker.flight import Flight
from worker.reject import is_id


@dataclass(frozen=True, slots=True)
class Entry:
    """One execution in a worker's hands."""

    job_id: str
    execution: str
    queue: str
    tokens: int = 0

    @property
    def text(self) -> str:
        """The entry as it is written: what its field's name does not say."""
        return json.dumps({"queue": self.queue, "tokens": self.tokens})


class Ledger:
    """The entries of one worker process, by RQ's name for it."""

    def __init__(self, connection: Redis, name: str) -> None:
        self._connection = connection
        self.name = name
        self.key = keys.flights(name)

    def open(self, pipe: Redis) -> None:
        """Let others find this ledger. Idempotent."""
        pipe.sadd(keys.FLIGHTS, self.name)

    def close(self) -> None:
        """Forget the ledger, which should be empty."""
        with self._connection.pipeline() as pipe:
            pipe.delete(self.key)
            pipe.srem(keys.FLIGHTS, self.name)
            pipe.execute()

    def start(self, flight: Flight, pipe: Redis) -> None:
        """Say that a job runs."""
        pipe.hset(self.key, *_written(flight))

    def record(self, flight: Flight) -> None:
        """Write how far a job came."""
        self._connection.hset(self.key, *_written(flight))

    def remove(self, flight: Flight, pipe: Redis) -> None:
        """Say that a job is out of our hands."""
        pipe.hdel(self.key, field(flight.job.id, flight.id))

    def entries(self) -> list[Entry]:
        """Return what the ledger says now; what cannot be read, and was not written by a worker, is left out."""
        fields = cast(dict[bytes, bytes], self._connection.hgetall(self.key))
        return [entry for item in fields.items() if (entry := _entry(*item)) is not None]

    def others(self) -> list[Ledger]:
        """Return the ledgers of all other processes."""
        names = cast(set[bytes], self._connection.smembers(keys.FLIGHTS))
        texts = sorted(name.decode(errors="replace") for name in names)
        return [Ledger(self._connection, name) for name in texts if name != self.name]


def _written(flight: Flight) -> tuple[str, str]:
    entry = Entry(flight.job.id, flight.id, flight.queue.name, flight.tokens)
    return field(entry.job_id, entry.execution), entry.text


def _entry(name: bytes, text: bytes) -> Entry | None:
    try:
        job_id, _, execution = name.decode().partition(":")
        said = json.loads(text)
        entry = Entry(job_id, execution, str(said["queue"]), int(said["tokens"]))
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
        return None
    return entry if is_id(job_id) and execution else None


def field(job_id: str, execution: str) -> str:
    """Return the name of an entry's field."""
    return f"{job_id}:{execution}"
