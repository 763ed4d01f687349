"""Queue jobs whose time has come: retries with an interval, and what `enqueue_at` and `enqueue_in` put aside.

RQ's own scheduler is a forked process that reads every job whole. This is one script, called every second by every
worker: it moves what is due, and reads nothing of it. Knows no job beyond its id.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, cast

from redis import Redis
from rq.job import Job
from rq.queue import Queue
from rq.scheduler import RQScheduler
from rq.utils import now, utcformat

MOST: Final = 1_000
"""Jobs of one queue moved at once, so that Redis serves others in between."""

# KEYS: registry, queue, RQ's lock. While somebody holds the lock, a scheduler of RQ's runs and does it: both would
# queue a job twice, since RQ's reads the registry before its transaction.
_SCRIPT: Final = """
if redis.call('EXISTS', KEYS[3]) == 1 then return 0 end
local due = redis.call('ZRANGEBYSCORE', KEYS[1], 0, ARGV[1], 'LIMIT', 0, ARGV[2])
for _, id in ipairs(due) do
  redis.call('ZREM', KEYS[1], id)
  local job = ARGV[3] .. id
  if redis.call('TYPE', job).ok == 'hash' and redis.call('HGET', job, 'status') == 'scheduled' then
    local front = redis.call('HGET', job, 'enqueue_at_front') == '1'
    if redis.call('HGET', job, 'enqueue_at_front_on_retry') == '1' and redis.call('HSTRLEN', job, 'ended_at') > 0 then
      front = true
    end
    redis.call('HSET', job, 'status', 'queued', 'enqueued_at', ARGV[4], 'origin', ARGV[5])
    redis.call(front and 'LPUSH' or 'RPUSH', KEYS[2], id)
  end
end
return #due
"""


def enqueue_due(connection: Redis, queues: Iterable[Queue], now_s: float) -> int:
    """Move all jobs that are due by the server's clock to their queues; return how many. Two workers never move one."""
    with connection.pipeline(transaction=False) as pipe:
        for queue in queues:
            registry = queue.scheduled_job_registry
            lock = cast(str, cast(Any, RQScheduler).get_locking_key(queue.name))
            words = (int(now_s), MOST, Job.redis_job_namespace_prefix, utcformat(now()), queue.name)
            pipe.eval(_SCRIPT, 3, registry.key, queue.key, lock, *words)
        return sum(pipe.execute())
