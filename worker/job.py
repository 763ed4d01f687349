"""RQ's job as this worker reads it: a hash that anybody may have written. Bounded, checked, and nothing of it imported.

Knows no queue, no engine and no result. RQ's own `Job` would fetch a field of any size, unpack a payload of any size,
import any callback it names and post to any webhook.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, cast

from redis import Redis
from rq.exceptions import NoSuchJobError, TimeoutFormatError
from rq.job import Job, JobStatus
from rq.queue import Queue
from rq.registry import BaseRegistry, FinishedJobRegistry, StartedJobRegistry
from rq.utils import import_attribute, now, str_to_date

from common import keys
from common.serializer import JobSerializer, JsonJob, unpack

if TYPE_CHECKING:
    from redis.client import Pipeline

FIELD_BYTES: Final = 64 * 1024
"""A field other than the payload is read up to this size; a larger one counts as absent."""
EXPIRED: Final = "the job had not started at its expires_at"
MAX_RETRIES: Final = 25
RQ_DEFAULT_TIMEOUT_S: Final = 180
"""What RQ writes where the producer says nothing. Whoever means three minutes says 181."""
DAMAGED: Final = (
    AssertionError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, NoSuchJobError,
    TimeoutFormatError,
)  # fmt: skip
"""What RQ raises over a hash that it did not write."""

Ending = Literal["success", "failure", "stopped"]
_FIELDS: Final = (
    "data", "created_at", "origin", "worker_name", "description", "enqueued_at", "started_at", "ended_at",
    "last_heartbeat", "group_id", "timeout", "result_ttl", "failure_ttl", "status", "success_callback_name",
    "success_callback_timeout", "failure_callback_name", "failure_callback_timeout", "stopped_callback_name",
    "stopped_callback_timeout", "dependency_ids", "dependency_id", "allow_dependency_failures", "enqueue_at_front",
    "ttl", "meta", "number_of_retries", "retries_left", "retry_intervals", "enqueue_at_front_on_retry",
)  # fmt: skip
_UNSUPPORTED: Final = {b"repeats_left": "Repeat", b"rate_limit_key": "RateLimit"}
_DATES: Final = (b"created_at", b"enqueued_at", b"started_at", b"ended_at", b"last_heartbeat")
_APART: Final = {*_UNSUPPORTED, *_DATES}  # RQ's own way to read a date takes longer than to read all the rest
_YEAR_S: Final = 365 * 86_400

# The fields of one job that are small enough. The names are in the script, since 30 arguments per job take longer to
# pack than a longer text. A hash that is small altogether, as nearly all are, is read at once.
FIELDS_OF: Final = (
    "local names = {'"
    + "','".join((*_FIELDS, *map(bytes.decode, _UNSUPPORTED)))
    + """'}
local function fields_of(key, most_data, most)
  local answer = {}
  if redis.call('TYPE', key).ok ~= 'hash' then return answer end
  local small = redis.call('HLEN', key) <= 64
  if small and redis.call('MEMORY', 'USAGE', key, 'SAMPLES', 0) <= math.min(most_data, most) then
    for i, value in ipairs(redis.call('HMGET', key, unpack(names))) do
      if value and #value > 0 then
        answer[#answer + 1] = names[i]
        answer[#answer + 1] = value
      end
    end
    return answer
  end
  for _, name in ipairs(names) do
    local size = redis.call('HSTRLEN', key, name)
    if size > 0 and size <= (name == 'data' and most_data or most) then
      answer[#answer + 1] = name
      answer[#answer + 1] = redis.call('HGET', key, name)
    end
  end
  return answer
end
"""
)
"""Lua: `fields_of(key, bound of the payload, bound of any other field)`, which `answer` understands."""
_READ: Final = FIELDS_OF + "return fields_of(KEYS[1], tonumber(ARGV[1]), tonumber(ARGV[2]))"


def ask(pipe: Pipeline, job_id: str) -> None:
    """Append a command that reads the hash of a job, within bounds; `answer` understands the reply."""
    pipe.eval(_READ, 1, Job.key_for(job_id), QueuedJob.max_bytes, FIELD_BYTES)


def answer(reply: Sequence[bytes]) -> dict[bytes, bytes]:
    """Return the fields; none where there is no such job."""
    return dict(zip(reply[::2], reply[1::2], strict=True))


def read(connection: Redis, job_ids: Iterable[str]) -> list[dict[bytes, bytes]]:
    """Return the hashes of jobs as they lie in Redis, within bounds, in one round trip."""
    with connection.pipeline(transaction=False) as pipe:
        for job_id in job_ids:
            ask(pipe, job_id)
        return [answer(reply) for reply in pipe.execute()]


class QueuedJob(JsonJob):
    """An RQ job whose hash is not trusted.

    The payload stays as it lies in Redis: it is not written again, and not unpacked unless somebody asks. RQ itself
    never calls a callback of it; `callback` is for `worker.callbacks`.
    """

    callbacks: ClassVar[frozenset[str]] = frozenset()
    max_bytes: ClassVar[int] = 32 * 1024**2
    keep_s: ClassVar[int] = 3_600
    packed = b""
    unsupported: str | None = None
    """What of RQ it asks for that no worker of ours does."""

    @property
    def started_job_registry(self) -> StartedJobRegistry:
        """RQ would make a new one at each of three looks per job, and that is slow."""
        return cast(StartedJobRegistry, _registry(StartedJobRegistry, self.origin, self.connection))

    @property
    def finished_job_registry(self) -> FinishedJobRegistry:
        """As above."""
        return cast(FinishedJobRegistry, _registry(FinishedJobRegistry, self.origin, self.connection))

    @classmethod
    def fetch_many(cls, job_ids: Iterable[str], connection: Redis, serializer: Any = None) -> list[Job | None]:
        """Read several jobs, bounded; None for one that is not there or cannot be read."""
        ids = [job_id.partition(":")[0] for job_id in job_ids]
        jobs: list[Job | None] = []
        for job_id, raw in zip(ids, read(connection, ids), strict=True):
            job = cls(job_id, connection=connection, serializer=serializer)
            try:
                job.restore(raw)
            except DAMAGED:
                jobs.append(None)
            else:
                jobs.append(job)
        return jobs

    def refresh(self) -> None:
        """Read the job again, bounded.

        Raises:
            NoSuchJobError: it is not there, or is nothing that RQ could have written.
        """
        (raw,) = read(self.connection, [self.id])
        try:
            self.restore(raw)
        except DAMAGED as error:
            raise NoSuchJobError(f"No such job: {self.key} ({type(error).__name__})") from error

    def restore(self, raw_data: Mapping[bytes, bytes]) -> None:
        """Take everything from the hash but the payload, within bounds.

        Raises:
            one of `DAMAGED`: RQ did not write this.
        """
        if not raw_data:
            raise NoSuchJobError(f"No such job: {self.key}")
        self.packed = raw_data.get(b"data", b"")
        self.unsupported = next((name for field, name in _UNSUPPORTED.items() if raw_data.get(field)), None)
        dates = {name.decode(): _date(raw_data[name]) for name in _DATES if raw_data.get(name)}
        super().restore({name: raw_data[name] for name in raw_data.keys() - _APART} | {b"data": b""})
        vars(self).update(dates)
        self.timeout = _timeout(cast("int | None", self.timeout))
        self.ttl = None
        if self.retries_left is not None:
            self.retries_left = max(0, min(self.retries_left, MAX_RETRIES))
        self.retry_intervals = _intervals(self.retry_intervals)
        self.description = self.description or ""
        ids = self._dependency_ids
        self._dependency_ids = ids if isinstance(ids, list) and all(map(_is_writable, ids)) else []

    def to_dict(self, include_meta: bool = True, include_result: bool = True) -> dict[str, Any]:
        """Return what RQ writes but `meta`, which stays as it lies, as does the payload of a job that was read."""
        if not self.packed:
            return super().to_dict(False, include_result)
        packed, self.packed = self.packed, b""
        fields = super().to_dict(False, include_result)
        self.packed = packed
        return {name: value for name, value in fields.items() if name != "data"}

    @property
    def data(self) -> bytes:
        """The payload, unpacked up to `max_bytes`: for callbacks that ask for the job's arguments."""
        return unpack(self.packed, self.max_bytes) if self.packed else super().data

    @data.setter
    def data(self, value: bytes) -> None:
        super(QueuedJob, type(self)).data.fset(self, value)  # type: ignore[attr-defined]  # a property

    def prepare_for_execution(self, worker_name: str, pipeline: Pipeline) -> None:
        """Append what RQ writes at the start; and how long the hash is kept in the end, whoever ends the job."""
        super().prepare_for_execution(worker_name, pipeline)
        self.result_ttl = self.failure_ttl = self.keep_s
        pipeline.hset(self.key, mapping={"result_ttl": self.keep_s, "failure_ttl": self.keep_s})

    def retry(self, queue: Queue, pipeline: Pipeline) -> None:
        """Spend a retry: queue the job again, or schedule it. RQ writes a part of this outside the transaction."""
        interval = self.get_retry_interval()
        assert self.retries_left
        self.retries_left -= 1
        if interval:
            self.set_status(JobStatus.SCHEDULED, pipeline=pipeline)
            queue.schedule_job(self, now() + timedelta(seconds=interval), pipeline=pipeline)
        else:
            queue._enqueue_job(self, pipeline=pipeline, at_front=bool(self.enqueue_at_front_on_retry))

    def body(self, max_bytes: int) -> Any:
        """Return the job's argument, the JSON object that its producer wrote; None where there is no such thing."""
        try:
            return JobSerializer.loads(unpack(self.packed, max_bytes))[2][0]
        except (ValueError, LookupError, TypeError, RecursionError):
            return None

    def callback(self, ending: Ending) -> Callable[..., object] | None:
        """Import the job's callback, if it names one and the worker's owner listed it.

        Raises:
            ValueError, ImportError, AttributeError: there is no such function.
        """
        name = getattr(self, f"_{ending}_callback_name")
        return cast("Callable[..., object]", import_attribute(name)) if name in self.callbacks else None

    @property
    def success_callback(self) -> None:
        """None: RQ would call it before the result is written."""

    @property
    def failure_callback(self) -> None:
        """None: RQ would call it in the main thread, and for attempts that are not the last."""

    @property
    def stopped_callback(self) -> None:
        """None: as for the others."""

    def send_webhooks(self, status: Any, *, exc_string: str | None = None) -> None:
        """Send none."""


@lru_cache(maxsize=16)  # of queues and connections
def _registry(kind: type[BaseRegistry], queue: str, connection: Redis) -> BaseRegistry:
    return kind(queue, connection=connection, job_class=QueuedJob, serializer=JobSerializer)


def _date(written: bytes) -> datetime:
    """Return a moment as RQ writes it, in UTC. What is written in another way RQ reads, or refuses, itself.

    Raises:
        ValueError: it is none.
    """
    try:
        at = datetime.fromisoformat(written.decode())
    except ValueError:
        return str_to_date(written)
    if at.utcoffset() != timedelta():
        raise ValueError(f"{written!r} is not in UTC")
    return at


def _is_writable(said: Any) -> bool:
    """Whether it is text that can be written again: JSON can escape what no UTF-8 can hold."""
    return isinstance(said, str) and said.encode(errors="replace").decode() == said


def _timeout(said: int | None) -> int:
    """Return how long the job may run; -1 is for ever."""
    if said is None or said == RQ_DEFAULT_TIMEOUT_S:
        return keys.DEFAULT_TIMEOUT_S
    return -1 if said < 0 else min(said, _YEAR_S)


def _intervals(said: Any) -> list[int]:
    if isinstance(said, int):
        said = [said]
    if not isinstance(said, list) or not all(type(one) in (int, float) and 0 <= one <= _YEAR_S for one in said):
        return [0]
    return [int(one) for one in said[:MAX_RETRIES]] or [0]


def _own_queue(registry: BaseRegistry) -> Queue:
    return Queue(
        registry.name, connection=registry.connection, job_class=registry.job_class, serializer=registry.serializer
    )


def bounded_in_registries() -> None:
    """Let RQ's registries read dependents by the class of job that they were given: left alone, they take RQ's own."""
    BaseRegistry.get_queue = _own_queue  # type: ignore[method-assign]
