"""Read, tokenise and plan the waiting jobs in a process of its own, beside RQ and the engine.

Knows no engine and takes nothing out of a queue: it offers candidates, the worker takes them. `Scout` is the worker's
end; everything below it runs in the child. The child is started by name, not by multiprocessing, which would import
the program that happens to be the parent (`rq`) a second time.

    worker                                  child
      want(n), settled(ids), idle()? ---->    LRANGE the window of every queue, HGET unseen jobs, prepare, plan
      poll() <---- candidates, idle! -----    while all queues are empty: BLMOVE q q, which wakes and moves nothing
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, Final

import redis

from common import log
from common.errors import BrokerUnavailable, ModelNotLoaded, RadixqError
from common.settings import Settings
from worker.alarm import Alarm
from worker.diary import Diary
from worker.outage import is_outage
from worker.prepare import try_out
from worker.watch import TRYING, Clock, Watch
from worker.window import Candidate, Window, connect

if TYPE_CHECKING:
    from worker.reader import LoadedTokenizer

POLL_S: Final = 0.1
"""How often queues that hold jobs are looked at for new ones; empty queues wake the child at once."""
_IDLE_S: Final = 1.0  # the same for empty queues, in case their watchers cannot connect
_BACKOFF_S: Final = 1.0
_SLICE_S: Final = 0.02  # of preparing, between two looks at the pipe
_NICE: Final = 5  # the engine's thread and RQ go first
_TOO_LONG: Final = "transformers.tokenization_utils_base"  # warns of "indexing errors" where we refuse a prompt
_NOT_OURS: Final = (signal.SIGINT, signal.SIGTERM)  # are for the worker, which closes the pipe when it ends
_ENDING_S: Final = 5.0  # for the child, before it is killed
_START: Final = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from worker.scout import main; "
    "main(*map(int, sys.argv[2:]))"
)

__all__ = ["POLL_S", "Candidate", "Scout", "main"]

_log = log.logger("worker.scout")


@dataclass(frozen=True, slots=True)
class _Task:
    settings: Settings
    queues: tuple[str, ...]
    redis_url: str
    label: str | None


@dataclass(frozen=True, slots=True)
class _Order:
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
        self._task = _Task(settings, tuple(queues), redis_url or settings.url, label)
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
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_OURS)
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
            self._send(_Order(self._next(), n))

    def settled(self, job_ids: Iterable[str]) -> None:
        """Say that offered candidates were claimed, lost or left; one that still waits in its queue is new again."""
        ids = tuple(job_ids)
        if ids:
            self._send(_Order(self._next(), self._want, ids))

    def idle(self) -> bool:
        """Whether the child has read the queues since this was first asked, and found nothing to offer.

        The first call asks, and so does the first after any `want` with another number, any `settled`, any candidate,
        and any call that returned True. Jobs that must stay (another model, a newer version) do not count.
        """
        if not self._asked:
            self._send(_Order(self._next(), self._want, check=True))
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
        self._send(_Order(self._next(), self._want))

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

    def _send(self, order: _Order) -> None:
        try:
            self._pipe.send(order)
        except OSError:  # the child is gone; `poll` says so
            _log.debug("order not sent")


# -- the child ---------------------------------------------------------------------------------------------------------


def main(fd: int, diary_fd: int) -> None:
    """Run the child until the other end of the pipe is closed, by its owner or by its death."""
    faulthandler.enable()
    for number in _NOT_OURS:
        signal.signal(number, signal.SIG_IGN)
    with Connection(fd) as pipe:
        try:
            task: _Task = pipe.recv()
            log.configure(task.settings.log)
            child = _Child(task, pipe, Diary(diary_fd))
            os.nice(_NICE)  # only now: what it has loaded must be there when the model is
            _log.info("reading the queues")
            child.run()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return
        except RadixqError as error:
            with contextlib.suppress(OSError):  # the worker may have ended for the same reason
                pipe.send(error)


class _Child:
    """The loop: orders in; ids, payloads and prompts through the window; offers out."""

    def __init__(self, task: _Task, pipe: Connection, diary: Diary) -> None:
        self._pipe = pipe
        client = connect(task.redis_url)
        loaded = _load(task.settings)
        diary.write(TRYING)
        try_out(loaded, task.settings)
        diary.write("")
        self._window = Window(task.settings, loaded, task.queues, client, task.label, diary.write)
        self._alarm = Alarm(task.redis_url, self._window)
        self._seen: list[Any] | None = None  # what the alarm brought
        self._want = 0
        self._check: int | None = None  # number of the order that asks whether there is nothing to offer
        self._look_at = 0.0  # monotonic
        self._away = False

    def run(self) -> None:
        """Go on until the pipe is closed, which raises EOFError, or Redis cannot be used."""
        while True:
            self._listen()
            try:
                self._read()
                self._window.prepare(_SLICE_S)
            except redis.RedisError as error:
                if not is_outage(error):
                    raise BrokerUnavailable(f"Redis cannot be used: {error}") from error
                self._back_off(error)
            self._window.expire()
            offers = self._window.offer(self._want)
            if offers:
                self._pipe.send(offers)

    def _listen(self) -> None:
        """Take the worker's orders; wait for one while there is nothing else to do."""
        pause = 0.0 if self._window.busy and not self._away else max(0.0, self._look_at - time.monotonic())
        watches = self._alarm.sockets
        for ready in wait([self._pipe, *watches], pause):
            if isinstance(ready, socket.socket):
                answers = self._alarm.answer(watches[ready])
                if answers is not None:
                    self._seen = answers
                    self._look_at = min(self._look_at, self._window.earliest)
            else:
                while self._pipe.poll():
                    self._obey(self._pipe.recv())

    def _obey(self, order: _Order) -> None:
        self._want = order.want
        self._check = order.number if order.check else None
        self._window.settle(order.settled)
        if order.check or order.settled:
            self._look_at = min(self._look_at, self._window.earliest)

    def _read(self) -> None:
        """Look at the queues when it is time, and fetch payloads while the window has room."""
        if time.monotonic() >= self._look_at:
            seen, self._seen = self._seen, None
            self._window.look(seen)
            self._away = False
            empty = self._window.empty
            self._look_at = max(time.monotonic() + (_IDLE_S if empty else POLL_S), self._window.earliest)
            if empty:
                self._alarm.arm()
            if self._check is not None and self._window.nothing_to_offer:
                self._pipe.send(self._check)
                self._check = None
        if not self._away:
            self._window.fetch()

    def _back_off(self, error: Exception) -> None:
        if not self._away:
            _log.warning("redis is away", extra={"reason": type(error).__name__})
        self._away = True
        self._look_at = time.monotonic() + _BACKOFF_S


def _load(settings: Settings) -> LoadedTokenizer:
    from worker.processor import Bounds  # late: the worker imports this module before MLX may be imported
    from worker.reader import load_tokenizer

    if settings.model_path is None:
        raise ModelNotLoaded("MLX_MODEL_PATH is not set: give a directory, a .gguf file or a hub id")
    logging.getLogger(_TOO_LONG).setLevel(logging.ERROR)
    return load_tokenizer(settings.model_path, pictures=Bounds.of(settings))
