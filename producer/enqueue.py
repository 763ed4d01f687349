"""The one script that puts jobs into their queues: all of a chunk or none, once, whatever the connection does.

Knows Redis and RQ's keys; knows no request and no message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, cast

from redis import Redis
from rq import Queue
from rq.job import Job
from rq.registry import DeferredJobRegistry
from rq.utils import as_text

from common import keys

Refusal = Literal["taken", "conflict", "unknown", "full"]
SUBMISSION: Final = "submission"
"""Field of RQ's hash that names the call which wrote it: a repetition of that call finds its own work."""

# First everything is looked at, then everything is written; nothing can come in between. Per job, ARGV holds its fields
# in the order of `_arguments`. Answers {"ok", id of each job} or {refusal, index, detail}.
_SCRIPT: Final = """
local at = 4
local function take() at = at + 1; return ARGV[at] end
local function list()
  local t = {}
  for i = 1, tonumber(take()) do t[i] = take() end
  return t
end
local nonce, jobs_at, results_at, now = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local function known(id) return redis.call('EXISTS', results_at .. id, jobs_at .. id) > 0 end

local drafts, ours, repeated = {}, {}, false
while at < #ARGV do
  local d = {id = take(), queue = take(), deferred = take(), dependencies = take(), key = take(), sha = take(),
    most = take(), later = tonumber(take()), parents = list(), job = list(), result = list()}
  drafts[#drafts + 1] = d
  if redis.call('HGET', jobs_at .. d.id, 'submission') == nonce then repeated = true end
end

local counts = {}
for i, d in ipairs(drafts) do
  if d.key ~= '' then
    local owner = redis.call('GET', d.key)
    if owner and known(owner) then
      local sha = redis.call('HGET', results_at .. owner, 'request_sha')
      if sha and sha ~= d.sha then return {'conflict', i - 1, owner} end
      d.owner = owner
    end
  end
  if not d.owner and not repeated then
    if known(d.id) then return {'taken', i - 1, d.id} end
    d.met = true
    for _, parent in ipairs(d.parents) do
      local status = redis.call('HGET', jobs_at .. parent, 'status')
        or redis.call('HGET', results_at .. parent, 'status') or (ours[parent] and 'queued')
      if not status then return {'unknown', i - 1, parent} end
      if status ~= 'finished' then d.met = false end
    end
    if d.met then counts[d.queue] = (counts[d.queue] or 0) + 1 end
    ours[d.id] = true
  end
end
for i, d in ipairs(drafts) do
  if d.most ~= '' and not d.owner and not repeated then
    local length = redis.call('LLEN', d.queue)
    if length + (counts[d.queue] or 0) + d.later > tonumber(d.most) then return {'full', i - 1, length} end
  end
end

local answer = {'ok'}
for _, d in ipairs(drafts) do
  answer[#answer + 1] = d.owner or d.id
  if not d.owner and not repeated then
    local job = jobs_at .. d.id
    redis.call('SADD', KEYS[1], d.queue)
    redis.call('HSET', job, unpack(d.job))
    redis.call('HSET', results_at .. d.id, unpack(d.result))
    if d.key ~= '' then redis.call('SET', d.key, d.id) end
    if d.met then
      redis.call('RPUSH', d.queue, d.id)
    else
      redis.call('HSET', job, 'status', 'deferred')
      redis.call('ZADD', d.deferred, now, d.id)
      for _, parent in ipairs(d.parents) do
        redis.call('SADD', jobs_at .. parent .. ':dependents', d.id)
        redis.call('SADD', d.dependencies, parent)
      end
    end
  end
end
return answer
"""


@dataclass(frozen=True, slots=True)
class Draft:
    """One job as it is to lie in Redis.

    Attributes:
        job: RQ's job; its `origin` is the queue.
        result: the fields of our readable hash.
        key: idempotency key, or None.
        sha: digest of what the caller asked for.
        parents: ids of the jobs that must finish first.
        max_queue_length: most jobs that may wait in the queue once this call is written, or None.
    """

    job: Job
    result: Mapping[str, str]
    key: str | None
    sha: str
    parents: tuple[str, ...]
    max_queue_length: int | None


class Refused(NamedTuple):
    """Why nothing was written: which draft, and the id or the length in question."""

    why: Refusal
    draft: int
    detail: str | int


def enqueue(client: Redis, drafts: Sequence[Draft], nonce: str, later: Mapping[str, int]) -> list[str] | Refused:
    """Write all drafts, or none and say why. Return the ids of the jobs: of a draft's, or its idempotency key's owner.

    A second call with the same `nonce` writes nothing again, also where the first is still under way. `later` counts
    the jobs that the caller is about to add to each queue afterwards.
    """
    queues = {name: Queue(name, connection=client) for name in {draft.job.origin for draft in drafts}}
    words: list[Any] = [
        nonce,
        as_text(Job.redis_job_namespace_prefix),
        keys.result(""),
        drafts[0].job.created_at.timestamp(),
    ]
    for draft in drafts:
        words += _arguments(draft, queues[draft.job.origin], later.get(draft.job.origin, 0), nonce)
    answer = cast(list[Any], client.eval(_SCRIPT, 1, as_text(Queue.redis_queues_keys), *words))
    kind, *rest = answer
    if kind == b"ok":
        return [job_id.decode() for job_id in rest]
    index, detail = rest
    return Refused(kind.decode(), index, detail if isinstance(detail, int) else detail.decode())


def _arguments(draft: Draft, queue: Queue, later: int, nonce: str) -> list[Any]:
    deferred = DeferredJobRegistry(queue=queue).key
    hash_ = _flat({**draft.job.to_dict(), SUBMISSION: nonce})
    result = _flat(draft.result)
    most = "" if draft.max_queue_length is None else draft.max_queue_length
    return [
        draft.job.id, queue.key, deferred, as_text(draft.job.dependencies_key),
        keys.idempotency(draft.key) if draft.key else "", draft.sha, most, later,
        len(draft.parents), *draft.parents, len(hash_), *hash_, len(result), *result,
    ]  # fmt: skip


def _flat(fields: Mapping[str, Any]) -> list[Any]:
    return [part for pair in fields.items() for part in pair]
