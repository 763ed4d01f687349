"""Which job crashed the worker: rules by which suspects run, first in halves, then alone. Pure; knows no Redis.

When a process dies, every job that it ran is a suspect and may run again only among suspects, half as many at a time.
So one culprit among N is alone after about log2(N) more crashes, and all others have finished. A job is given up when
processes died around it alone, in the same place, `LONE` times in a row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Self

LONE_SPOKE: Final = 2
"""Crashes of a job alone, in the same place, until it is given up, where the process left its last words."""
LONE_SILENT: Final = 4
"""The same where it did not. Then it was killed: perhaps for the job's hunger for memory, perhaps by somebody."""
RECORD_TOKENS: Final = 16
"""How many tokens a job that runs alone generates between two records of how far it came."""
_NEAR_TOKENS: Final = 64  # between the record and the crash there may be more: it is written beside the engine


@dataclass(frozen=True, slots=True)
class Suspicion:
    """What is held against a job.

    Attributes:
        limit: how many may run at once while it does, itself included.
        lone: how many processes in a row died in the same place while it ran alone.
        tokens: that place: how many tokens had been generated.
    """

    limit: int
    lone: int = 0
    tokens: int = 0

    @classmethod
    def parse(cls, text: bytes | None) -> Self | None:
        """Read what `str` wrote; None where there is nothing, or nothing of ours."""
        try:
            return cls(*map(int, (text or b"").split()))
        except (TypeError, ValueError):
            return None

    @property
    def at_once(self) -> bool:
        """Whether a process died of the job, or around it alone, before its first token."""
        return self.lone > 0 and self.tokens == 0

    def __str__(self) -> str:
        return f"{self.limit} {self.lone} {self.tokens}"


def judge(before: Suspicion | None, *, together: int, tokens: int, spoke: bool) -> Suspicion | None:
    """Return what is held against a job after its process died with `together` jobs; None: give the job up.

    `tokens` is how far the job came, which counts only if it was alone; `spoke`: the process crashed by itself.
    """
    if together > 1:
        return Suspicion(limit=(together + 1) // 2)
    again = before is not None and before.lone > 0 and _near(before.tokens, tokens)
    lone = before.lone + 1 if before is not None and again else 1
    return None if lone >= (LONE_SPOKE if spoke else LONE_SILENT) else Suspicion(1, lone, tokens)


def may_join(limit: int, running: Iterable[int]) -> bool:
    """Whether a job may run beside those that run, all given by their limits; 0 stands for a job above suspicion."""
    limits = [*running, limit]
    return not any(limits) or (all(limits) and len(limits) <= min(limits))


def _near(a: int, b: int) -> bool:
    return (a > 0) == (b > 0) and abs(a - b) <= max(_NEAR_TOKENS, max(a, b) // 16)
