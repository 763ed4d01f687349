"""Groups of commands for one script: each runs where its guard holds, and nothing comes between the two.

One round trip and one reply, where WATCH, a look, MULTI and EXEC are two and a reply for every command. An error ends
the script, and what it wrote until then stays: the first command of a group must be one that a full server refuses, so
that it then writes nothing, and what takes a job out of its place comes last. Knows neither guards nor jobs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from common.words import texts

if TYPE_CHECKING:
    from redis.client import Pipeline

LUA: Final = """
local at = 0
local function take() at = at + 1; return ARGV[at] end
local function group(wanted)
  local commands = take()
  if not wanted then return end
  for _, words in ipairs(cjson.decode(commands)) do redis.call(unpack(words)) end
end
"""
"""`take()` is the script's next argument; `group(wanted)` runs the commands that come next, or skips them."""


def cut(pipe: Pipeline, starts: Sequence[int]) -> list[str]:
    """Return what was appended to a pipeline, cut where each group starts, as `group` reads it; empties it."""
    commands = [texts(words) for words, _ in pipe.command_stack]
    pipe.reset()
    return [
        json.dumps(commands[start:end], ensure_ascii=False)
        for start, end in zip(starts, [*starts[1:], len(commands)], strict=True)
    ]
