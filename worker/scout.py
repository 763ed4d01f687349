"""Read, tokenise and plan the waiting jobs in a process of its own, beside RQ and the engine.

Knows no engine and takes nothing out of a queue: it offers candidates, the worker takes them. `Scout` is the worker's
end; the other is `scout_child`. The child is started by name, not by multiprocessing, which would import
the program that happens to be the parent (`rq`) a second time.

    worker                                  child
      want(n), settled(ids), idle()? ---->    LRANGE the window of every queue, HGET unseen jobs, prepare, plan
      poll() <---- candidates, idle! -----    while all queues are empty: BLMOVE q q, which wakes and moves nothing
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from typing import Final

from common import log
from common.errors import RadixqError
from common.settings import Settings
from worker.diary import Diary
from worker.watch import Clock, Watch
from worker.window import Candidate

POLL_S: Final = 0.1
"""How often queues that hold jobs are looked at for new ones; empty queues wake the child at once."""
NOT_OURS: Final = (signal.SIGINT, signal.SIGTERM)  # are for the worker, which closes the pipe when it ends
_ENDING_S: Final = 5.0  # for the child, before it is killed
_START: Final = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from worker.scout_child import main; "
    "main(*map(int, sys.argv[2:]))"
)

__all__ = ["NOT_OURS", "POLL_S", "Candidate", "Order", "Scout", "Task"]

_log = log.logger("worker.scout")


@dataclass(frozen=True, slots=True)
class Task:
    """What the child is told before any order."""

    settings: Settings
    queues: tuple[str, ...]
    redis_url: str
    label: str | None


@dataclass(frozen=True, slots=True)
class Order:
    """What the worker asks for; `number` counts its orders."""

    number: int
    want: int
    settled: tuple[str, ...] = ()
    check: bool = False


class Scout:
    """The worker's end. No method blocks but `close`."""

    def __init__(
        self,
        settings: Settings,
        queues: Sequence[str],
        *,
        redis_url: str | None = None,
        label: str | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        """Take the queues' names, highest priority first; nothing is started.

        With the worker's `label` it shares the queues with other workers by subtrees. `clock` tells when it hangs.
        """
        self._task = Task(settings, tuple(queues), redis_url or settings.url, label)
        self._pipe, self._childs_end = Pipe()
        self._diary = Diary()
        self._watch = Watch(self._diary, settings.model_path or "", clock)
        self._process: subprocess.Popen[bytes] | None = None
        self._number = self._want = 0
        self._asked = self._proven = False

    def start(self) -> None:
        """Start the process; it loads the tokenizer and then reads the queues."""
        fds = self._childs_end.fileno(), self._diary.fileno()
        # Ctrl-C goes to the whole process group and is for the worker; the child inherits the mask and then ignores it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, NOT_OURS)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _START, json.dumps(sys.path), *map(str, fds)],
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._childs_end.close()
        self._pipe.send(self._task)

    @property
    def pid(self) -> int | None:
        """The child's process id, once started."""
        return self._process.pid if self._process else None

    def fileno(self) -> int:
        """Return a descriptor that is readable while `poll` has something to return or to raise."""
        return self._pipe.fileno()

    def want(self, n: int) -> None:
        """Say how many candidates may be offered and not settled at a time; 0 stops offers."""
        if n != self._want:
            self._want = n
            self._send(Order(self._next(), n))

    def settled(self, job_ids: Iterable[str]) -> None:
        """Say that offered candidates were claimed, lost or left; one that still waits in its queue is new again."""
        ids = tuple(job_ids)
        if ids:
            self._send(Order(self._next(), self._want, ids))

    def idle(self) -> bool:
        """Whether the child has read the queues since this was first asked, and found nothing to offer.

        The first call asks, and so does the first after any `want` with another number, any `settled`, any candidate,
        and any call that returned True. Jobs that must stay (another model, a newer version) do not count.
        """
        if not self._asked:
            self._send(Order(self._next(), self._want, check=True))
            self._asked = True
        proven = self._proven
        if proven:
            self._asked = self._proven = False
        return proven

    def poll(self) -> list[Candidate]:
        """Return the candidates offered since the last call, best first.

        A process that dies of a job, or is ended because it hangs, is started again, and that job offered as what
        crashed it: prepared once more, it may do it again.

        Raises:
            ModelNotLoaded: the child could not load the tokenizer, or died of whatever was given to it.
            BrokerUnavailable: what lies in Redis cannot be read; a server that is away, or refuses us, is waited for.
            InternalError: the child ended by a defect or was killed.
        """
        offered: list[Candidate] = []
        self._end_if_late()
        try:
            while self._pipe.poll():
                message: list[Candidate] | int | RadixqError = self._pipe.recv()
                if isinstance(message, RadixqError):
                    raise message
                if isinstance(message, int):
                    self._proven = self._asked and message == self._number
                else:
                    self._asked = self._proven = False
                    offered += message
        except (EOFError, OSError) as error:
            offered.append(self._culprit(error))
            self._start_again()
        return offered

    def close(self) -> None:
        """End the child and wait for it. Offered candidates need not be settled."""
        self._pipe.close()
        self._childs_end.close()
        self._diary.close()
        if self._process is not None:
            self._status()

    def _end_if_late(self) -> None:
        if self._process is not None and self._watch.late():
            _log.error("the process that reads the queues hangs, ending it; its traceback says where")
            self._process.send_signal(signal.SIGABRT)

    def _culprit(self, error: Exception) -> Candidate:
        """Return the job of which the child died."""
        status = self._status()
        try:
            queue, job_id = self._watch.culprit(status)
        except RadixqError as reason:
            raise reason from error
        _log.error("the process that reads the queues died of a job", extra={"job": ascii(job_id), "status": status})
        return Candidate(job_id, self._task.queues[queue], limit=1, crash=status)

    def _start_again(self) -> None:
        self._pipe.close()
        self._pipe, self._childs_end = Pipe()
        self.start()
        self._send(Order(self._next(), self._want))

    def _status(self) -> int:
        assert self._process is not None
        try:
            return self._process.wait(timeout=_ENDING_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _next(self) -> int:
        self._asked = self._proven = False
        self._number += 1
        return self._number

    def _send(self, order: Order) -> None:
        try:
            self._pipe.send(order)
        except OSError:  # the child is gone; `poll` says so
            _log.debug("order not sent")
