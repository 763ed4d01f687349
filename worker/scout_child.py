"""The scout's own process: the loop that reads the queues, prepares jobs and offers them, until its worker is gone.

Knows no engine and takes nothing out of a queue.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import socket
import time
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, Final

import redis

from common import log
from common.errors import BrokerUnavailable, ModelNotLoaded, RadixqError
from common.settings import Settings
from worker.alarm import Alarm
from worker.diary import Diary
from worker.outage import explain, is_outage
from worker.prepare import try_out
from worker.scout import NOT_OURS, POLL_S, Order, Task
from worker.watch import TRYING
from worker.window import Window, connect

if TYPE_CHECKING:
    from worker.reader import LoadedTokenizer

_IDLE_S: Final = 1.0  # between two looks at empty queues, in case their watchers cannot connect
_BACKOFF_S: Final = 1.0
_SLICE_S: Final = 0.02  # of preparing, between two looks at the pipe
_NICE: Final = 5  # the engine's thread and RQ go first
_TOO_LONG: Final = "transformers.tokenization_utils_base"  # warns of "indexing errors" where we refuse a prompt

_log = log.logger("worker.scout_child")


def main(fd: int, diary_fd: int) -> None:
    """Run the child until the other end of the pipe is closed, by its owner or by its death."""
    faulthandler.enable()
    for number in NOT_OURS:
        signal.signal(number, signal.SIG_IGN)
    with Connection(fd) as pipe:
        try:
            task: Task = pipe.recv()
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

    def __init__(self, task: Task, pipe: Connection, diary: Diary) -> None:
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

    def _obey(self, order: Order) -> None:
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

    def _back_off(self, error: redis.RedisError) -> None:
        """Wait for the server; of any other outage than this the worker itself knows, and tells."""
        if not self._away and isinstance(error, redis.exceptions.NoPermissionError):
            _log.warning("redis refuses what reading the queues takes", extra={"reason": explain(error)})
        self._away = True
        self._look_at = time.monotonic() + _BACKOFF_S


def _load(settings: Settings) -> LoadedTokenizer:
    from worker.processor import Bounds  # late: the worker imports this module before MLX may be imported
    from worker.reader import load_tokenizer

    if settings.model_path is None:
        raise ModelNotLoaded("MLX_MODEL_PATH is not set: give a directory, a .gguf file or a hub id")
    logging.getLogger(_TOO_LONG).setLevel(logging.ERROR)
    return load_tokenizer(settings.model_path, pictures=Bounds.of(settings))
