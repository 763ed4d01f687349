"""Read and write `radixq:result:ID`, with all that goes with it: one way for whoever ends a job, worker or producer.

Writing appends to the caller's transaction; knows neither RQ's books nor how it came to the end.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, cast

from pydantic import ValidationError
from redis.exceptions import ResponseError

from common import keys, pictures
from common.history import FIELDS, History, labels
from common.messages import Failure, Result, Status
from common.settings import Settings

if TYPE_CHECKING:
    from redis import Redis
    from redis.client import Pipeline

_PLAIN: Final = ("worker", "model", "custom_id", "batch_id", "expires_at")
_TIMES: Final = ("submitted_at", "started_at")


def read(client: Redis, job_id: str, body: Any = None) -> Result:
    """Return what the record says of a job that has not ended; where it says nothing, what the job's `body` does."""
    names = ("json", "attempts", *_PLAIN, *_TIMES, *FIELDS)
    try:
        values = cast("list[bytes | None]", client.hmget(keys.result(job_id), *names))
    except ResponseError:  # something else has that name
        values = [None] * len(names)
    json, attempts, *rest = values
    try:
        before = Result.model_validate_json(json or b"")
    except ValidationError:  # it runs, or was not submitted through us
        before = Result(id=job_id, status="queued", attempts=0, **labels(body))
    texts = [value.decode(errors="replace") if value else None for value in rest]
    said: dict[str, Any] = {name: text for name, text in zip((*_PLAIN, *_TIMES), texts, strict=False) if text}
    times: dict[str, Any] = {name: said.pop(name) for name in _TIMES if name in said}
    said |= History.read(rest[-len(FIELDS) :]).fields()
    if attempts:
        said["attempts"] = counted(attempts)
    return before.model_copy(update={"id": job_id, "timing": before.timing.model_copy(update=times), **said})


def counted(attempts: bytes | None) -> int:
    """Return the number of attempts that a record names; 0 where it names none, or none that we would write."""
    return int(attempts) if attempts and len(attempts) < 10 and attempts.isdigit() else 0


def ended(before: Result, status: Status, failure: Failure, at: str) -> Result:
    """Return the record of a job that ended, `at` a time as `read` finds them, without an answer."""
    began = before.timing.submitted_at
    try:
        took = datetime.fromisoformat(at) - datetime.fromisoformat(began or "")
    except (ValueError, TypeError):  # nobody wrote it, or not we
        total_ms = None
    else:
        total_ms = took / timedelta(milliseconds=1)
    timing = before.timing.model_copy(update={"finished_at": at, "total_ms": total_ms})
    return before.model_copy(update={"status": status, "error": failure, "timing": timing})


def write(
    pipe: Pipeline, result: Result, digests: Collection[str], settings: Settings, *, needed_s: int | None = None
) -> None:
    """Append the whole record. One that ended expires, its idempotency key with it.

    Its pictures may then expire with its prompt, or after `needed_s`. A job that will run again has no time to live.
    """
    key = keys.result(result.id)
    pipe.delete(key)
    pipe.hset(key, mapping=cast("dict[Any, Any]", result.to_hash()))
    if result.status == "queued":
        return
    pipe.expire(key, settings.result_ttl_s)
    pictures.release(pipe, result.id, digests, needed_s or settings.prompt_ttl_s)
    if result.idempotency_key:
        pipe.expire(keys.idempotency(result.idempotency_key), settings.result_ttl_s)
