"""The pictures of jobs that run, in memory: each once, whoever shows it, and together within bounds. Knows no model.

A picture is there as long as a prompt has it, and the last ones a little longer, for the jobs that come next.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final
from weakref import WeakValueDictionary

from redis import Redis

from worker.pictures import fetch
from worker.recent import Recent
from worker.sequence import Picture, Prompt

LATELY_BYTES: Final = 64 << 20
MOST_BYTES: Final = 256 << 20
"""Of pictures in memory at once, unless a single job has more."""


class Shelf:
    """Pictures by digest, as they are stored. Not thread-safe; others may hold and let go of what it gave them.

    Attributes:
        held: what is in memory, here or in a prompt.
    """

    def __init__(self, max_pixels: int, most_bytes: int = MOST_BYTES, lately_bytes: int = LATELY_BYTES) -> None:
        # Views, since nothing can refer weakly to bytes.
        self.held: WeakValueDictionary[str, memoryview] = WeakValueDictionary()
        self._max_pixels, self._most_bytes, self._lately_bytes = max_pixels, most_bytes, lately_bytes
        self._lately: Recent[memoryview] = Recent(lately_bytes)

    def make_room(self, prompts: Sequence[Prompt | None]) -> bool:
        """Make room for the last of these prompts beside the others; return whether there is enough.

        Lets go of pictures that no prompt has, if need be. For one whose pictures are alone there always is.
        """
        own = prompts[-1].pictures if prompts[-1] else ()
        if not own:
            return True
        needed = {p.digest: p.nbytes for prompt in prompts if prompt for p in prompt.pictures}
        if self._nbytes_with(needed) > self._most_bytes:
            self._lately = Recent(self._lately_bytes)
        alone = (needed.keys() | self.held.keys()) <= {picture.digest for picture in own}
        return alone or self._nbytes_with(needed) <= self._most_bytes

    def fetch(self, connection: Redis, pictures: Iterable[Picture]) -> Mapping[str, memoryview]:
        """Return pictures as they are stored, by digest; one that is gone is left out."""
        wanted = {picture.digest for picture in pictures}
        found = {digest: data for digest in wanted if (data := self.held.get(digest)) is not None}
        missing = wanted - found.keys()
        if missing:
            new = fetch(connection, missing, max_pixels=self._max_pixels)
            found |= {digest: memoryview(png) for digest, png in new.items()}
        for digest, data in found.items():
            self.held[digest] = data
            if self._lately.get(digest) is None:
                self._lately.put(digest, data, data.nbytes)
        return found

    def _nbytes_with(self, needed: Mapping[str, int]) -> int:
        return sum(({digest: data.nbytes for digest, data in self.held.items()} | dict(needed)).values())
