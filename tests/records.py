"""Write into Redis what a worker, or RQ, would have written about a job."""

from __future__ import annotations

from typing import Any

from redis import Redis

from common import keys
from common.messages import Failure, Result, Timing, Usage
from producer import Ticket

USAGE = Usage(prompt_tokens=5, cached_tokens=3, prefill_tokens=2, completion_tokens=1)


def finish(redis: Redis, job_id: str, **fields: Any) -> Result:
    """Write a job's end as the worker does: its result and RQ's status together."""
    ended: dict[str, Any] = {"status": "finished", "text": "ok", "finish_reason": "stop", "usage": USAGE, **fields}
    result = Result(id=job_id, worker="w", model="tiny", timing=Timing(total_ms=1.5), **ended)
    with redis.pipeline() as pipe:
        pipe.hset(f"rq:job:{job_id}", "status", "finished" if result.status == "finished" else "failed")
        pipe.hset(keys.result(job_id), mapping=result.to_hash())  # type: ignore[arg-type]
        pipe.execute()
    return result


def rq_status(redis: Redis, ticket: Ticket, status: str) -> None:
    redis.hset(f"rq:job:{ticket.id}", "status", status)


def failed(redis: Redis, job_id: str, status: Any, code: str) -> None:
    finish(
        redis, job_id, status=status, text=None, finish_reason=None, usage=None, error=Failure(code=code, message="why")
    )
