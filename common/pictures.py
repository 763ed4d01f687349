"""Pictures in Redis: what one is called, and which jobs still need it. Knows no Redis client and no codec.

A picture is a string, stored once whoever needs it; a sorted set beside it holds the ids of its jobs, by the time at
which they were added. While there is one the picture does not expire; the last one to end sets its time to live.

    hold(ids)  ->  the job is put into its queue, waits, runs, ends  ->  release(id)
                   ... or vanishes, as by `rq empty`                 ->  sweep()
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any, Final

from common import keys
from common.messages import PICTURE

if TYPE_CHECKING:
    from redis.client import Pipeline

GRACE_S: Final = 120
"""A job that is still in none of RQ's books so long after its picture was held is taken for never submitted."""
SWEEP_S: Final = 30
_SWEEP_PICTURES: Final = 200  # in one call, each at most so often: the server answers nobody else meanwhile
_SWEEP_JOBS: Final = 200

_RELEASE: Final = """
redis.call('ZREM', KEYS[2], ARGV[1])
if redis.call('EXISTS', KEYS[2]) == 0 then
  redis.call('EXPIRE', KEYS[1], ARGV[2])
  redis.call('ZREM', KEYS[3], ARGV[3])
end
"""
# From the oldest job of each picture: as long as that one needs it, the others do not matter.
_SWEEP: Final = """
local now = tonumber(redis.call('TIME')[1])
local ended = {finished = true, failed = true, stopped = true, canceled = true}
local freed = 0
local due = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now - ARGV[5], 'LIMIT', 0, ARGV[6])
for _, digest in ipairs(due) do
  local picture = ARGV[1] .. digest
  local jobs = picture .. ':jobs'
  for _ = 1, ARGV[7] do
    local oldest = redis.call('ZRANGE', jobs, 0, 0, 'WITHSCORES')
    if not oldest[1] then break end
    local status = redis.call('HGET', ARGV[2] .. oldest[1], 'status')
    if not (ended[status] or (not status and tonumber(oldest[2]) < now - ARGV[4])) then break end
    redis.call('ZREM', jobs, oldest[1])
  end
  if redis.call('EXISTS', jobs) == 0 then
    redis.call('EXPIRE', picture, ARGV[3])
    redis.call('ZREM', KEYS[1], digest)
    freed = freed + 1
  else
    redis.call('ZADD', KEYS[1], now, digest)
  end
end
return freed
"""


def digest(width: int, height: int, rgb: bytes) -> str:
    """Return the hex digest of a picture: of its pixels, row by row, three bytes each; not of any file."""
    named = hashlib.sha256(b"RGB %dx%d\n" % (width, height))
    named.update(rgb)
    return named.hexdigest()


def named(body: object) -> tuple[str, ...]:
    """Return the digests in a job's JSON, each once, in order; of a damaged one those that can be found."""
    return tuple(dict.fromkeys(match[1] for url in _urls(body) if (match := PICTURE.fullmatch(url))))


def hold(pipe: Pipeline, digest: str, job_ids: Collection[str], now_s: float) -> None:
    """Append what keeps a picture, stored already or not, from expiring until these jobs have ended.

    `now_s` is the server's time: a job may come into its queue up to `GRACE_S` later.
    """
    pipe.zadd(keys.image_jobs(digest), dict.fromkeys(job_ids, now_s), nx=True)
    pipe.zadd(keys.IMAGES, {digest: now_s}, nx=True)
    pipe.persist(keys.image(digest))


def release(pipe: Pipeline, job_id: str, digests: Collection[str], ttl_s: int) -> None:
    """Append what lets a job's pictures expire, unless another job needs them."""
    for name in digests:
        pipe.eval(_RELEASE, 3, keys.image(name), keys.image_jobs(name), keys.IMAGES, job_id, ttl_s, name)


def sweep(client: Any, job_prefix: str, ttl_s: int) -> int:
    """Let pictures expire whose jobs have all ended or vanished without a release; return how many.

    Looks at some that were not looked at for `SWEEP_S`; called as often, by every worker. `job_prefix` begins RQ's keys
    of jobs.
    """
    arguments = (keys.image(""), job_prefix, ttl_s, GRACE_S, SWEEP_S, _SWEEP_PICTURES, _SWEEP_JOBS)
    return int(client.eval(_SWEEP, 1, keys.IMAGES, *arguments))


def _urls(body: object) -> Iterator[str]:
    """Yield the URLs of a job's picture parts, whatever the types around them are."""
    messages = body.get("messages") if isinstance(body, dict) else None
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            image = part.get("image_url") if isinstance(part, dict) else None
            url = image.get("url") if isinstance(image, dict) else None
            if isinstance(url, str):
                yield url
