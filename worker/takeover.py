"""Take over what other worker processes had in their hands when they died, and find out which job killed them.

A dead process of this machine is known at once, by its file (`life`); any other by its leases, once they are over.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from redis.exceptions import WatchError
from rq.executions import Execution
from rq.job import JobStatus
from rq.worker import BaseWorker
from rq.worker_registration import unregister

from common import keys
from common.log import logger
from worker import life
from worker.deliver import Outbox
from worker.drain import Drain, in_order
from worker.flight import Clock, Flight
from worker.job import answer, ask
from worker.leases import fence
from worker.ledger import Entry, Ledger, field
from worker.suspects import Suspicion, judge

if TYPE_CHECKING:
    from redis.client import Pipeline

_log = logger("worker.takeover")


class Takeover:
    """What one worker does about the death of others, and of its own engine."""

    def __init__(self, worker: BaseWorker, drain: Drain, outbox: Outbox, home: Path, clock: Clock) -> None:
        self._worker, self._drain, self._outbox, self._home, self._clock = worker, drain, outbox, home, clock

    def look(self) -> int:
        """Hand back what dead processes, and those without a sign of life, had; return how many jobs that were.

        Without it those jobs wait for RQ's maintenance, which takes the crash for a failed attempt.
        """
        return sum(self._take_over(ledger) for ledger in self._drain.ledger.others())

    def suspect(self, flights: Sequence[Flight], *, spoke: bool = True) -> int:
        """Hand back what is in our hands, because the engine, or the scout, died of one of these jobs."""
        return self._hand_back(self._drain.ledger, flights, len(flights), spoke=spoke)

    def _take_over(self, ledger: Ledger) -> int:
        words = life.last_words(self._home, ledger.name)
        started = ledger.entries() if words is not None else self._lapsed(ledger.entries())
        gone = words is not None or not self._worker.connection.exists(_worker_key(ledger.name))
        jobs = self._hand_back(ledger, self._orphans(ledger, started), len(started), spoke=bool(words))
        if gone:
            self._forget(ledger)
        if words is not None:
            last = words.strip().splitlines()[0] if words.strip() else "none"
            _log.warning(
                "took over from a dead worker", extra={"worker": ledger.name, "jobs": jobs, "last_words": last}
            )
        elif jobs:
            _log.warning("took over jobs without a sign of life", extra={"worker": ledger.name, "jobs": jobs})
        return jobs

    def _lapsed(self, started: Sequence[Entry]) -> list[Entry]:
        """Return the jobs that run on no live lease."""
        with self._worker.connection.pipeline(transaction=False) as pipe:
            for entry in started:
                registry = self._drain.queue(entry.queue).started_job_registry
                pipe.zscore(registry.key, f"{entry.job_id}:{entry.execution}")
            scores = pipe.execute()
        now_s = self._clock.now()
        return [entry for entry, score in zip(started, scores, strict=True) if score is None or score < now_s]

    def _orphans(self, ledger: Ledger, entries: Sequence[Entry]) -> list[Flight]:
        """Return the entries as flights; one whose job is gone from RQ only leaves the ledger."""
        connection = self._worker.connection
        with connection.pipeline(transaction=False) as pipe:
            for entry in entries:
                ask(pipe, entry.job_id)
                pipe.hget(keys.SUSPECTS, entry.job_id)
            replies = pipe.execute()
        orphans, gone = [], []
        for entry, reply, suspicion in zip(entries, replies[::2], replies[1::2], strict=True):
            raw = answer(reply)
            if not raw:
                gone.append(field(entry.job_id, entry.execution))
                continue
            queue = self._drain.queue(entry.queue)
            execution = Execution(entry.execution, entry.job_id, connection, worker_name=ledger.name)
            job = self._drain.restore(self._drain.blank(entry.job_id, queue), raw)
            known = Suspicion.parse(suspicion)
            orphans.append(Flight(job, queue, execution, tokens=entry.tokens, suspicion=known))
        if gone:
            connection.hdel(ledger.key, *gone)
        return orphans

    def _hand_back(self, ledger: Ledger, flights: Sequence[Flight], together: int, *, spoke: bool) -> int:
        """Put jobs back to the head of their queues as suspects; give up the one that is found guilty."""
        while flights:
            try:
                with fence(self._worker, flights) as (pipe, held):
                    pipe.watch(ledger.key)  # type: ignore[no-untyped-call]
                    known = {entry.execution for entry in ledger.entries()}
                    pipe.multi()
                    for flight in reversed(in_order(flights)):
                        flight.guilty = False
                        if flight.id in known:
                            self._judge(ledger, flight, pipe, together, spoke=spoke, ours=flight in held)
                    pipe.execute()
            except WatchError:
                continue
            for flight in flights:
                if flight.guilty:
                    self._outbox.buried(flight)
            return sum(flight.id in known for flight in held)
        return 0

    def _judge(self, ledger: Ledger, flight: Flight, pipe: Pipeline, together: int, *, spoke: bool, ours: bool) -> None:
        """Append what becomes of one job; one that RQ, or its owner, moved on meanwhile is only suspected."""
        before = flight.suspicion
        after = judge(before, together=together, tokens=flight.tokens, spoke=spoke)
        ledger.remove(flight, pipe)
        if after is not None:
            if ours or flight.status == JobStatus.QUEUED:
                pipe.hset(keys.SUSPECTS, flight.job.id, str(after))
            if ours:
                self._outbox.note_crash(flight, pipe)
                self._drain.put_back(flight, ledger, pipe)
        elif ours:
            flight.guilty = True
            pipe.hdel(keys.SUSPECTS, flight.job.id)
            self._outbox.bury(flight, pipe, before.lone + 1 if before else 1)

    def _forget(self, ledger: Ledger) -> None:
        """Take a dead worker off the books, ours and RQ's, once nothing runs in its name."""
        if ledger.entries():
            return
        connection = self._worker.connection
        dead = BaseWorker.find_by_key(_worker_key(ledger.name), connection, serializer=self._worker.serializer)
        if dead is not None:
            connection.delete(dead.key, dead.executions_key)
            unregister(dead)
        ledger.close()
        life.bury(self._home, ledger.name)


def _worker_key(name: str) -> str:
    return f"{BaseWorker.redis_worker_namespace_prefix}{name}"
