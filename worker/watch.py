"""What a worker makes of its scout's diary: is it late with a job, which one did it die of, is its tokenizer to blame.

Knows no Redis and no process: it is told the time and how the scout ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from common.errors import InternalError, ModelNotLoaded
from worker.diary import Diary

LATE_S: Final = 300.0
"""For one job, pictures and megabytes of text included, on the slowest machine; what takes longer hangs."""
MOST_CULPRITS: Final = 3
"""Different jobs of which scouts may die in a row, without one that could be prepared between, before we give up."""
TRYING: Final = "0"
"""What the diary says while tokenizer and template are tried, before any job."""

Clock = Callable[[], float]


def entry(num_prepared: int, queue: int, job_id: str) -> str:
    """Return what the diary says while a job is prepared, after so many others by the same process."""
    return f"{num_prepared} {queue} {job_id}"


class Watch:
    """The diaries of one scout after another, as its worker reads them."""

    def __init__(self, diary: Diary, model: str, clock: Clock = time.monotonic) -> None:
        """`model` is named in errors; `clock` counts seconds."""
        self._diary, self._model, self._clock = diary, model, clock
        self._line, self._since = "", 0.0
        self._culprits: list[str] = []

    def late(self) -> bool:
        """Whether the scout has been at one job for too long. Asked often; says so once per `LATE_S`."""
        line, now = self._diary.read(), self._clock()
        if not line or line != self._line:
            self._line, self._since = line, now
        late = now - self._since > LATE_S
        if late:
            self._since = now
        return late

    def culprit(self, status: int) -> tuple[int, str]:
        """Return the number of the queue and the id of the job of which the scout died with this exit status.

        Raises:
            ModelNotLoaded: the tokenizer has ended every process that tried it, so no job is to blame.
            InternalError: it was at no job.
        """
        line = self._diary.read()
        self._diary.write("")
        if line == TRYING:
            raise ModelNotLoaded(
                f"the tokenizer or the chat template of {self._model} ended its process over a single word, exit "
                f"status {status}; its traceback is above: download the model again, or take another one"
            )
        if not line:
            raise InternalError(f"the process that reads the queues ended, exit status {status}; see its log")
        num_prepared, queue, job_id = line.split(" ", 2)
        if int(num_prepared):
            self._culprits.clear()
        if job_id not in self._culprits:
            self._culprits.append(job_id)
        if len(self._culprits) == MOST_CULPRITS:
            raise ModelNotLoaded(
                f"the tokenizer or the chat template of {self._model} ended its process over {MOST_CULPRITS} different "
                f"jobs in a row, exit status {status}; tracebacks are above. No job could be prepared between, so they "
                "stay in Redis: download the model again, or take another one; if these jobs alone are at fault, "
                f"`radixq cancel` them: {', '.join(map(ascii, self._culprits))}"
            )
        return int(queue), job_id
