"""Check jobs, encode them and put them into an RQ queue by function name. Knows no worker."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Unpack

from redis import Redis
from redis import exceptions as errors
from rq import Callback, Retry
from rq.job import Job, JobStatus
from rq.utils import as_text

from common import keys
from common.errors import BrokerUnavailable, InvalidRequest, QueueFull
from common.messages import GenerateJob, Result, Timing
from common.pieces import pieces
from common.serializer import JsonJob
from common.settings import Settings
from producer.album import Album, Picture, store
from producer.broker import Broker, connect
from producer.enqueue import Draft, Refused, enqueue
from producer.options import Options
from producer.request import Request, parse, surrogate, too_large
from producer.ticket import Ticket

CHUNK_JOBS: Final = 1_000
CHUNK_BYTES: Final = 16 * 1024**2
"""One script call holds at most this much, so that Redis serves others in between."""

_RETRY: Final = Retry(max=2)  # a job whose worker was killed is queued again by RQ only if it has retries left
_SERVER_VERSION: Final = (5, 0, 0)  # rq < 2 asks INFO for every job unless told; we need streams (5.0) anyway


@dataclass(frozen=True, slots=True)
class _Checked:
    """A request and the RQ job that carries it; nothing is sent yet."""

    request: Request
    job: Job
    pictures: tuple[Picture, ...]


def submit(text: str | None = None, *, redis: str | Redis | None = None, **options: Unpack[Options]) -> Ticket:
    """Put one job into its queue and return a ticket for the answer.

    The job is `text` as one user message (with `system`, if given, before it), `messages` in OpenAI's form, or a raw
    `prompt` that no chat template touches. See `Options` for the rest; `redis` is a URL or a client, else
    `RADIXQ_REDIS_URL`, `RQ_REDIS_URL`, localhost. A job that names a `model` goes to that model's queue.

    Blocks for one round trip. Pictures are decoded and written as PNG before that, 0.2 s of CPU for each million
    pixels, and sent unless Redis has them. The job is written once or not at all: a connection that breaks while the
    answer is awaited does not leave two.

    Raises:
        InvalidRequest: an argument is wrong, or `job_id` is taken; nothing was written.
        ImageUnreadable, ImageTooLarge: kinds of it; the message names the picture.
        QueueFull: more than `max_queue_length` jobs would wait; nothing was written.
        BrokerUnavailable: Redis cannot be reached or refuses us.
    """
    settings = Settings.from_env()
    broker = connect(redis, settings)
    checked = _check({"text": text, **options}, broker, settings, Album(settings))
    (ticket,) = _write_all(broker, [checked], settings)
    return ticket


def submit_many(
    jobs: Iterable[str | Mapping[str, Any]], *, redis: str | Redis | None = None, **defaults: Unpack[Options]
) -> list[Ticket]:
    """Put many jobs into their queues, in order, in a few round trips, and return their tickets.

    A job is a text or a mapping with the arguments of `submit`; `defaults` hold where it names nothing else. All
    jobs are checked before the first is written. Up to `CHUNK_JOBS` jobs or `CHUNK_BYTES` are written at once, all
    or none. Until then all pictures of the call are in memory, each once; they are written before the jobs. A job may
    depend on one before it in the list. `max_queue_length` counts the whole list.

    Raises:
        InvalidRequest: the message starts with the job's index, `jobs[3]: ...`; nothing was written.
        QueueFull, BrokerUnavailable: as for `submit`; the message says how many jobs are written.
    """
    if isinstance(jobs, (str, bytes, Mapping)) or not isinstance(jobs, Iterable):
        raise InvalidRequest("jobs must be a list of jobs; for one job use submit", field="jobs")
    settings = Settings.from_env()
    broker = connect(redis, settings)
    return _write_all(broker, list(_check_all(jobs, defaults, broker, settings)), settings)


async def asubmit(text: str | None = None, *, redis: str | Redis | None = None, **options: Unpack[Options]) -> Ticket:
    """Do what `submit` does, without blocking the event loop."""
    return await asyncio.to_thread(submit, text, redis=redis, **options)


async def asubmit_many(
    jobs: Iterable[str | Mapping[str, Any]], *, redis: str | Redis | None = None, **defaults: Unpack[Options]
) -> list[Ticket]:
    """Do what `submit_many` does, without blocking the event loop."""
    return await asyncio.to_thread(submit_many, jobs, redis=redis, **defaults)


def _check_all(
    jobs: Iterable[str | Mapping[str, Any]], defaults: Mapping[str, Any], broker: Broker, settings: Settings
) -> Iterator[_Checked]:
    ids: dict[str, int] = {}
    owners: dict[str, tuple[int, str]] = {}
    album = Album(settings)
    for index, job in enumerate(jobs):
        try:
            if not isinstance(job, (str, Mapping)):
                raise InvalidRequest(f"is a {type(job).__name__}; give a text or a mapping of submit's arguments")
            checked = _check({**defaults, **({"text": job} if isinstance(job, str) else job)}, broker, settings, album)
            request = checked.request
            first = ids.setdefault(request.id, index)
            if first != index:
                raise InvalidRequest(f"job_id={request.id!r} is also the id of jobs[{first}]", field="job_id")
            if request.key and owners.setdefault(request.key, (index, request.sha))[1] != request.sha:
                raise _conflict(request.key, f"jobs[{owners[request.key][0]}]")
        except InvalidRequest as error:
            error.args = (f"jobs[{index}]: {error}",)
            raise
        yield checked


def _check(fields: Mapping[str, Any], broker: Broker, settings: Settings, album: Album) -> _Checked:
    """Return the checked request and the RQ job that carries it; nothing is sent."""
    fields, pictures = album.replace(fields)
    request = parse(fields, max_bytes=settings.max_job_bytes)
    if request.expires_in_s is not None:
        request = request.expiring(broker.now_s() + request.expires_in_s)
    job = JsonJob.create(
        keys.GENERATE,
        args=[{"v": request.job.v, **request.job.model_dump(exclude_defaults=True)}],
        connection=broker.client,
        id=request.id,
        origin=request.queue,
        status=JobStatus.QUEUED,
        description=_description(request.job),
        timeout=request.timeout_s,
        result_ttl=settings.prompt_ttl_s,
        failure_ttl=settings.prompt_ttl_s,
        depends_on=list(request.parents) or None,
        **{name: Callback(function) for name, function in request.callbacks.items()},  # type: ignore[arg-type]
    )
    job.retries_left, job.retry_intervals = _RETRY.max, _RETRY.intervals
    job.enqueued_at = job.created_at
    job.redis_server_version = _SERVER_VERSION
    try:
        num_bytes = len(job.data)
    except UnicodeEncodeError as error:
        raise surrogate(fields) from error
    except (TypeError, ValueError, RecursionError) as error:  # all other fields are checked by now
        field = "chat_template_kwargs"
        raise InvalidRequest(f"{field} is not plain JSON: {error}", field=field) from error
    if num_bytes > settings.max_job_bytes:
        raise too_large(request.source, num_bytes, settings.max_job_bytes)
    return _Checked(request, job, pictures)


def _description(job: GenerateJob) -> str:
    """Say what kind of job it is, and nothing of what is in it."""
    kind = "prompt" if job.prompt is not None else "chat"
    words = [f"{kind}, {job.num_chars} characters"]
    if job.num_images:
        words.append(f"{job.num_images} image{'s' if job.num_images > 1 else ''}")
    return ", ".join(words)


def _write_all(broker: Broker, all_checked: list[_Checked], settings: Settings) -> list[Ticket]:
    chunks = list(pieces(all_checked, lambda checked: len(checked.job.data), CHUNK_BYTES, CHUNK_JOBS))
    later = Counter(checked.request.queue for checked in all_checked)
    if len(chunks) > 1:  # a single chunk checks for itself
        with broker.speaking() as client:
            _refuse_taken(client, all_checked)
    ids: list[str] = []
    for chunk in chunks:
        later -= Counter(checked.request.queue for checked in chunk)
        try:
            ids += _write(broker, chunk, later)
        except (InvalidRequest, QueueFull, BrokerUnavailable) as error:
            if ids:
                error.args = (f"{error}; the first {len(ids)} of {len(all_checked)} jobs are in the queue",)
            raise
    return [Ticket(job_id, broker) for job_id in ids]


def _write(broker: Broker, chunk: list[_Checked], later: Mapping[str, int]) -> list[str]:
    """Write all jobs of a chunk or none. A lost connection is tried once more: the script knows what it has written."""
    submitted_at, nonce = broker.now(), uuid.uuid4().hex
    drafts = [_draft(checked, submitted_at) for checked in _without_repetitions(chunk)]
    _store(broker, chunk)
    with broker.speaking() as client:
        try:
            answer = enqueue(client, drafts, nonce, later)
        except errors.AuthenticationError:
            raise
        except (errors.ConnectionError, errors.TimeoutError):
            answer = enqueue(client, drafts, nonce, later)
    if isinstance(answer, Refused):
        raise _refusal(answer, drafts[answer.draft])
    owners = {draft.key: job_id for draft, job_id in zip(drafts, answer, strict=True) if draft.key}
    requests = [checked.request for checked in chunk]
    return [owners[request.key] if request.key else request.id for request in requests]


def _store(broker: Broker, chunk: list[_Checked]) -> None:
    """Store the pictures before the jobs that need them; again where the connection is lost, as it does no harm."""
    needed = {checked.request.id: checked.pictures for checked in chunk if checked.pictures}
    if not needed:
        return
    now_s = broker.now_s()
    with broker.speaking() as client:
        try:
            store(client, needed, now_s)
        except errors.AuthenticationError:
            raise
        except (errors.ConnectionError, errors.TimeoutError):
            store(client, needed, now_s)


def _without_repetitions(chunk: list[_Checked]) -> list[_Checked]:
    """Keep the first of several jobs with one idempotency key; that they ask for the same was checked."""
    seen: set[str] = set()
    kept = []
    for checked in chunk:
        key = checked.request.key
        if key is None or key not in seen:
            kept.append(checked)
        if key is not None:
            seen.add(key)
    return kept


def _draft(checked: _Checked, submitted_at: str) -> Draft:
    request, job = checked.request, checked.job
    waiting = Result(
        id=request.id,
        status="queued",
        attempts=0,
        timing=Timing(submitted_at=submitted_at),
        model=request.job.model,
        custom_id=request.job.custom_id,
        metadata=request.job.metadata,
        expires_at=request.job.expires_at,
        idempotency_key=request.key,
        request_sha=request.sha if request.key else None,
    )
    sha = waiting.request_sha or ""
    return Draft(job, waiting.to_hash(), request.key, sha, request.parents, request.max_queue_length)


def _refusal(refused: Refused, draft: Draft) -> InvalidRequest | QueueFull:
    if refused.why == "full":
        length, queue = int(refused.detail), draft.job.origin
        return QueueFull(
            f"queue {queue!r} holds {length:,} waiting jobs, and max_queue_length is {draft.max_queue_length:,}; "
            "wait until workers have run some of them",
            queue=queue,
            length=length,
        )
    if refused.why == "conflict":
        return _conflict(str(draft.key), f"job {refused.detail}")
    if refused.why == "unknown":
        return InvalidRequest(
            f"depends_on={refused.detail!r}: no job has this id; it was never submitted there, or its result expired",
            field="depends_on",
        )
    return _taken(draft.job.id)


def _conflict(key: str, owner: str) -> InvalidRequest:
    return InvalidRequest(
        f"idempotency_key={key!r} belongs to {owner}, which asks for something else; take another key for this request",
        field="idempotency_key",
    )


def _taken(job_id: str) -> InvalidRequest:
    return InvalidRequest(
        f"job_id={job_id!r} is taken; get({job_id!r}) returns that job, or choose another id", field="job_id"
    )


def _refuse_taken(client: Redis, all_checked: Iterable[_Checked]) -> None:
    requests = [checked.request for checked in all_checked]
    ids = [request.id for request in requests if request.named and not request.key]
    with client.pipeline(transaction=False) as pipe:
        for job_id in ids:
            pipe.exists(keys.result(job_id), as_text(Job.key_for(job_id)))  # bytes in rq < 2
        for job_id, taken in zip(ids, pipe.execute(), strict=True):
            if taken:
                raise _taken(job_id)
