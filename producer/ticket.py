"""Where a submitted job stands: wait for its answer, ask for its status, cancel it. Knows no model."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any, cast

from pydantic import ValidationError
from redis import Redis
from redis import exceptions as errors
from redis.client import Pipeline
from rq.job import Job
from rq.registry import CanceledJobRegistry
from rq.results import Result as RqResult

from common import keys, pictures, reason, record
from common.errors import GenerationFailed, InvalidRequest
from common.messages import Failure, Result, Status
from common.serializer import JobSerializer, unpack
from common.settings import Settings
from producer.broker import Broker, connect
from producer.request import check_id
from producer.state import State, read
from producer.waiting import Wait, Watch, warn


class Ticket:
    """A handle on one job, cheap to keep and safe to share between threads. Made by `submit` and `get`.

    The methods with an `a` in front are for asyncio; thousands may wait at once, with one read of Redis between them.

    Attributes:
        id: the job's id, in RQ and in `radixq:result:ID`.
    """

    __slots__ = ("_broker", "id")

    def __init__(self, job_id: str, broker: Broker) -> None:
        self.id = job_id
        self._broker = broker

    def __repr__(self) -> str:
        return f"Ticket({self.id!r})"

    def status(self) -> Status:
        """Return where the job stands now.

        Raises:
            InvalidRequest: no job has this id (or its result has expired).
        """
        with self._broker.speaking() as client:
            return self._known(read(client, [self.id])[0])

    def result(self, timeout_s: float | None = None) -> Result:
        """Wait until the job has ended and return its result; None waits for ever.

        A server that is away for less than a minute is waited for. Warns with `NoWorkerWarning` once after 10 s when
        no live worker listens to the queue.

        Raises:
            GenerationFailed: the job failed, was cancelled, expired or is lost; see its `code` and `status`.
            TimeoutError: it has not ended within `timeout_s`; it goes on, and `result` may be called again.
            InvalidRequest: no job has this id, or `timeout_s` is no number.
        """
        _check_wait(timeout_s)
        began = time.monotonic()
        wait = Wait(self._broker)
        while True:
            for state in wait.look([self.id]):
                if state.ended:
                    return self._outcome(state)
                if state.status == "queued":
                    warn(wait.nobody([state.queue]))
            left_s = wait.pause_s if timeout_s is None else began + timeout_s - time.monotonic()
            if left_s <= 0:
                raise self._late(timeout_s)
            time.sleep(min(wait.pause_s, left_s))

    def cancel(self) -> bool:
        """Cancel the job and return True, or return False if it has already ended.

        A waiting job leaves its queue. A running one ends at once for everyone who asks; its worker notices within
        about a second, stops computing and drops what it has. Either way this is RQ's own cancel, and the result hash
        says `cancelled`, in one transaction.

        Raises:
            InvalidRequest: no job has this id.
        """
        settings = Settings.from_env()
        now = self._broker.now()
        with self._broker.speaking() as client:
            while True:
                with client.pipeline() as pipe:
                    try:
                        pipe.watch(Job.key_for(self.id), keys.result(self.id))  # type: ignore[no-untyped-call]
                        state = read(client, [self.id])[0]
                        if self._known(state) in ("queued", "running"):
                            pipe.multi()
                            self._append_cancel(pipe, client, state.queue or "", now, settings)
                            pipe.execute()
                            return True
                        return False
                    except errors.WatchError:
                        continue  # the job moved on between the look and the cancel: look again

    async def aresult(self, timeout_s: float | None = None) -> Result:
        """Do what `result` does, without blocking the event loop."""
        _check_wait(timeout_s)
        if timeout_s is not None and timeout_s <= 0:  # one look, which asyncio would not wait for
            return await asyncio.to_thread(self.result, timeout_s)
        try:
            state = await asyncio.wait_for(Watch.of(self._broker).ended(self.id), timeout_s)
        except TimeoutError:
            raise self._late(timeout_s) from None
        return self._outcome(state) if state.recorded else await asyncio.to_thread(self._outcome, state)

    async def astatus(self) -> Status:
        """Do what `status` does, without blocking the event loop."""
        return await asyncio.to_thread(self.status)

    async def acancel(self) -> bool:
        """Do what `cancel` does, without blocking the event loop."""
        return await asyncio.to_thread(self.cancel)

    def _known(self, state: State) -> Status:
        if state.status is None:
            raise InvalidRequest(
                f"no job {self.id!r} on Redis at {self._broker.address}: never submitted there, or its result expired",
                field="job_id",
            )
        return state.status

    def _late(self, timeout_s: float | None) -> TimeoutError:
        return TimeoutError(f"job {self.id} has not ended within {timeout_s} s; it goes on, ask again for its result")

    def _outcome(self, state: State) -> Result:
        """Return the result of a job that finished, raise for every other end."""
        status = self._known(state)
        if not state.recorded:
            failure = self._rq_failure(status)
        else:
            try:
                result = Result.model_validate_json(state.json or b"")
            except ValidationError as error:
                raise GenerationFailed(
                    f"job {self.id} is {status}, but the field json of {keys.result(self.id)} cannot be read",
                    code="internal",
                    status=status,
                ) from error
            if status == "finished":
                return result
            failure = result.error or Failure(code="internal", message="no reason was recorded")
        raise GenerationFailed(f"job {self.id} {status}: {failure.message}", code=failure.code, status=status)

    def _rq_failure(self, status: Status) -> Failure:
        """Return the reason of an end that only RQ recorded, or nobody."""
        if status == "cancelled":
            return Failure(code="cancelled", message="cancelled through RQ")
        if status == "expired":
            return Failure(code="expired", message="the job had not started at its expires_at")
        if status == "lost":
            return Failure(code="internal", message="RQ no longer runs it and no result was written; submit it again")
        with self._broker.speaking() as client:
            return reason.of(client, RqResult.get_key(self.id))  # type: ignore[no-untyped-call]

    def _append_cancel(self, pipe: Pipeline, client: Redis, queue: str, now: str, settings: Settings) -> None:
        job = Job(self.id, connection=client, serializer=JobSerializer)  # not fetched: the payload may be anything
        job.origin = queue
        job.cancel(pipeline=pipe)
        # RQ keeps cancelled jobs, with the prompt, for ever.
        CanceledJobRegistry(job.origin, client).add(job, ttl=settings.prompt_ttl_s, pipeline=pipe)
        pipe.expire(job.key, settings.prompt_ttl_s)
        pipe.hdel(keys.SUSPECTS, self.id)
        body = _body(job, settings.max_job_bytes)
        failure = Failure(code="cancelled", message="cancelled by the caller")
        cancelled = record.ended(record.read(client, self.id, body), "cancelled", failure, now)
        record.write(pipe, cancelled, pictures.named(body), settings)


def digests(job: Job, max_bytes: int) -> tuple[str, ...]:
    """Return the pictures that a job names, as far as it can be read."""
    return pictures.named(_body(job, max_bytes))


def _body(job: Job, max_bytes: int) -> Any:
    size = job.connection.hstrlen(job.key, "data")
    packed = cast("bytes | None", job.connection.hget(job.key, "data")) if size <= max_bytes else None
    try:
        return JobSerializer.loads(unpack(packed or b"", max_bytes))[2][0]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def get(job_id: str, *, redis: str | Redis | None = None) -> Ticket:
    """Return a ticket for a job submitted elsewhere. Does not ask the server yet.

    Raises:
        InvalidRequest: this cannot be the id of a job.
    """
    return Ticket(check_id(job_id), connect(redis, Settings.from_env()))


def _check_wait(timeout_s: object) -> None:
    """Refuse what would end the wait by a TypeError, or, as not-a-number does, never."""
    number = isinstance(timeout_s, (int, float)) and not isinstance(timeout_s, bool) and not math.isnan(timeout_s)
    if timeout_s is not None and not number:
        raise InvalidRequest(f"timeout_s={timeout_s!r} must be a number of seconds, or None", field="timeout_s")
