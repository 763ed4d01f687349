"""Turn tokens into text one at a time, and watch the growing text for stop strings.

Knows no MLX, no queue and no model; a tokenizer is whatever mlx-lm loaded.

`Detokenizer` gives the text of `tokenizer.decode(tokens, skip_special_tokens=True)` piece by piece. mlx-lm's own
streaming detokenizers are not used: they keep special tokens, drop a leading space that decode keeps, and one of
them decodes a whole line again for every token.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, Protocol

_BROKEN = "\ufffd"  # what decoding shows for bytes that are no character


class Detokenizer:
    """Text of one growing answer; whole characters only, special tokens skipped, O(1) per token."""

    def __init__(self, tokenizer: Any) -> None:
        self._special, make = _decoding(tokenizer)
        self._stream = make()

    def add(self, token: int) -> str:
        """Take the next token and return the text that it completes, often a word, sometimes nothing."""
        return "" if token in self._special else self._stream.add(token)

    def finish(self) -> str:
        """Return text still held back; a last character whose bytes are not all there is dropped."""
        return self._stream.finish()


class StopMatcher:
    """Cuts a growing text at the first stop string, however tokens split it.

    First is the one that is complete first, and of those complete with the same character, the longest; so the answer
    does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(filter(None, stops))
        self._held = ""  # the end of the text so far, where it may begin a stop string
        self.matched: str | None = None

    def add(self, text: str) -> str:
        """Take new text and return what is now certain to be before any stop string; `matched` tells of a stop."""
        if self.matched is not None:
            return ""
        window = self._held + text
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := window.find(stop)) >= 0]
        if ends:
            _, at, self.matched = min(ends)
            self._held = ""
            return window[:at]
        held = max((_overlap(window, stop) for stop in self._stops), default=0)
        self._held = window[len(window) - held :]
        return window[: len(window) - held]

    def finish(self) -> str:
        """Return what was held back because it could have begun a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)


# -- how a tokenizer decodes -----------------------------------------------------------------------------------------


class _Stream(Protocol):
    def add(self, token: int) -> str: ...
    def finish(self) -> str: ...


@lru_cache(maxsize=4)
def _decoding(tokenizer: Any) -> tuple[frozenset[int], Callable[[], _Stream]]:
    """Return the ids that are never shown, and a maker of streams for this kind of tokenizer."""
    special = frozenset(index for index, token in tokenizer.added_tokens_decoder.items() if token.special)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return special, lambda: _WindowStream(tokenizer)
    layout = json.loads(backend.decoder.__getstate__())
    steps = layout.get("decoders", [layout])
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return special, lambda: _ByteLevelStream(backend.id_to_token)
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and steps[0]["pattern"] == {"String": "▁"}:
        if kinds[3:] == []:
            return special, lambda: _SentencePieceStream(backend.id_to_token, strip=0)
        if kinds[3:] == ["Strip"] and steps[3]["content"] == " " and steps[3]["stop"] == 0:
            return special, lambda: _SentencePieceStream(backend.id_to_token, strip=steps[3]["start"])
    return special, lambda: _WindowStream(tokenizer)


class _ByteLevelStream:
    """GPT-2's alphabet: every character of a token stands for one byte of UTF-8."""

    def __init__(self, id_to_token: Callable[[int], str | None]) -> None:
        self._id_to_token = id_to_token
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        letters = self._id_to_token(token) or ""  # ids beyond the vocabulary pad the model's matrix
        try:
            data = bytes(map(_BYTE_OF.__getitem__, letters))
        except KeyError:  # an added token, written as plain text
            data = letters.encode()
        return self._utf8.decode(data)

    def finish(self) -> str:
        self._utf8.reset()
        return ""


class _SentencePieceStream:
    """`▁` is a space and `<0xE2>` a byte; bytes in a row are text only if all of them together are UTF-8.

    That is why a row of byte tokens is held back until its end.
    """

    def __init__(self, id_to_token: Callable[[int], str | None], *, strip: int) -> None:
        self._id_to_token = id_to_token
        self._row = bytearray()
        self._strip = strip  # leading spaces still to be dropped

    def add(self, token: int) -> str:
        piece = self._id_to_token(token)
        if piece is None:
            return ""
        byte = _byte_of_fallback(piece)
        if byte is not None:
            self._row.append(byte)
            return ""
        row, self._row = self._row, bytearray()
        return self._stripped(_decode_row(row) + piece.replace("▁", " "))

    def finish(self) -> str:
        row, self._row = self._row, bytearray()
        return self._stripped(_decode_row(_without_cut_character(row)))

    def _stripped(self, text: str) -> str:
        while self._strip and text:
            if text[0] != " ":
                self._strip = 0
                break
            text, self._strip = text[1:], self._strip - 1
        return text


class _WindowStream:
    """Any other tokenizer: decode the last few tokens with and without the new one, and show the difference."""

    _MAX_HELD = 16  # tokens that may wait for a character to become whole, before it is given up as broken

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._shown: list[int] = []  # context: decoders treat the first token of a text differently
        self._waiting: list[int] = []

    def add(self, token: int) -> str:
        self._waiting.append(token)
        text = self._new_text()
        if text.endswith(_BROKEN) and len(self._waiting) < self._MAX_HELD:
            return ""
        self._shown, self._waiting = self._waiting, []
        return text

    def finish(self) -> str:
        text, self._waiting = self._new_text().rstrip(_BROKEN) if self._waiting else "", []
        return text

    def _new_text(self) -> str:
        def decode(ids: list[int]) -> str:
            return str(self._tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""

        return decode(self._shown + self._waiting)[len(decode(self._shown)) :]


def _gpt2_alphabet() -> dict[str, int]:
    """Map characters to bytes: printable Latin-1 stands for itself, the others follow from U+0100 in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + at): byte for at, byte in enumerate(others)}


_BYTE_OF = _gpt2_alphabet()


def _byte_of_fallback(piece: str) -> int | None:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return int(piece[3:5], 16)
        except ValueError:
            return None
    return None


def _decode_row(row: bytearray) -> str:
    try:
        return row.decode()
    except UnicodeDecodeError:
        return _BROKEN * len(row)


def _without_cut_character(row: bytearray) -> bytearray:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(row)
    pending, _ = decoder.getstate()
    return row[: len(row) - len(pending)]
