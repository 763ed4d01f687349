"""The window of waiting jobs: which are known, read, planned and offered. Takes nothing out of a queue.

Lives in the scout's process. Knows no worker, no pipe and no thread.
"""

from __future__ import annotations

import heapq
import math
import time
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from rq.job import Job
from rq.queue import Queue

from common import keys
from common.errors import Expired, InvalidRequest
from common.messages import Failure
from common.settings import Settings
from worker.group import Plan, Waiting
from worker.job import EXPIRED
from worker.neighbours import Neighbourhood, ask_who
from worker.pictures import fetch
from worker.prepare import prepare, read_job, seeded, too_large
from worker.reject import is_id, to_text
from worker.sequence import Prompt
from worker.suspects import Suspicion
from worker.watch import entry

if TYPE_CHECKING:
    from redis.client import Pipeline

    from worker.reader import LoadedTokenizer

CLIENT_NAME: Final = "radixq-scout"
SOCKET_S: Final = 5.0
_LOOK_SHARE: Final = 20  # reading many ids takes at most one part in so many of the time
_FEW: Final = 64  # ids cost next to nothing to read: a job that comes alone is seen at once
_NONE: Final = np.empty(0, np.int32)
_SLICE_JOBS: Final = 64
_HEAD_BYTES: Final = 64 * 1024  # of a payload that comes with its id
_SLICE_BYTES: Final = 4 * 1024**2  # of payloads fetched at once, unless the first alone is larger

# Payloads, or the size of one over the limit ARGV[1]; fewer than asked for once they are ARGV[2] bytes together.
_FETCH: Final = """
local found, total = {}, 0
for i = 1, #KEYS do
  local size = redis.pcall('HSTRLEN', KEYS[i], 'data')
  if type(size) ~= 'number' then size = 0 end  -- not a hash: the worker says so when it looks at the job
  if size > tonumber(ARGV[1]) then
    found[i] = size
  else
    total = total + size
    if i > 1 and total > tonumber(ARGV[2]) then break end
    found[i] = size > 0 and redis.call('HGET', KEYS[i], 'data') or ''
  end
end
return found
"""

# The first job of every queue and its payload, where that is small. KEYS: queues. ARGV: where jobs are, how small.
_HEADS: Final = """
local found = {}
for _, queue in ipairs(KEYS) do
  local id = redis.call('LINDEX', queue, 0)
  local size = id and redis.pcall('HSTRLEN', ARGV[1] .. id, 'data')
  if type(size) == 'number' and size > 0 and size <= tonumber(ARGV[2]) then
    found[#found + 1] = id
    found[#found + 1] = redis.call('HGET', ARGV[1] .. id, 'data')
  end
end
return found
"""


@dataclass(frozen=True)  # no slots: a class with them takes Python code to pickle
class Candidate:
    """A waiting job that should go next: exactly one of `prompt`, `refusal` and `crash` is set.

    A refusal is claimed like any other and then failed with its code. `expires_s` is by the server's clock; the id of a
    refusal may be anything (`worker.reject.to_bytes`). `limit`: how many jobs may run at once with it, if it is
    suspected of having crashed a worker; else 0. `crash`: the exit status of a scout that died of the job.
    """

    job_id: str
    queue: str
    prompt: Prompt | None = None
    refusal: Failure | None = None
    expires_s: float = math.inf
    limit: int = 0
    crash: int | None = None


class Window:
    """What is known of the waiting jobs.

    ids seen -> `_unread` -> payloads `_raw` -> planned or refused -> `_offered` -> settled, and forgotten. Every job
    beyond `_unread` is in `_home`; one that is nowhere else must stay in its queue. A job that leaves the queues is
    forgotten, unless it is offered: then the worker says when.
    """

    def __init__(
        self,
        settings: Settings,
        loaded: LoadedTokenizer,
        queues: Sequence[str],
        client: redis.Redis,
        label: str | None = None,
        note: Callable[[str], object] = str,
    ) -> None:
        """Start with nothing known; `queues` are names, highest priority first.

        With the worker's `label` its place among others on the same server is published, and theirs heeded. `note` is
        told which job is being prepared (`watch.entry`), and when none is.
        """
        self._settings = settings
        self._loaded = loaded
        self._names = {keys.model_queue(name) for name in (loaded.name, *settings.model_aliases)}
        self._redis = client
        self._note = note
        self._fetch_script = client.register_script(_FETCH)
        self._queues = tuple(queues)
        self.queue_keys = [Queue(name, connection=client).key for name in queues]
        self._plan = Plan(1 + len(queues), seed=zlib.crc32((label or "").encode()))  # suspects go first
        self._suspects: dict[str, int] = {}  # and how many may run at once with each
        self._feared: set[str] = set()  # prepared last: of these the scout, or an engine at once, has died
        self._neighbourhood = Neighbourhood(client, label, loaded.name) if label else None
        self._home: dict[str, int] = {}
        self._unread: deque[tuple[str, int]] = deque()
        self._heads: dict[str, bytes] = {}  # payloads that came with their ids at the last look
        self._raw: deque[tuple[str, bytes]] = deque()
        self._raw_bytes = 0
        self._prompts: dict[str, Prompt] = {}  # without their tokens, which the plan has
        self._prompt_bytes = 0
        self._num_prepared = 0
        self._refused: dict[str, Failure] = {}
        self._expires: dict[str, float] = {}  # seconds since the epoch, of known jobs that do
        self._expiring: list[tuple[float, str]] = []  # a heap of the same, which may hold jobs that left
        self._ahead_s = 0.0  # the server's clock, of ours
        self._offered: set[str] = set()
        self._ends: list[Any] = []  # length, first and last id of every queue at the last look
        self._stale = True
        self.earliest = 0.0  # monotonic: no look before, so that looking costs little

    @property
    def empty(self) -> bool:
        """Whether the last look found no id at all."""
        return not any(self._ends[::3])

    @property
    def nothing_to_offer(self) -> bool:
        """Whether no known job is offered or may yet be."""
        return not (self._unread or self._raw or self._refused or self._offered or len(self._plan))

    @property
    def busy(self) -> bool:
        """Whether there is something to fetch or to prepare."""
        return bool(self._raw) or (bool(self._unread) and self._has_room())

    def ask(self, pipe: Pipeline, *, whole: bool = True) -> None:
        """Append what `look` has to know; `whole`, all that it could want of queues that were empty."""
        ask_who(pipe)
        pipe.time()
        for key in self.queue_keys:
            pipe.llen(key)
            pipe.lindex(key, 0)
            pipe.lindex(key, -1)
        if whole:  # whatever there is now is new: one round trip is enough
            self._list(pipe)
            prefix, most = Job.key_for(""), min(_HEAD_BYTES, int(self._settings.max_job_bytes))
            pipe.eval(_HEADS, len(self.queue_keys), *self.queue_keys, prefix, most)

    def look(self, replies: list[Any] | None = None) -> None:
        """Read which ids wait, if the ends of the queues say that it changed, and forget those that left.

        Tell the neighbours where this worker is, and read where they are. `replies` answer `ask` where that was asked
        already, while the queues were empty.
        """
        if self._neighbourhood is not None:
            self._neighbourhood.tell(frozenset() if self.nothing_to_offer else self._plan.trail())
        started, was_empty = time.monotonic(), self.empty
        if not (replies and was_empty):
            with self._redis.pipeline(transaction=False) as pipe:
                self.ask(pipe, whole=was_empty)
                replies = pipe.execute()
        workers, (seconds, micros), *replies = replies
        heads: list[bytes] = replies.pop() if was_empty else []
        if self._neighbourhood is not None:
            self._plan.heed(self._neighbourhood.read(workers))
        self._ahead_s = seconds + micros / 1e6 - time.time()
        ends, listed = replies[: 3 * len(self.queue_keys)], replies[3 * len(self.queue_keys) :]
        if ends == self._ends and not self._stale:
            return
        present = self._present(listed)
        self._heads = {to_text(raw_id): data for raw_id, data in zip(heads[::2], heads[1::2], strict=True)}
        self._ends, self._stale = ends, False
        self._forget([job_id for job_id in self._home if job_id not in present and job_id not in self._offered])
        unread = [(job_id, queue) for job_id, queue in present.items() if job_id not in self._home]
        self._unread = deque(sorted(unread, key=lambda one: one[0] in self._feared) if self._feared else unread)
        now = time.monotonic()
        self.earliest = now + _LOOK_SHARE * (now - started) if len(present) > _FEW else now

    def fetch(self) -> None:
        """Get payloads of the next unread jobs, in bounded slices; one that is too large stays in Redis."""
        if self._raw or not self._unread or not self._has_room():
            return
        slice_ = [self._unread[at] for at in range(min(_SLICE_JOBS, len(self._unread)))]
        limit = int(self._settings.max_job_bytes)  # hiredis, where it is installed, takes no subclass of int
        ids = [job_id for job_id, _ in slice_]
        heads, self._heads = self._heads, {}
        if all(job_id in heads and is_id(job_id) for job_id in ids):  # one job came where there was none
            found: list[bytes | int] = [heads[job_id] for job_id in ids]
        else:
            wanted = [Job.key_for(job_id) if is_id(job_id) else "" for job_id in ids]
            found = cast("list[bytes | int]", self._fetch_script(keys=wanted, args=[limit, _SLICE_BYTES]))
        for (job_id, queue), data in zip(slice_, found, strict=False):
            self._unread.popleft()
            self._home[job_id] = queue
            if isinstance(data, int):
                self._refuse(job_id, too_large(data, limit))
            else:
                self._raw.append((job_id, data))
                self._raw_bytes += len(data)

    def prepare(self, for_s: float) -> None:
        """Plan or refuse fetched jobs until the time is over; at least one. What is feared comes first in a call."""
        until, begun = time.monotonic() + for_s, False
        while self._raw:
            job_id, data = self._raw[0]
            if begun and job_id in self._feared:
                return  # let what is planned be offered before this ends the process
            begun = True
            if job_id in self._home and job_id not in self._plan:
                self._note(entry(self._num_prepared, self._home[job_id], job_id))
                try:
                    self._prepare(job_id, data)
                except redis.RedisError:
                    self._note("")
                    raise
                self._note("")
            self._raw.popleft()  # only now: pictures are fetched, and Redis may be away
            self._raw_bytes -= len(data)
            if time.monotonic() >= until:
                return

    def expire(self) -> None:
        """Refuse jobs that are still here at their `expires_at`, whosever they are and whether there is room or not."""
        now_s = time.time() + self._ahead_s
        while self._expiring and self._expiring[0][0] <= now_s:
            at, job_id = heapq.heappop(self._expiring)
            if self._expires.get(job_id) == at and job_id not in self._offered:
                self._plan.remove([job_id])
                if job_id in self._prompts:
                    self._pop_prompt(job_id)
                self._refused[job_id] = Failure(code=Expired.code, message=EXPIRED)

    def offer(self, want: int) -> list[Candidate]:
        """Return candidates so that `want` are offered and not settled; refusals need no room in the batch."""
        room = max(0, want - len(self._offered))
        refused = list(self._refused)[:_SLICE_JOBS]
        offers = [self._candidate(job_id, refusal=self._refused.pop(job_id)) for job_id in refused]
        more = bool(self._unread or self._raw) or sum(self._ends[::3]) > self._settings.window_jobs
        for choice in self._plan.next(room, more=more):
            prompt = replace(self._pop_prompt(choice.id), tokens=choice.tokens, branches=choice.branches)
            offers.append(self._candidate(choice.id, prompt))
        self._offered.update(candidate.job_id for candidate in offers)
        return offers

    def _candidate(self, job_id: str, prompt: Prompt | None = None, refusal: Failure | None = None) -> Candidate:
        expires_s = self._expires.get(job_id, math.inf) if prompt else math.inf
        limit = self._suspects.get(job_id, 0)
        return Candidate(job_id, self._queues[self._home[job_id]], prompt, refusal, expires_s, limit)

    def settle(self, job_ids: Sequence[str]) -> None:
        """Forget offered jobs; the next look finds out whether they still wait."""
        self._offered.difference_update(job_ids)
        self._forget(job_ids)
        self._stale = self._stale or bool(job_ids)

    def _list(self, pipe: Pipeline) -> None:
        """Append what `_present` reads."""
        for key in self.queue_keys:
            pipe.lrange(key, 0, self._settings.window_jobs - 1)
        pipe.hgetall(keys.SUSPECTS)  # after the ids: a job comes back together with what is held against it

    def _present(self, listed: list[Any]) -> dict[str, int]:
        """Return the ids in the window with their queues, by priority and place."""
        most = self._settings.window_jobs
        if not listed:
            with self._redis.pipeline(transaction=False) as pipe:
                self._list(pipe)
                listed = pipe.execute()
        *listed, suspects = listed
        known = {to_text(raw_id): Suspicion.parse(text) for raw_id, text in suspects.items()}
        self._suspects = {job_id: suspicion.limit for job_id, suspicion in known.items() if suspicion}
        self._feared = {job_id for job_id, suspicion in known.items() if suspicion and suspicion.at_once}
        present: dict[str, int] = {}
        for queue, ids in enumerate(listed):
            for raw_id in ids[: most - len(present)]:
                present.setdefault(to_text(raw_id), queue)
        return present

    def _prepare(self, job_id: str, data: bytes) -> None:
        try:
            if not data:
                raise InvalidRequest("the job has no data: it was deleted, or was not written by RQ")
            job = read_job(data, max_bytes=self._settings.max_job_bytes)
            if job is not None and job.expires_at is not None:
                self._expires[job_id] = job.expires_s
                heapq.heappush(self._expiring, (job.expires_s, job_id))
            if job is None or not (job.model is None or keys.model_queue(job.model) in self._names):
                return
            prompt = prepare(job, self._loaded, self._settings, self._picture)
        except InvalidRequest as error:
            self._refuse(job_id, error)
        else:
            self._num_prepared += 1
            self._prompts[job_id] = replace(prompt, tokens=_NONE, sampling=seeded(prompt.sampling, job_id))
            self._prompt_bytes += _num_bytes(prompt)
            place = 0 if job_id in self._suspects else 1 + self._home[job_id]
            self._plan.add([Waiting(job_id, prompt.tokens, place)])

    def _picture(self, digest: str) -> bytes | None:
        """Get one picture at a time, since they may be large."""
        return fetch(self._redis, [digest], max_pixels=self._settings.max_image_pixels).get(digest)

    def _refuse(self, job_id: str, error: InvalidRequest) -> None:
        self._refused[job_id] = Failure(code=error.code, message=str(error))

    def _forget(self, job_ids: Sequence[str]) -> None:
        self._plan.remove(job_ids)
        for job_id in job_ids:
            self._home.pop(job_id, None)
            if job_id in self._prompts:
                self._pop_prompt(job_id)
            self._refused.pop(job_id, None)
            self._expires.pop(job_id, None)

    def _pop_prompt(self, job_id: str) -> Prompt:
        prompt = self._prompts.pop(job_id)
        self._prompt_bytes -= _num_bytes(prompt)
        return prompt

    def _has_room(self) -> bool:
        held = self._plan.num_bytes + self._raw_bytes + self._prompt_bytes
        return held < self._settings.window_bytes or not len(self._plan)


def _num_bytes(prompt: Prompt) -> int:
    """Return the size of what a job may bring along besides its tokens."""
    return sum(map(len, prompt.sampling.stop)) + sum(picture.ids.nbytes for picture in prompt.pictures)


def connect(redis_url: str) -> redis.Redis:
    """Return a client of its own that never retries and never waits long."""
    return redis.Redis.from_url(
        redis_url,
        decode_responses=False,
        socket_timeout=SOCKET_S,
        socket_connect_timeout=SOCKET_S,
        retry=Retry(NoBackoff(), 0),
        client_name=CLIENT_NAME,
    )
