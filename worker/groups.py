"""Groups of commands for one script: each runs where its guard holds, and nothing comes between the two.

One round trip and one reply, where WATCH, a look, MULTI and EXEC are two and a reply for every command. An error ends
the script, and what it wrote until then stays: the first command of a group must be one that a full server refuses, so
that it then writes nothing, and what takes a job out of its place comes last. Knows neither guards nor jobs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from redis.client import Pipeline

LUA: Final = """
local at = 0
local function take() at = at + 1; return ARGV[at] end
local function group(wanted)
  local last = tonumber(take()) + at
  while wanted and at < last do
    local size = tonumber(take())
    redis.call(unpack(ARGV, at + 1, at + size))
    at = at + size
  end
  at = last
end
"""
"""`take()` is the script's next argument; `group(wanted)` runs the commands that come next, or skips them."""


def cut(pipe: Pipeline, starts: Sequence[int]) -> list[list[Any]]:
    """Return what was appended to a pipeline, cut where each group starts, as `group` reads it; empties it."""
    commands = [words for words, _ in pipe.command_stack]
    pipe.reset()
    groups = []
    for start, end in zip(starts, [*starts[1:], len(commands)], strict=True):
        words = [word for command in commands[start:end] for word in (len(command), *command)]
        groups.append([len(words), *words])
    return groups
