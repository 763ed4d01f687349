"""The words of Redis commands as text, so that a script gets many of them as one JSON argument.

redis-py and the server handle every argument by itself, and a job's commands have hundreds. Knows no command.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def texts(words: Iterable[Any]) -> list[str]:
    """Return the words as redis-py would send them; numbers too, since Lua writes those in its own way.

    Raises:
        TypeError: one is neither text nor bytes nor a number.
        UnicodeDecodeError: one is bytes that are no UTF-8, which JSON cannot hold.
    """
    return [word if type(word) is str else _text(word) for word in words]


def _text(word: Any) -> str:
    if isinstance(word, str):
        return word
    if isinstance(word, bytes):
        return word.decode()
    if isinstance(word, int | float) and not isinstance(word, bool):
        return repr(word)
    raise TypeError(f"a command holds {word!r}: make it text, bytes or a number first")
