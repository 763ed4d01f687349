"""Every Redis key, queue name, job-function name and TTL in one place. Knows no Redis client."""

from __future__ import annotations

import re
from typing import Final

DEFAULT_QUEUE: Final = "radixq"
GENERATE: Final = "radixq.generate"
"""Name of the job function. It is importable nowhere, so no foreign worker can run foreign code for it."""

DEFAULT_TIMEOUT_S: Final = 3_600
"""How long a job may run, from its start, where nobody says. Not RQ's 180 s: a row of a full batch on a small Mac, with
a long answer, takes longer."""

WORKERS: Final = "radixq:workers"
DEAD: Final = "radixq:dead"
IMAGES: Final = "radixq:images"
"""Sorted set of the pictures that jobs need, by when that was last checked."""
FLIGHTS: Final = "radixq:flights"
"""The names of worker processes that have not ended in order; what each has in its hands is in `flights(name)`."""
SUSPECTS: Final = "radixq:suspects"
"""Jobs in flight when a worker died, each with how it may run next (see `worker/suspects.py`)."""
METRICS_TTL_S: Final = 7 * 86_400
PREFIXES_TTL_S: Final = 15
WORKER_ALIVE_S: Final = 120
"""A worker whose last sign of life (its score in `WORKERS`) is older than this is taken for gone."""

_NAME = re.compile(r"[^A-Za-z0-9._/-]+")


def result(job_id: str) -> str:
    """Return the key of the readable result hash of one job."""
    return f"radixq:result:{job_id}"


def metrics(worker: str) -> str:
    """Return the key of one worker's metrics hash."""
    return f"radixq:metrics:{worker}"


def flights(worker: str) -> str:
    """Return the key of what one worker process (by RQ's name for it) has claimed or runs."""
    return f"{FLIGHTS}:{worker}"


def prefixes(worker: str) -> str:
    """Return the key of the set of fingerprints of one worker: prefixes it is at (`run:`) and was at (`held:`)."""
    return f"radixq:prefixes:{worker}"


def image(digest: str) -> str:
    """Return the key of one picture, a PNG; `digest` is hexadecimal."""
    return f"radixq:image:{digest}"


def image_jobs(digest: str) -> str:
    """Return the key of the sorted set of jobs that need a picture."""
    return f"radixq:image:{digest}:jobs"


def idempotency(key: str) -> str:
    """Return the key that holds the id of the job which owns this idempotency key."""
    return f"radixq:idempotency:{key}"


def model_queue(model: str) -> str:
    """Return the queue of jobs that ask for one model by name."""
    return f"{DEFAULT_QUEUE}.{_NAME.sub('-', model.strip())}"
