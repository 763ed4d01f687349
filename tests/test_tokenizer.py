"""Text of growing answers: whole characters at every boundary, and stop strings however tokens split them."""

from __future__ import annotations

import codecs
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE, WordPiece
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.models import EOS, tiny_tokenizer
from worker.tokenizer import Detokenizer, StopMatcher

BYTE_LEVEL = tiny_tokenizer()
TEXTS = [
    "plain words, and the end",
    "  leading and  double  spaces \n\n\t end ",
    "🙂👩‍👩‍👧🇫🇷 emoji, joined and flags 👍🏽",
    "東京は日本の首都です。中文字符，한국어",
    "e\u0301 a\u0308 o\u0302\u0323 combining, ﷽ and \U0001f468\u200d\U0001f680",
    "the replacement character \ufffd itself",
]


def _ids_of_bytes() -> list[int]:
    """Find BYTE_LEVEL's token for each byte by the alphabet that transformers publishes."""
    letters = bytes_to_unicode()
    return [BYTE_LEVEL.convert_tokens_to_ids(letters[byte]) for byte in range(256)]


_IDS_OF_BYTES = _ids_of_bytes()


def byte_ids(data: bytes) -> list[int]:
    """Spell bytes in single-byte tokens."""
    return [_IDS_OF_BYTES[byte] for byte in data]


def streamed(tokenizer: Any, ids: Sequence[int]) -> str:
    stream = Detokenizer(tokenizer)
    return "".join([stream.add(token) for token in ids]) + stream.finish()


def sentencepiece_like(*, strip: bool) -> TokenizerWrapper:
    """Build a tokenizer that decodes as Llama 2's (strip) or Gemma's (no strip) does."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁the",
        "the",
        "a",
        "▁a",
        "é",
        "。",
    ]
    tokenizer = Tokenizer(
        BPE({piece: at for at, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    tokenizer.add_tokens([AddedToken(piece, special=True) for piece in pieces[:3]])
    return TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>"))


@pytest.mark.parametrize("text", TEXTS)
def test_the_text_comes_back_whole_and_every_boundary_shows_whole_characters(text: str) -> None:
    for ids in (BYTE_LEVEL.encode(text), byte_ids(text.encode())):
        stream, shown = Detokenizer(BYTE_LEVEL), ""
        for count, token in enumerate(ids, 1):
            shown += stream.add(token)
            complete = BYTE_LEVEL.decode(ids[:count])
            assert text.startswith(shown)
            assert shown == complete or complete.startswith(shown + "\ufffd")
        assert shown == text
        assert stream.finish() == ""


@pytest.mark.parametrize("text", TEXTS)
def test_an_answer_cut_inside_a_character_ends_before_it(text: str) -> None:
    data = text.encode()
    for length in range(len(data)):
        assert streamed(BYTE_LEVEL, byte_ids(data[:length])) == data[:length].decode(errors="ignore")


@given(st.lists(st.integers(0, 309), max_size=60))
def test_random_tokens_give_the_text_of_decode_but_for_a_last_character_cut_off(ids: list[int]) -> None:
    text, whole = streamed(BYTE_LEVEL, ids), BYTE_LEVEL.decode(ids, skip_special_tokens=True)
    assert whole.startswith(text)
    assert whole[len(text) :] in ("", "\ufffd", "\ufffd\ufffd")  # two where it begins as half of a surrogate pair


@given(st.binary(max_size=40))
def test_random_bytes_give_the_text_of_decode_but_for_a_last_character_cut_off(data: bytes) -> None:
    text, whole = streamed(BYTE_LEVEL, byte_ids(data)), data.decode(errors="replace")
    assert text == codecs.getincrementaldecoder("utf-8")(errors="replace").decode(data)  # without its last character
    assert whole.startswith(text)
    assert set(whole[len(text) :]) <= {"\ufffd"}


def test_special_tokens_are_skipped_and_other_added_tokens_shown() -> None:
    ids = BYTE_LEVEL.encode("<|im_start|>a<note> b<|im_end|>")
    assert EOS in ids
    assert streamed(BYTE_LEVEL, ids) == "a<note> b"


@pytest.mark.parametrize("strip", [True, False])
def test_sentencepiece_text_is_that_of_decode(strip: bool) -> None:
    tokenizer, rng = sentencepiece_like(strip=strip), random.Random(7)
    for _ in range(300):
        ids = rng.choices(range(len(tokenizer)), k=rng.randrange(20))
        emoji = [3 + byte for byte in "🙂".encode()]
        ids = [*ids, *emoji[: rng.randrange(1, 5)], *emoji, tokenizer.convert_tokens_to_ids("▁a")]
        assert streamed(tokenizer, ids) == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_sentencepiece_answer_cut_inside_a_character_ends_before_it() -> None:
    tokenizer, data = sentencepiece_like(strip=True), "é🙂".encode()
    first = tokenizer.convert_tokens_to_ids("▁the")
    for length in range(len(data)):
        text = streamed(tokenizer, [first, *(3 + byte for byte in data[:length])])
        assert text == "the" + data[:length].decode(errors="ignore")


def test_any_other_decoder_is_followed_through_a_window() -> None:
    words = ["[UNK]", "[SEP]", "un", "##believ", "##able", "news", "!"]
    tokenizer = Tokenizer(WordPiece({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.add_tokens([AddedToken("[SEP]", special=True)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, sep_token="[SEP]")
    rng = random.Random(3)
    for _ in range(50):
        ids = rng.choices(range(len(words)), k=12)
        assert streamed(wrapped, ids) == wrapped.decode(ids, skip_special_tokens=True)


def test_two_answers_at_once_do_not_mix() -> None:
    one, two = Detokenizer(BYTE_LEVEL), Detokenizer(BYTE_LEVEL)
    ids = byte_ids("é".encode())
    assert (one.add(ids[0]), two.add(ids[0]), one.add(ids[1]), two.add(ids[1])) == ("", "", "é", "é")


@given(st.text("ab\n", max_size=30), st.lists(st.text("ab\n", max_size=5), max_size=3), st.data())
def test_the_first_stop_string_cuts_the_text_wherever_tokens_split_it(text: str, stops: list[str], data: Any) -> None:
    matcher, shown = StopMatcher(stops), ""
    rest = text
    while rest and matcher.matched is None:
        size = data.draw(st.integers(1, len(rest)))
        shown, rest = shown + matcher.add(rest[:size]), rest[size:]
    shown += matcher.finish()
    expected: tuple[str, str | None] = text, None
    for end in range(1, len(text) + 1):  # letter by letter: the first that is complete, of these the longest
        complete = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            expected = text[: end - len(longest)], longest
            break
    assert (shown, matcher.matched) == expected


@given(st.text("ab", max_size=30), st.text("ab", min_size=1, max_size=5))
def test_only_text_that_may_begin_the_stop_string_is_held_back(text: str, stop: str) -> None:
    matcher, shown, read = StopMatcher([stop]), "", ""
    for letter in text:
        shown, read = shown + matcher.add(letter), read + letter
        if matcher.matched is not None:
            break
        assert read.startswith(shown)
        assert stop.startswith(read[len(shown) :])
        assert read[len(shown) :] != stop


def test_after_a_stop_nothing_more_is_shown() -> None:
    matcher = StopMatcher(["END"])
    assert [matcher.add(part) for part in ("one E", "N", "D two", " END")] == ["one ", "", "", ""]
    assert matcher.matched == "END"
    assert matcher.finish() == ""
