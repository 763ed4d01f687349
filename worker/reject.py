"""Fail what RQ itself cannot handle: ids that it refuses, keys of a job that hold something else.

Such a job never becomes RQ's `Job`; one script takes the id out of the queue and writes the reason. Knows no engine.
"""

from __future__ import annotations

import re
from typing import Any, Final

from redis import Redis
from rq.executions import ExecutionRegistry
from rq.job import Job
from rq.queue import Queue
from rq.results import Result as RqResult

from common import keys
from common.errors import InvalidRequest
from common.log import logger
from common.messages import Failure, Result, Timing
from common.settings import Settings

BAD_ID: Final = (
    "the job's id must be letters, digits, '_' and '-', which is all that RQ accepts; submit it under another"
)
_RQS_IDS: Final = re.compile(r"[A-Za-z0-9_-]+")
_MAX_ID: Final = 512
_log = logger("worker.reject")

# KEYS: queue, intermediate queue, RQ's hash, our result. ARGV: id, two times to live, fields of the result.
_SCRIPT: Final = """
if redis.call('LREM', KEYS[1], 1, ARGV[1]) + redis.call('LREM', KEYS[2], 1, ARGV[1]) == 0 then return 0 end
if redis.call('TYPE', KEYS[3]).ok == 'hash' then
  redis.call('HSET', KEYS[3], 'status', 'failed')
  redis.call('EXPIRE', KEYS[3], ARGV[3])
end
if #ARGV > 3 then
  redis.call('DEL', KEYS[4])
  redis.call('HSET', KEYS[4], unpack(ARGV, 4))
  redis.call('EXPIRE', KEYS[4], ARGV[2])
end
return 1
"""


# Lua: the first key of the job whose keys begin at KEYS[at], and what it is, if that is not what belongs there. Of our
# record, its attempts too: HINCRBY of another thing fails in the middle of a transaction.
WRONG: Final = """
local kinds = {'hash', 'hash', 'set', 'set', 'stream', 'zset'}
local function wrong(at)
  for i, kind in ipairs(kinds) do
    local found = redis.call('TYPE', KEYS[at + i - 1]).ok
    if found ~= 'none' and found ~= kind then return KEYS[at + i - 1], found end
  end
  local attempts = redis.call('HGET', KEYS[at + 1], 'attempts') or '0'
  if #attempts > 9 or not (attempts == '0' or attempts:find('^%-?[1-9]%d*$')) then
    return KEYS[at + 1], 'hash whose attempts are no number'
  end
end
"""


def keys_of(job_id: str) -> tuple[str, ...]:
    """Return the keys of a job that `WRONG` looks at."""
    dependencies = f"{Job.redis_job_namespace_prefix}:{job_id}:dependencies"
    results: str = RqResult.get_key(job_id)  # type: ignore[no-untyped-call]
    executions = ExecutionRegistry.key_template.format(job_id)
    return Job.key_for(job_id), keys.result(job_id), Job.dependents_key_for(job_id), dependencies, results, executions


def belongs_not(key: bytes, kind: bytes) -> str:
    """Say what is wrong with a job whose `key` is of that kind."""
    return f"{key.decode()} holds a {kind.decode()}, which is not what belongs there; delete it and submit again"


def is_id(job_id: str) -> bool:
    """Whether RQ accepts the id, and we can name keys after it."""
    return len(job_id) <= _MAX_ID and _RQS_IDS.fullmatch(job_id) is not None


def to_text(raw_id: bytes) -> str:
    """Return any bytes as an id that `to_bytes` turns back."""
    return raw_id.decode(errors="surrogateescape")


def to_bytes(job_id: str) -> bytes:
    """Return the id as it lies in Redis."""
    return job_id.encode(errors="surrogateescape")


def reject(connection: Redis, queue: Queue, job_id: str, reason: str, now: str, settings: Settings) -> bool:
    """Take the id out of its queue, say in its result why, and mark RQ's hash as failed; at most once.

    Return whether it was there. An id longer than `_MAX_ID` has no result: nobody submitted it.
    """
    raw = to_bytes(job_id)
    result = Result(
        id=raw.decode(errors="replace")[:_MAX_ID],
        status="failed",
        attempts=0,
        timing=Timing(finished_at=now),
        error=Failure(code=InvalidRequest.code, message=reason),
    )
    fields = [part for pair in result.to_hash().items() for part in pair] if len(raw) <= _MAX_ID else []
    names = (
        queue.key,
        queue.intermediate_queue_key,
        Job.redis_job_namespace_prefix.encode() + raw,
        keys.result("").encode() + raw,
    )
    words: list[Any] = [raw, int(settings.result_ttl_s), int(settings.prompt_ttl_s), *fields]
    found = bool(connection.eval(_SCRIPT, len(names), *names, *words))
    if found:
        _log.warning("rejected", extra={"job": ascii(job_id)[:80], "reason": reason})
    return found
