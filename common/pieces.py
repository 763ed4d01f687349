"""Cut a list into pieces that are sent one at a time. Knows nothing of what is in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def pieces(items: Iterable[T], num_bytes: Callable[[T], int], most_bytes: int, most: int) -> Iterator[list[T]]:
    """Yield the items in order, at most `most` and `most_bytes` together; a larger item is a piece of its own."""
    piece: list[T] = []
    held = 0
    for item in items:
        size = num_bytes(item)
        if piece and (len(piece) == most or held + size > most_bytes):
            yield piece
            piece, held = [], 0
        piece.append(item)
        held += size
    if piece:
        yield piece
