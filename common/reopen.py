"""Let a job that had ended wait again: one way for whoever queues it once more, by our command or RQ's.

Appends to the caller's transaction; knows no queue.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Final, cast

from common import keys, pictures

if TYPE_CHECKING:
    from redis import Redis
    from redis.client import Pipeline

_OF_THE_END: Final = ("finished_at", "total_ms", "error_code", "error_message", "json")


def append(
    pipe: Pipeline, client: Redis, job_id: str, rq_key: bytes | str, digests: Collection[str], now_s: float
) -> None:
    """Append that nothing of the job expires any more: its record, RQ's hash, its pictures, its idempotency key.

    Nothing is held against it. `client` reads; `now_s` is the server's time.
    """
    key = keys.result(job_id)
    owned = cast("bytes | None", client.hget(key, "idempotency_key"))
    pipe.hset(key, "status", "queued")
    pipe.hdel(key, *_OF_THE_END)
    pipe.hdel(keys.SUSPECTS, job_id)
    for name in (key, rq_key, *([keys.idempotency(owned.decode(errors="replace"))] if owned else [])):
        pipe.persist(name)
    for name in digests:
        pictures.hold(pipe, name, [job_id], now_s)
