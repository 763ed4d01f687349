"""The one script that puts jobs into their queues: all of a chunk or none, once, whatever the connection does.

Knows Redis and RQ's keys; knows no request and no message.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final, Literal, NamedTuple, cast

from redis import Redis
from rq import Queue
from rq.job import Job
from rq.registry import DeferredJobRegistry
from rq.utils import as_text

from common import keys
from common.words import texts

Refusal = Literal["taken", "conflict", "unknown", "full"]
SUBMISSION: Final = "submission"
"""Field of RQ's hash that names the call which wrote it: a repetition of that call finds its own work."""

# First everything is looked at, then everything is written; nothing can come in between. ARGV: the call as JSON, with
# one draft for each job (`_written`), and the payload of each, which may be no text. Answers {"ok", id of each job} or
# {refusal, index, detail}.
_SCRIPT: Final = """
local ask = cjson.decode(ARGV[1])
local drafts, jobs_at, results_at = ask.drafts, ask.jobs, ask.results
local function known(id) return redis.call('EXISTS', results_at .. id, jobs_at .. id) > 0 end

local ours, repeated = {}, false
for _, d in ipairs(drafts) do
  if redis.call('HGET', jobs_at .. d.id, 'submission') == ask.nonce then repeated = true end
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
    if length + (counts[d.queue] or 0) + d.later > d.most then return {'full', i - 1, length} end
  end
end

local answer = {'ok'}
for i, d in ipairs(drafts) do
  answer[#answer + 1] = d.owner or d.id
  if not d.owner and not repeated then
    local job = jobs_at .. d.id
    redis.call('SADD', KEYS[1], d.queue)
    redis.call('HSET', job, 'data', ARGV[i + 1], unpack(d.job))
    redis.call('HSET', results_at .. d.id, unpack(d.result))
    if d.key ~= '' then redis.call('SET', d.key, d.id) end
    if d.met then
      redis.call('RPUSH', d.queue, d.id)
    else
      redis.call('HSET', job, 'status', 'deferred')
      redis.call('ZADD', d.deferred, ask.at, d.id)
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
        sha: digest of what the caller asked for; empty without a key.
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
    hashes = [{**draft.job.to_dict(), SUBMISSION: nonce} for draft in drafts]
    payloads = [fields.pop("data") for fields in hashes]
    ask = {
        "nonce": nonce,
        "jobs": as_text(Job.redis_job_namespace_prefix),
        "results": keys.result(""),
        "at": repr(drafts[0].job.created_at.timestamp()),
        "drafts": [
            _written(draft, fields, queues[draft.job.origin], later.get(draft.job.origin, 0))
            for draft, fields in zip(drafts, hashes, strict=True)
        ],
    }
    words = [json.dumps(ask, ensure_ascii=False), *payloads]
    kind, *rest = cast(list[Any], client.eval(_SCRIPT, 1, as_text(Queue.redis_queues_keys), *words))
    if kind == b"ok":
        return [job_id.decode() for job_id in rest]
    index, detail = rest
    return Refused(kind.decode(), index, detail if isinstance(detail, int) else detail.decode())


def _written(draft: Draft, fields: Mapping[str, Any], queue: Queue, later: int) -> dict[str, Any]:
    """Return a draft as the script reads it; `fields` are those of RQ's hash but the payload."""
    return {
        "id": draft.job.id,
        "queue": queue.key,
        "deferred": DeferredJobRegistry(queue=queue).key,
        "dependencies": as_text(draft.job.dependencies_key),
        "key": keys.idempotency(draft.key) if draft.key else "",
        "sha": draft.sha,
        "most": "" if draft.max_queue_length is None else draft.max_queue_length,
        "later": later,
        "parents": draft.parents,
        "job": texts(chain.from_iterable(fields.items())),
        "result": list(chain.from_iterable(draft.result.items())),
    }
