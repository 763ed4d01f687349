"""Wake the scout when one of its queues, all empty, gets a job. Knows no job, no plan and no worker."""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass, field
from typing import Any, Final

import redis

from worker.window import Window, connect

BLOCK_S: Final = 2  # of one BLMOVE; less than SOCKET_S


@dataclass(eq=False, slots=True)
class Watched:
    """A connection that waits for a job in one queue; `asked` are the commands whose answers have yet to come."""

    key: str
    connection: Any
    asked: list[Any] = field(default_factory=list)


class Alarm:
    """Rings when one of the queues, all empty when it was armed, gets a job.

    BLMOVE of a list's head to where it is blocks while the list is empty, and moves nothing. What a look has to know is
    asked behind it, so that it comes with the answer. The loop itself waits for that: a thread would have to wake it.
    """

    def __init__(self, redis_url: str, window: Window) -> None:
        """Watch the queues of a window; nothing is sent yet."""
        self._client: Any = connect(redis_url)
        make = self._client.connection_pool.make_connection
        self._watches = [Watched(key, make()) for key in window.queue_keys]
        self._window = window

    @property
    def sockets(self) -> dict[socket.socket, Watched]:
        """What is readable when `answer` is to be called."""
        return {watch.connection._sock: watch for watch in self._watches if watch.asked}  # redis-py has no public way

    def arm(self) -> None:
        """Watch until the next job comes; what cannot be watched the loop finds when it looks, and reports."""
        for watch in self._watches:
            if not watch.asked:
                with contextlib.suppress(redis.RedisError):
                    self._ask(watch)

    def answer(self, watch: Watched) -> list[Any] | None:
        """Return the answers for `Window.look` if there is a job; an empty list where only a look can tell."""
        asked, watch.asked = watch.asked, []
        try:
            found, *replies = [
                self._client.parse_response(watch.connection, words[0], **options) for words, options in asked
            ]
            if found is None:  # it took too long
                self._ask(watch)
        except redis.RedisError:
            watch.connection.disconnect()
            return []
        return None if found is None else replies

    def _ask(self, watch: Watched) -> None:
        with self._client.pipeline(transaction=False) as pipe:
            pipe.blmove(watch.key, watch.key, BLOCK_S, "LEFT", "LEFT")
            self._window.ask(pipe)
            asked = list(pipe.command_stack)
        connection = watch.connection
        connection.send_packed_command(connection.pack_commands([words for words, _ in asked]))
        watch.asked = asked
