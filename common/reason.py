"""Why a job failed, where only RQ wrote it down: the last entry of its result stream, read within bounds.

Knows neither RQ's classes nor our own record.
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Final

from common.errors import InternalError, WorkerCrashed
from common.messages import Failure
from common.serializer import unpack

if TYPE_CHECKING:
    from redis import Redis

_STREAM_BYTES: Final = 64 * 1024
_TEXT_BYTES: Final = 1 << 20
_MOST_CHARS: Final = 4096
_ABANDONED: Final = ("AbandonedJobError", "work-horse terminated")  # what RQ writes when a worker died
_STRANGER: Final = ("DeserializationError", "No module named 'radixq'", "Invalid attribute name: radixq.generate")
_ADVICE: Final = (
    " (a worker that is not ours took the job: stop it, or start it with --worker-class worker.BatchWorker, then use "
    "`rq requeue`)"
)
_READ: Final = """
if redis.call('TYPE', KEYS[1]).ok ~= 'stream' then return '' end
local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
for i = 1, last and #last[2] or 0, 2 do
  if last[2][i] == 'exc_string' and #last[2][i + 1] <= tonumber(ARGV[1]) then return last[2][i + 1] end
end
return ''
"""


def of(client: Redis, stream_key: str) -> Failure:
    """Return the last line of what RQ recorded; anybody may have written there, and as much as they liked."""
    packed = client.eval(_READ, 1, stream_key, _STREAM_BYTES)
    try:
        text = unpack(base64.b64decode(str(packed, "ascii")), _TEXT_BYTES).decode(errors="replace").strip()
    except ValueError:
        text = ""
    if not text:
        return Failure(code=InternalError.code, message="RQ recorded no reason")
    last = text.splitlines()[-1][:_MOST_CHARS]
    if any(mark in text for mark in _ABANDONED):
        return Failure(code=WorkerCrashed.code, message=last)
    return Failure(code=InternalError.code, message=last + _ADVICE * any(mark in last for mark in _STRANGER))
