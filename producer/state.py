"""Read where jobs stand, from RQ's record and ours in one snapshot. Knows no waiting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, cast

from redis import Redis
from rq.job import Job

from common import keys
from common.messages import Status

ENDED: Final = frozenset({"finished", "failed", "cancelled", "expired", "lost"})

# What RQ's status of a job means where our own record does not say that the job ended.
_FROM_RQ: Final[dict[str, Status]] = {
    "created": "queued",
    "queued": "queued",
    "deferred": "queued",
    "scheduled": "queued",
    "rate_limited": "queued",
    "ready_to_enqueue": "queued",
    "started": "running",
    "finished": "lost",
    "failed": "failed",
    "stopped": "cancelled",
    "canceled": "cancelled",
}


@dataclass(frozen=True, slots=True)
class State:
    """One job at one moment.

    Attributes:
        status: None where nobody knows the id.
        recorded: whether the result hash says so itself (then `json` is the whole `Result`).
        queue: the job's queue, as long as RQ has the job.
    """

    status: Status | None
    recorded: bool
    json: bytes | None
    queue: str | None

    @property
    def ended(self) -> bool:
        """Whether waiting is over."""
        return self.status in ENDED or self.status is None


def read(client: Redis, job_ids: Sequence[str]) -> list[State]:
    """Return the state of every job, in order, in one round trip."""
    with client.pipeline() as pipe:
        pipe.time()
        for job_id in job_ids:
            pipe.hmget(keys.result(job_id), "status", "json", "expires_at")
            pipe.hmget(Job.key_for(job_id), "status", "origin")
        (seconds, _), *replies = pipe.execute()
    return [_state(ours, rqs, seconds) for ours, rqs in zip(replies[::2], replies[1::2], strict=True)]


def _state(ours: Sequence[Any], rqs: Sequence[Any], now_s: int) -> State:
    recorded, json, expires_at = _text(ours[0]), ours[1], _text(ours[2])
    live = _FROM_RQ.get(_text(rqs[0]) or "", "running") if rqs[0] else None
    queue = _text(rqs[1])
    # A job that failed and was queued again by hand (`rq requeue`) is alive, whatever its old record says.
    requeued = live in ("queued", "running") and recorded != "finished"
    if recorded in ENDED and not requeued:
        return State(cast("Status", recorded), True, json, queue)
    if live is None:
        return State("lost" if recorded else None, False, json, queue)
    if live == "queued" and expires_at and _is_over(expires_at, now_s):
        live = "expired"  # no worker will start it; the next one that sees it writes so
    return State(live, False, json, queue)


def _is_over(moment: str, now_s: int) -> bool:
    try:
        return datetime.fromisoformat(moment).timestamp() <= now_s
    except ValueError:  # not written by us
        return False


def _text(value: bytes | None) -> str | None:
    return value.decode(errors="replace") if value else None
