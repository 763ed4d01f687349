"""Check jobs, encode them and put them into an RQ queue by function name. Knows no worker."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Unpack

from redis import Redis
from redis import exceptions as errors
from redis.client import Pipeline
from rq import Queue, Retry
from rq.job import Job, JobStatus
from rq.utils import as_text

from common import keys
from common.errors import BrokerUnavailable, InvalidRequest
from common.messages import GenerateJob, Result, Timing
from common.serializer import JobSerializer
from common.settings import Settings
from producer.album import Album, Picture, store
from producer.broker import Broker, connect
from producer.request import Options, Request, parse, surrogate, too_large
from producer.ticket import Ticket

CHUNK_JOBS: Final = 1_000
CHUNK_BYTES: Final = 16 * 1024**2
"""One transaction holds at most this much, so that Redis serves others in between."""

_RETRY: Final = Retry(max=2)  # a job whose worker was killed is queued again by RQ only if it has retries left
_SERVER_VERSION: Final = (5, 0, 0)  # rq < 2 asks INFO for every job unless told; we need streams (5.0) anyway


@dataclass(frozen=True, slots=True)
class _Draft:
    request: Request
    job: Job
    pictures: tuple[Picture, ...]


def submit(text: str | None = None, *, redis: str | Redis | None = None, **options: Unpack[Options]) -> Ticket:
    """Put one job into its queue and return a ticket for the answer.

    The job is `text` as one user message (with `system`, if given, before it), `messages` in OpenAI's form, or a raw
    `prompt` that no chat template touches. See `Options` for the rest; `redis` is a URL or a client, else
    `RADIXQ_REDIS_URL`, `RQ_REDIS_URL`, localhost. A job that names a `model` goes to that model's queue.

    Blocks for one round trip; from asyncio use `await asyncio.to_thread(submit, ...)`. Pictures are decoded and written
    as PNG before that, 0.2 s of CPU for each million pixels, and sent unless Redis has them.

    Raises:
        InvalidRequest: an argument is wrong, or `job_id` is taken; nothing was written.
        ImageUnreadable, ImageTooLarge: kinds of it; the message names the picture.
        BrokerUnavailable: Redis cannot be reached or refuses us.
    """
    settings = Settings.from_env()
    broker = connect(redis, settings)
    draft = _draft({"text": text, **options}, broker, settings, Album(settings))
    _write(broker, [draft])
    return Ticket(draft.request.id, broker)


def submit_many(
    jobs: Iterable[str | Mapping[str, Any]], *, redis: str | Redis | None = None, **defaults: Unpack[Options]
) -> list[Ticket]:
    """Put many jobs into their queues, in order, in a few round trips, and return their tickets.

    A job is a text or a mapping with the arguments of `submit`; `defaults` hold where it names nothing else. All
    jobs are checked before the first is written. Up to `CHUNK_JOBS` jobs or `CHUNK_BYTES` are written at once, all
    or none. Until then all pictures of the call are in memory, each once; they are written before the jobs.

    Raises:
        InvalidRequest: the message starts with the job's index, `jobs[3]: ...`; nothing was written.
        BrokerUnavailable: as for `submit`; the message says how many jobs are written.
    """
    if isinstance(jobs, (str, bytes, Mapping)):
        raise InvalidRequest("jobs must be a list of jobs; for one job use submit", field="jobs")
    settings = Settings.from_env()
    broker = connect(redis, settings)
    drafts = list(_drafts(jobs, defaults, broker, settings))
    chunks = list(_chunks(drafts))
    if len(chunks) > 1:  # a single chunk checks for itself
        with broker.speaking() as client:
            _refuse_taken(client, drafts)
    num_written = 0
    for chunk in chunks:
        try:
            _write(broker, chunk)
        except (InvalidRequest, BrokerUnavailable) as error:
            if num_written:
                error.args = (f"{error}; the first {num_written} of {len(drafts)} jobs are in the queue",)
            raise
        num_written += len(chunk)
    return [Ticket(draft.request.id, broker) for draft in drafts]


def _drafts(
    jobs: Iterable[str | Mapping[str, Any]], defaults: Mapping[str, Any], broker: Broker, settings: Settings
) -> Iterator[_Draft]:
    seen: dict[str, int] = {}
    album = Album(settings)
    for index, job in enumerate(jobs):
        try:
            if not isinstance(job, (str, Mapping)):
                raise InvalidRequest(f"is a {type(job).__name__}; give a text or a mapping of submit's arguments")
            draft = _draft({**defaults, **({"text": job} if isinstance(job, str) else job)}, broker, settings, album)
            first = seen.setdefault(draft.request.id, index)
            if first != index:
                raise InvalidRequest(f"job_id={draft.request.id!r} is also the id of jobs[{first}]", field="job_id")
        except InvalidRequest as error:
            error.args = (f"jobs[{index}]: {error}",)
            raise
        yield draft


def _draft(fields: Mapping[str, Any], broker: Broker, settings: Settings, album: Album) -> _Draft:
    """Return the checked request and the RQ job that carries it; nothing is sent."""
    fields, pictures = album.replace(fields)
    request = parse(fields, max_bytes=settings.max_job_bytes)
    job = Job.create(
        keys.GENERATE,
        args=[{"v": request.job.v, **request.job.model_dump(exclude_defaults=True)}],
        connection=broker.client,
        serializer=JobSerializer,
        id=request.id,
        origin=request.queue,
        status=JobStatus.QUEUED,
        description=_description(request.job),
        timeout=request.timeout_s,
        result_ttl=settings.prompt_ttl_s,
        failure_ttl=settings.prompt_ttl_s,
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
    return _Draft(request, job, pictures)


def _description(job: GenerateJob) -> str:
    """Say what kind of job it is, and nothing of what is in it."""
    kind = "prompt" if job.prompt is not None else "chat"
    words = [f"{kind}, {job.num_chars} characters"]
    if job.num_images:
        words.append(f"{job.num_images} image{'s' if job.num_images > 1 else ''}")
    return ", ".join(words)


def _chunks(drafts: list[_Draft]) -> Iterator[list[_Draft]]:
    chunk: list[_Draft] = []
    num_bytes = 0
    for draft in drafts:
        size = len(draft.job.data)
        if chunk and (len(chunk) == CHUNK_JOBS or num_bytes + size > CHUNK_BYTES):
            yield chunk
            chunk, num_bytes = [], 0
        chunk.append(draft)
        num_bytes += size
    if chunk:
        yield chunk


def _write(broker: Broker, drafts: list[_Draft]) -> None:
    """Write all drafts or none. A lost connection is tried once more: the reply may have been lost, not the write."""
    submitted_at = broker.now()
    _store(broker, drafts)
    with broker.speaking() as client:
        try:
            _transaction(client, drafts, submitted_at)
        except errors.AuthenticationError:
            raise
        except (errors.ConnectionError, errors.TimeoutError):
            if not client.exists(keys.result(drafts[0].request.id)):
                _transaction(client, drafts, submitted_at)


def _store(broker: Broker, drafts: list[_Draft]) -> None:
    """Store the pictures before the jobs that need them; again where the connection is lost, as it does no harm."""
    needed = {draft.request.id: draft.pictures for draft in drafts if draft.pictures}
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


def _transaction(client: Redis, drafts: list[_Draft], submitted_at: str) -> None:
    named = [key for draft in drafts if draft.request.named for key in _keys(draft.request.id)]
    while True:
        with client.pipeline() as pipe:
            try:
                if named:
                    pipe.watch(*named)  # type: ignore[no-untyped-call]
                    _refuse_taken(client, drafts)
                    pipe.multi()
                _append(pipe, client, drafts, submitted_at)
                pipe.execute()
                return
            except errors.WatchError:
                continue  # somebody took one of the ids this moment: the check will say which


def _append(pipe: Pipeline, client: Redis, drafts: list[_Draft], submitted_at: str) -> None:
    queues = {draft.request.queue: Queue(draft.request.queue, connection=client) for draft in drafts}
    for queue in queues.values():
        pipe.sadd(Queue.redis_queues_keys, queue.key)
    for request, job in ((draft.request, draft.job) for draft in drafts):
        waiting = Result(
            id=request.id,
            status="queued",
            attempts=0,
            timing=Timing(submitted_at=submitted_at),
            model=request.job.model,
            custom_id=request.job.custom_id,
            metadata=request.job.metadata,
        )
        job.save(pipeline=pipe)
        pipe.hset(keys.result(request.id), mapping=waiting.to_hash())  # type: ignore[arg-type]  # invariant dict
        queues[request.queue].push_job_id(request.id, pipeline=pipe)


def _refuse_taken(client: Redis, drafts: Iterable[_Draft]) -> None:
    ids = [draft.request.id for draft in drafts if draft.request.named]
    with client.pipeline(transaction=False) as pipe:
        for job_id in ids:
            pipe.exists(*_keys(job_id))
        for job_id, taken in zip(ids, pipe.execute(), strict=True):
            if taken:
                raise InvalidRequest(
                    f"job_id={job_id!r} is taken; get({job_id!r}) returns that job, or choose another id",
                    field="job_id",
                )


def _keys(job_id: str) -> tuple[str, str]:
    return keys.result(job_id), as_text(Job.key_for(job_id))  # bytes in rq < 2
