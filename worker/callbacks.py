"""Call the functions that jobs name and the worker's owner listed, where they can hold up nothing.

Each in a daemon thread of its own, a few at once, once per result. Knows no Redis of its own and no result.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Final

from common.log import logger
from worker.job import Ending, QueuedJob

AT_ONCE: Final = 4
MAX_WAITING: Final = 10_000
MAX_HANGING: Final = 16
"""Threads cannot be ended from outside: after so many that never came back no more are started."""
CLOSE_S: Final = 3.0
_LONGEST_S: Final = 3_600.0

_log = logger("worker.callbacks")


@dataclass(eq=False, slots=True)
class _Call:
    job: QueuedJob
    ending: Ending
    arguments: tuple[object, ...]
    until: float = 0.0  # monotonic: then it counts as hanging


class Callbacks:
    """The calls of one worker. All methods return at once but `close`, which waits a few seconds.

    A callback runs after its result is in Redis. It may raise, hang for ever or end its thread: that is logged, the
    result stays what it is, and other callbacks go on after the time that RQ's `Callback(timeout=)` gives it (60 s).
    """

    def __init__(self) -> None:
        self._waiting: deque[_Call] = deque()
        self._running: set[_Call] = set()
        self._hanging: set[_Call] = set()
        self._changed = threading.Condition()
        self._closed = False

    def call(self, job: QueuedJob, ending: Ending, *arguments: object) -> None:
        """Call what the job names for this ending, if it names anything that is listed, as RQ would."""
        if getattr(job, f"_{ending}_callback_name") not in job.callbacks:
            return
        with self._changed:
            if len(self._waiting) >= MAX_WAITING:
                _log.error("callback dropped, too many wait", extra={"job": job.id, "callback": ending})
            elif not self._closed:
                self._waiting.append(_Call(job, ending, arguments))
        self.tick()

    def tick(self) -> None:
        """Start what may be started, and give up what hangs; to be called now and then."""
        with self._changed:
            now = time.monotonic()
            for call in [one for one in self._running if now > one.until]:
                self._running.discard(call)
                self._hanging.add(call)
                _log.error("callback hangs, going on without", extra={"job": call.job.id, "callback": call.ending})
            while self._waiting and len(self._running) < AT_ONCE and len(self._hanging) < MAX_HANGING:
                self._start(self._waiting.popleft(), now)

    def close(self) -> None:
        """Wait a little for what runs and waits; the rest ends with the process, which no thread here holds up."""
        until = time.monotonic() + CLOSE_S
        with self._changed:
            while (self._running or self._waiting) and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            self._closed = True
            dropped = len(self._waiting) + len(self._running)
            self._waiting.clear()
        if dropped:
            _log.error("callbacks not completed", extra={"calls": dropped})

    def _start(self, call: _Call, now: float) -> None:
        seconds = getattr(call.job, f"{call.ending}_callback_timeout")
        call.until = now + (min(seconds, _LONGEST_S) if seconds > 0 else _LONGEST_S)
        self._running.add(call)
        threading.Thread(target=self._run, args=[call], name=f"callback {call.job.id}", daemon=True).start()

    def _run(self, call: _Call) -> None:
        try:
            function = call.job.callback(call.ending)
            if function is not None:
                function(call.job, call.job.connection, *call.arguments)
        except BaseException:  # noqa: BLE001  # not our code; SystemExit would pass in silence
            _log.exception("callback raised", extra={"job": call.job.id, "callback": call.ending})
        with self._changed:
            self._running.discard(call)
            self._hanging.discard(call)
            self._changed.notify_all()
            closed = self._closed
        if not closed:
            self.tick()
