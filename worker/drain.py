"""Take jobs out of RQ's queues, many at once, and hand them back to the head of their queues.

Everything here is RQ's bookkeeping: it knows no model, no prompt and no result beyond `running` and `queued`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast

from redis.exceptions import WatchError
from rq.executions import Execution
from rq.job import JobStatus
from rq.queue import Queue
from rq.worker import BaseWorker, WorkerStatus

from common import history, keys
from common.errors import Expired, Unsupported
from common.log import logger
from worker import groups, reject
from worker.flight import Clock, Flight, enqueued_at, iso
from worker.job import DAMAGED, EXPIRED, FIELD_BYTES, FIELDS_OF, QueuedJob, answer
from worker.leases import LEASE_S, fence
from worker.ledger import Ledger
from worker.suspects import Suspicion

if TYPE_CHECKING:
    from redis.client import Pipeline

    from common.settings import Settings
    from worker.scout import Candidate

_log = logger("worker.drain")
_ENDED = [status.value for status in (JobStatus.CANCELED, JobStatus.FINISHED, JobStatus.FAILED, JobStatus.STOPPED)]
_OF_AN_ATTEMPT = (
    "text", "finish_reason", "prompt_tokens", "cached_tokens", "prefill_tokens", "completion_tokens", "error_code",
    "error_message", "finished_at", "queued_ms", "prefill_ms", "decode_ms", "total_ms", "json",
)  # fmt: skip
_KEPT = ("submitted_at", *history.FIELDS)

# Starts what still waits near the head of its queue and may run. ARGV: how near, the time, bounds of payload and field,
# the key of the suspects; of each job its queue, its id and its commands; then the commands for when there is any.
# KEYS: of each job those of `reject.keys_of`. Answers for each: 'started' and what is known of it, 'not' and why it had
# to leave its queue, 'wrong' and which key is, or 'gone'. An id leaves its queue last: if a command fails, it waits.
_TAKE = (
    groups.LUA
    + reject.WRONG
    + FIELDS_OF
    + "local kept, ended = {'"
    + "','".join(_KEPT)
    + "'}, {"
    + "=true,".join(_ENDED)
    + "=true}"
    + """
local near, now, most_data, most, suspects = take(), take(), tonumber(take()), tonumber(take()), take()
local function why_not(job, executions)
  local status = redis.call('HSTRLEN', job, 'status') < 64 and redis.call('HGET', job, 'status')
  if redis.call('EXISTS', job) == 0 then return 'it has no record in RQ' end
  if ended[status] then return 'it is ' .. status end
  if status == 'started' and redis.call('ZCOUNT', executions, now, '+inf') > 0 then
    return 'it runs already: its id was queued twice'
  end
end
local answers, any = {}, false
for first = 1, #KEYS, #kinds do
  local queue, id = take(), take()
  local job, record = KEYS[first], KEYS[first + 1]
  local key, kind = wrong(first)
  local answer = {'gone'}
  if key then
    answer = {'wrong', key, kind}
  elseif redis.call('LPOS', queue, id, 'MAXLEN', near) then
    local reason = why_not(job, KEYS[first + 5])
    answer = reason and {'not', reason} or {'started'}
  end
  local started = answer[1] == 'started'
  group(started)
  if started then
    answer = {'started', redis.call('HGET', record, 'attempts'), redis.call('HMGET', record, unpack(kept)),
      redis.call('HGET', suspects, id), fields_of(job, most_data, most)}
  end
  if started or answer[1] == 'not' then redis.call('LREM', queue, 1, id) end
  answers[#answers + 1] = answer
  any = any or started
end
group(any)
return answers
"""
)


class Drain:
    """What one worker takes out of its queues."""

    def __init__(self, worker: BaseWorker, clock: Clock, label: str, settings: Settings) -> None:
        self._worker = worker
        self._connection = worker.connection
        self._clock = clock
        self._label = label
        self._settings = settings
        self._queues = {queue.name: queue for queue in worker.queues}
        self._take_script = self._connection.register_script(_TAKE)
        self._unsure: list[Flight] = []
        self.ledger = Ledger(self._connection, worker.name)

    def take(self, candidates: Sequence[Candidate], model: str) -> list[tuple[Candidate, Flight]]:
        """Start the candidates that still wait and may run, in one script; fail those that RQ cannot handle.

        When a Redis error ends it half way, the next call gives back what may have been taken.
        """
        self.settle()
        sound = [one for one in candidates if reject.is_id(one.job_id)]
        for one in candidates:
            if one not in sound:
                self._reject(one.queue, one.job_id, reject.BAD_ID)
        taken = self._start(sound, model) if sound else []
        early = [flight for one, flight in taken if flight.suspicion and not one.limit]
        if early:  # they became suspects after they were offered as jobs like any other: let the scout look again
            self.hand_back(early)
        self._unsure = []
        return [(one, flight) for one, flight in taken if flight not in early]

    @property
    def unsure(self) -> bool:
        """Whether there is anything to settle."""
        return bool(self._unsure)

    def settle(self) -> None:
        """Give back what a broken connection left in doubt: started, and never run."""
        if self._unsure:
            self.hand_back(self._unsure)
            self._unsure = []

    def queue(self, name: str) -> Queue:
        """Return one of this worker's queues, or another one, as a dead worker had it."""
        known = self._queues.get(name)
        return known or Queue(name, self._connection, job_class=QueuedJob, serializer=self._worker.serializer)

    def _reject(self, queue_name: str, job_id: str, reason: str) -> None:
        now = iso(self._clock.now())
        reject.reject(self._connection, self._queues[queue_name], job_id, reason, now, self._settings)

    def _start(self, candidates: Sequence[Candidate], model: str) -> list[tuple[Candidate, Flight]]:
        flights, starts = [], []
        with self._connection.pipeline() as pipe:
            for candidate in candidates:
                starts.append(len(pipe))
                flights.append(self._begin(candidate, model, pipe))
            starts.append(len(pipe))
            self._worker.heartbeat(LEASE_S, pipeline=pipe)
            self._worker.set_state(WorkerStatus.BUSY, pipeline=pipe)
            *begun, once = groups.cut(pipe, starts)
        words: list[Any] = [
            self._settings.window_jobs, self._clock.now(), QueuedJob.max_bytes, FIELD_BYTES, keys.SUSPECTS
        ]  # fmt: skip
        for flight, group in zip(flights, begun, strict=True):
            words += (flight.queue.key, flight.job.id, group)
        named = [key for candidate in candidates for key in reject.keys_of(candidate.job_id)]
        self._unsure = flights
        answers = self._take_script(keys=named, args=[*words, once])
        taken = []
        for candidate, flight, answered in zip(candidates, flights, cast(list[Any], answers), strict=True):
            if self._is_started(flight, answered):
                taken.append((candidate, flight))
        self._date([flight for _, flight in taken if not flight.submitted_at])
        return taken

    def _is_started(self, flight: Flight, answered: Sequence[Any]) -> bool:
        """Take in what the script answered for one job."""
        said, *rest = answered
        if said == b"started":
            self._complete(flight, rest)
        elif said == b"not":
            _log.warning("not started", extra={"job": flight.job.id, "reason": rest[0].decode(errors="replace")})
        elif said == b"wrong":
            self._reject(flight.queue.name, flight.job.id, reject.belongs_not(*rest))
        return bool(said == b"started")

    def blank(self, job_id: str, queue: Queue) -> QueuedJob:
        """Return a job of which no more is known than its id and its queue."""
        job = QueuedJob(job_id, connection=self._connection, serializer=self._worker.serializer)
        job.origin = queue.name
        job.redis_server_version = self._worker.get_redis_server_version()  # type: ignore[no-untyped-call]
        return job

    def restore(self, blank: QueuedJob, raw: Mapping[bytes, bytes]) -> QueuedJob:
        """Fill in RQ's job from its hash; from a damaged one, make a job that can at least be failed."""
        job, queue_name = blank, blank.origin
        try:
            job.restore(raw)
        except DAMAGED as error:
            _log.warning("job hash is damaged", extra={"job": job.id, "error": type(error).__name__})
            job = self.blank(job.id, self.queue(queue_name))
            job.packed, job.data = raw.get(b"data", b""), b""
            job.created_at = datetime.now(UTC)
        job.origin = queue_name
        return job

    def _begin(self, candidate: Candidate, model: str, pipe: Pipeline) -> Flight:
        """Append the start of a job."""
        queue, key, now = self._queues[candidate.queue], keys.result(candidate.job_id), self._clock.now()
        job = self.blank(candidate.job_id, queue)
        pipe.hincrby(key, "attempts", 1)
        late = candidate.expires_s <= now
        if candidate.refusal is None and not late:
            running = {"status": "running", "started_at": iso(now), "worker": self._label, "model": model}
            pipe.hset(key, mapping=cast("dict[Any, Any]", running))
        pipe.hdel(key, *_OF_AN_ATTEMPT)
        pipe.persist(key)
        execution = Execution.create(job, LEASE_S, pipeline=pipe, worker_name=self._worker.name)
        job.prepare_for_execution(self._worker.name, pipeline=pipe)
        pipe.persist(job.key)
        flight = Flight(job, queue, execution, started_at=now, error=Expired(EXPIRED) if late else None)
        self.ledger.start(flight, pipe)
        return flight

    def _complete(self, flight: Flight, known: Sequence[Any]) -> None:
        """Fill in what was read."""
        attempts, kept, suspicion, raw = known
        flight.job = self.restore(flight.job, answer(raw))
        flight.error = flight.error or _unsupported(flight.job)
        flight.attempts = int(attempts)
        flight.submitted_at = min(_parse(kept[0], flight.started_at), flight.started_at)
        flight.history = history.History.read(kept[1:])
        flight.suspicion = Suspicion.parse(suspicion)
        timeout = flight.job.timeout or Queue.DEFAULT_TIMEOUT
        flight.deadline = time.monotonic() + timeout if timeout > 0 else float("inf")
        self._worker.executions[flight.id] = flight.execution

    def _date(self, flights: Sequence[Flight]) -> None:
        """Say when jobs came that were not submitted through us."""
        if not flights:
            return
        with self._connection.pipeline() as pipe:
            for flight in flights:
                flight.submitted_at = min(enqueued_at(flight.job), flight.started_at)
                pipe.hsetnx(keys.result(flight.job.id), "submitted_at", iso(flight.submitted_at))
            pipe.execute()

    def hand_back(self, flights: Sequence[Flight]) -> int:
        """Put jobs that did not finish back to the head of their queues, in their order; return how many.

        What was cancelled or given to another worker meanwhile stays where it is. The attempt does not count.
        """
        while flights:
            try:
                with fence(self._worker, flights) as (pipe, held):
                    pipe.multi()
                    for flight in reversed(in_order(held)):
                        pipe.hincrby(keys.result(flight.job.id), "attempts", -1)
                        self.put_back(flight, self.ledger, pipe)
                    for flight in flights:
                        self.ledger.remove(flight, pipe)
                    pipe.execute()
                return len(held)
            except WatchError:
                continue
        return 0

    def put_back(self, flight: Flight, ledger: Ledger, pipe: Pipeline) -> None:
        """Append that a job leaves its worker and waits at the head of its queue."""
        job, key = flight.job, keys.result(flight.job.id)
        self._worker.cleanup_execution(job, pipeline=pipe, execution=flight.execution)
        ledger.remove(flight, pipe)
        job.set_status(JobStatus.QUEUED, pipeline=pipe)
        pipe.hdel(job.key, "started_at", "worker_name")
        flight.queue.push_job_id(job.id, pipeline=pipe, at_front=True)
        pipe.hset(key, "status", "queued")
        pipe.hdel(key, "started_at", "worker", "model")


def in_order(flights: Iterable[Flight]) -> list[Flight]:
    """Return the flights in the order in which their jobs came; equal times stay as they are."""
    return sorted(flights, key=lambda flight: enqueued_at(flight.job))


def _unsupported(job: QueuedJob) -> Unsupported | None:
    asked = job.unsupported
    return Unsupported(f"RQ's {asked} is not supported here; enqueue the job without it") if asked else None


def _parse(written: bytes | None, default: float) -> float:
    """Return the moment that a record names; 0 where it names none."""
    if written is None:
        return 0.0
    try:
        return datetime.fromisoformat(written.decode()).timestamp()
    except ValueError:
        return default
