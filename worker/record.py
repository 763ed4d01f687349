"""Write how a job ended into `radixq:result:ID`, with all that goes with it: one way for whoever ends a job.

Appends to the caller's transaction; knows neither RQ's books nor how it came to the end.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, cast

from common import keys, pictures
from common.messages import Result
from common.settings import Settings

if TYPE_CHECKING:
    from redis.client import Pipeline


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
