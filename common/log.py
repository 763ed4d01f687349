"""Logger names and the two forms of a log line. Configures nothing on import."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Literal

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def logger(room: str) -> logging.Logger:
    """Return the logger `radixq.<room>`, for example `logger("worker.drain")`."""
    return logging.getLogger(f"radixq.{room}")


class LineFormatter(logging.Formatter):
    """`2026-11-22 14:03:05.123 INFO worker.drain claimed jobs=3`, or the same as one JSON object.

    Fields come from `extra=`; a message is a few fixed words. A line of text has the local time, like RQ's lines around
    it; JSON has UTC.
    """

    def __init__(self, *, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, with a traceback after it where there is one."""
        fields = {name: value for name, value in vars(record).items() if name not in _STANDARD}
        at = datetime.fromtimestamp(record.created, UTC)
        room = record.name.removeprefix("radixq.")
        trace = self.formatException(record.exc_info) if record.exc_info else None
        if self._as_json:
            line = {"at": at.isoformat(timespec="milliseconds"), "level": record.levelname, "room": room}
            line |= {"event": record.getMessage(), **fields} | ({"trace": trace} if trace else {})
            return json.dumps(line, default=str, ensure_ascii=False)
        words = " ".join(f"{name}={value}" for name, value in fields.items())
        here = at.astimezone().replace(tzinfo=None).isoformat(" ", timespec="milliseconds")
        head = f"{here} {record.levelname} {room} {record.getMessage()}"
        return " ".join(filter(None, (head, words))) + (f"\n{trace}" if trace else "")


def configure(style: Literal["text", "json"], level: str = "INFO") -> None:
    """Send the `radixq` loggers to stderr in one of the two forms. Called once, by a worker process."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter(as_json=style == "json"))
    root = logging.getLogger("radixq")
    root.handlers[:] = [handler]
    root.setLevel(level)
    root.propagate = False
