"""Read where jobs stand, from RQ's record and ours in one snapshot. Knows no waiting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, cast

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
        for job_id in job_ids:
            pipe.hmget(keys.result(job_id), "status", "json")
            pipe.hmget(Job.key_for(job_id), "status", "origin")
        replies = pipe.execute()
    return [_state(*ours, *rqs) for ours, rqs in zip(replies[::2], replies[1::2], strict=True)]


def _state(ours: bytes | None, json: bytes | None, rqs: bytes | None, origin: bytes | None) -> State:
    recorded = ours.decode() if ours else None
    live = _FROM_RQ.get(rqs.decode(), "running") if rqs else None
    queue = origin.decode() if origin else None
    # A job that failed and was queued again by hand (`rq requeue`) is alive, whatever its old record says.
    requeued = live in ("queued", "running") and recorded != "finished"
    if recorded in ENDED and not requeued:
        return State(cast("Status", recorded), True, json, queue)
    if live is None:
        return State("lost" if recorded else None, False, json, queue)
    return State(live, False, json, queue)
