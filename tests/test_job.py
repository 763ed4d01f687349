"""How RQ's job is read from its hash: its times. The rest is in `test_drain`, `test_fuzz` and `test_hostile`."""

from __future__ import annotations

import pytest
from redis import Redis
from rq.job import Job

from worker.job import QueuedJob

TIMES = ("created_at", "enqueued_at", "started_at", "ended_at", "last_heartbeat")


@pytest.mark.parametrize("form", ["2026-11-23T10:00:0{}.000001Z", "2026-11-23T10:00:0{}Z", "2026-1-2T3:4:{}Z"])
def test_the_times_of_a_job_are_those_that_rq_reads(form: str) -> None:
    raw = {name.encode(): form.format(number).encode() for number, name in enumerate(TIMES)} | {b"data": b""}
    ours, rqs = QueuedJob("a", connection=Redis()), Job("a", connection=Redis())
    ours.restore(raw)
    rqs.restore(raw)
    assert [getattr(ours, name) for name in TIMES] == [getattr(rqs, name) for name in TIMES]
    assert len({getattr(ours, name) for name in TIMES}) == len(TIMES)


@pytest.mark.parametrize(
    "written", ["2026-11-23T10:00:00", "2026-11-23T10:00:00+05:00", "2026-11-23", "then", "\u00e9"]
)
def test_a_time_that_is_not_in_utc_is_none(written: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # RQ's words
        QueuedJob("a", connection=Redis()).restore({b"enqueued_at": written.encode()})
