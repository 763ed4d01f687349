"""Read any key of Redis, whatever its type, and show it the way `redis-cli` does. Knows no job."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

from redis import Redis
from rq.utils import as_text

from common import keys

Value = bytes | int | list["Value"] | dict[bytes, "Value"]
"""A reply: text, a number, a list, or a hash."""

_READ: Final[dict[str, Callable[[Any, str], Any]]] = {
    "string": lambda client, key: _string(client, key),
    "hash": lambda client, key: client.hgetall(key),
    "list": lambda client, key: client.lrange(key, 0, -1),
    "set": lambda client, key: sorted(client.smembers(key)),
    "zset": lambda client, key: {member: _score(score) for member, score in client.zrange(key, 0, -1, withscores=True)},
    "stream": lambda client, key: [[entry, fields] for entry, fields in client.xrange(key)],
}
_PATTERN: Final = frozenset("*?[")
_PNG: Final = b"\x89PNG\r\n\x1a\n"


def find(client: Redis, key: str) -> dict[str, Value]:
    """Return what is stored under a key, under a job's id, or under all keys that match a pattern."""
    if _PATTERN & set(key):
        names = sorted(as_text(name) for name in client.scan_iter(match=key, count=1_000))
    else:
        names = [name for name in (key, keys.result(key)) if client.exists(name)][:1]
    values = {name: _value(client, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def lines(value: Value) -> Iterable[str]:
    """Return the lines that `redis-cli` prints on a terminal; readable text is left readable."""
    if isinstance(value, dict):
        value = [part for pair in value.items() for part in pair]
    if not isinstance(value, list):
        yield f"(integer) {value}" if isinstance(value, int) else f'"{_escaped(value)}"'
        return
    width = len(str(len(value)))
    for number, item in enumerate(value, 1):
        head = f"{number:>{width}}) "
        for index, line in enumerate(lines(item)):
            yield (head if index == 0 else " " * len(head)) + line


def plain(value: Value) -> Any:
    """Return the value as JSON can hold it."""
    if isinstance(value, dict):
        return {_text(field): plain(item) for field, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return _text(value) if isinstance(value, bytes) else value


def _value(client: Redis, name: str) -> Value | None:
    kind = as_text(client.type(name))
    value: Value | None = _READ[kind](client, name) if kind in _READ else f"(a {kind})".encode()
    return None if kind == "none" else value  # gone since the scan


def _string(client: Redis, key: str) -> Any:
    """Return the value, or of a picture, which nobody can read here, its size."""
    if client.getrange(key, 0, len(_PNG) - 1) == _PNG:
        return f"<PNG, {client.strlen(key):,} bytes>".encode()
    return client.get(key)


def _score(score: float) -> bytes:
    return f"{score:.17g}".encode()


def _text(value: bytes) -> str:
    return value.decode(errors="backslashreplace")


def _escaped(value: bytes) -> str:
    names = {"\n": "\\n", "\r": "\\r", "\t": "\\t", '"': '\\"', "\\": "\\\\"}
    try:
        text = value.decode()
    except UnicodeDecodeError:
        text = value.decode("latin-1")
        return "".join(names.get(c) or (c if " " <= c <= "~" else f"\\x{ord(c):02x}") for c in text)
    return "".join(names.get(char) or (char if char.isprintable() else f"\\x{ord(char):02x}") for char in text)
