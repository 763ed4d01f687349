"""What is no picture, a damaged one, or too much of one is refused by its name before anything is written."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from redis import Redis

from common.errors import ImageTooLarge, ImageUnreadable, InvalidRequest, Unsupported
from producer import submit
from producer.images import normalise, open_file
from tests.image_files import data_url, file, question, scene, shown

KINDS = ["PNG", "JPEG", "GIF", "WEBP"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_cut_anywhere_is_unreadable_or_the_same_picture(kind: str) -> None:
    noise = Image.effect_noise((24, 16), 90).convert("RGB")
    data = file(noise, kind)
    whole = shown(data).tobytes()
    refused = 0
    for end in range(len(data)):
        try:
            assert shown(data[:end]).tobytes() == whole, f"cut at {end} of {len(data)} bytes"
        except ImageUnreadable:
            refused += 1
    assert refused > len(data) * 0.8  # what is missing of the others is behind the picture


def test_a_png_whose_data_break_off_is_refused_even_with_a_proper_end() -> None:
    data = file(Image.effect_noise((64, 64), 90))
    start = data.index(b"IDAT") - 4
    packed = data[start + 8 : start + 8 + int.from_bytes(data[start : start + 4], "big")][:500]
    chunk = b"IDAT" + packed
    lying = data[:start] + len(packed).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") + data[-12:]
    with pytest.raises(ImageUnreadable, match="PNG is damaged"):
        shown(lying)


UNREADABLE: list[tuple[Callable[[Path], object], str]] = [
    (lambda _: b"", "the file is empty"),
    (lambda _: "data:image/png;base64,", "the file is empty"),
    (lambda _: b"hello, I am a text", "not a picture of a known kind; send a PNG"),
    (lambda _: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture of a known kind"),
    (lambda _: b"II*\0" + bytes(100), "not a picture of a known kind"),
    (lambda _: file(scene())[:60], "PNG.* is damaged"),
    (lambda _: b"\x89PNG\r\n\x1a\n" + bytes(50), "the PNG file is damaged"),
    (lambda _: "data:image/png;base64,@@@", "not base64"),
    (lambda _: "data:image/png;base64", "no comma"),
    (lambda _: "data:image/png;base64,\ud800", "not base64"),
    (lambda _: "data:,\ud800", "no URL at all"),
    (lambda path: path / "nothing.png", "nothing.png' cannot be read: No such file"),
    (lambda path: path, "cannot be read: not a regular file"),
    (lambda _: Image.new("F", (2, 2)), "floating point"),
    (lambda _: Image.new("RGB", (0, 5)), "0 x 5 pixels shows nothing"),
]


@pytest.mark.parametrize(("source", "says"), UNREADABLE, ids=[says[:30] for _, says in UNREADABLE])
def test_what_is_no_readable_picture_is_named_and_nothing_is_written(
    source: Callable[[Path], Any], says: str, redis: Redis, tmp_path: Path
) -> None:
    with pytest.raises(ImageUnreadable, match=rf"^messages\[0\]\.content\[1\]: .*{says}") as refused:
        submit(messages=question(source(tmp_path)), redis=redis)
    assert (refused.value.code, refused.value.field) == ("image_unreadable", "messages")
    with pytest.raises(ImageUnreadable, match=rf"^images\[1\]: .*{says}"):
        submit("What?", images=[scene(), source(tmp_path)], redis=redis)
    assert redis.dbsize() == 0


def test_heic_without_its_codec_says_what_to_install(monkeypatch: pytest.MonkeyPatch, redis: Redis) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
    with pytest.raises(ImageUnreadable, match="pip install pillow-heif"):
        submit("What?", images=[b"\0\0\0\x1cftypheic" + bytes(64)], redis=redis)


def _bomb() -> bytes:
    """Return a PNG that says it has 100 megapixels, in fewer than 200 bytes; what it holds is never looked at."""
    head = (10_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    packed = (len(d).to_bytes(4, "big") + n + d + zlib.crc32(n + d).to_bytes(4, "big") for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def test_a_hundred_megapixels_are_refused_by_the_header_alone(redis: Redis) -> None:
    with pytest.raises(ImageTooLarge, match=r"100,000,000 pixels, more than the 50,000,000 of RADIXQ_MAX_IMAGE_PIXELS"):
        submit("What?", images=[_bomb()], redis=redis)
    assert redis.dbsize() == 0


def test_the_largest_picture_webp_can_declare_is_refused_by_the_header_alone() -> None:
    data = bytearray(file(Image.new("RGB", (4, 4)), "WEBP", lossless=True))
    at = data.index(b"VP8L") + 9  # 14 bits each of width and height, less one
    flags = int.from_bytes(data[at : at + 4], "little") >> 28
    data[at : at + 4] = (0x3FFE | 0x3FFE << 14 | flags << 28).to_bytes(4, "little")
    with pytest.raises(ImageTooLarge, match="pixels"):
        normalise(open_file(bytes(data)), 50_000_000)


@pytest.mark.parametrize("kind", ["GIF", "JPEG"])
def test_a_header_that_promises_too_much_is_refused(kind: str) -> None:
    with pytest.raises(ImageTooLarge, match="12 x 8 are 96 pixels, more than the 95"):
        normalise(open_file(file(scene(), kind)), 95)


@pytest.mark.parametrize("form", ["bytes", "data", "percent", "path"])
def test_too_many_bytes_are_refused_with_the_limit(
    form: str, redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RADIXQ_MAX_IMAGE_BYTES", "100")
    data = file(Image.effect_noise((32, 32), 90))
    path = tmp_path / "a.png"
    path.write_bytes(data)
    percent = "data:image/png," + "".join(f"%{byte:02x}" for byte in data)
    sources: dict[str, Any] = {"bytes": data, "data": data_url(data), "percent": percent, "path": path}
    with pytest.raises(ImageTooLarge, match=r"^images\[0\]: [\d,]+ bytes.* over the 100 of RADIXQ_MAX_IMAGE_BYTES"):
        submit("What?", images=[sources[form]], redis=redis)
    assert redis.dbsize() == 0


def test_a_string_never_names_a_file_of_this_machine(redis: Redis, tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(file(scene()))
    for name in (str(path), path.as_uri(), f"FILE://{path}"):
        with pytest.raises(InvalidRequest, match=r"^messages\[0\]\.content\[1\]: .*neither a data: nor an http"):
            submit(messages=question(name), redis=redis)
    assert redis.dbsize() == 0


def test_a_digest_is_not_taken_from_the_caller(redis: Redis) -> None:
    with pytest.raises(InvalidRequest, match="neither a data: nor"):
        submit(messages=question("sha256:" + "0" * 64), redis=redis)


@pytest.mark.parametrize("url", ["http://example.org/a.png", "HTTPS://example.org/a.png"])
def test_a_url_is_not_fetched_unless_a_setting_allows_it(url: str, redis: Redis) -> None:
    with pytest.raises(Unsupported, match=r"not fetched.*RADIXQ_IMAGE_URLS=1"):
        submit(messages=question(url), redis=redis)


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"text": "a", "images": scene()}, "images", "must be a list of pictures"),
    ({"text": "a", "images": [5]}, "images", r"images\[0\]: a int is no picture"),
    ({"prompt": "a", "images": [scene()]}, "images", "a raw prompt has none"),
    ({"messages": question(scene()), "images": [scene()]}, "images", "put them into its parts"),
    ({"messages": question(None)}, "messages", r"content\[1\]\.image_url\.url=None"),
    ({"messages": question("")}, "messages", r"content\[1\]: '' is neither"),
    ({"messages": question(scene(), detail="huge")}, "messages", r"detail='huge'"),
    ({"messages": question(scene(), size=3)}, "messages", "size is not supported"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "data:,"}]}]}, "messages", "object"),
]


@pytest.mark.parametrize(("arguments", "field", "says"), WRONG)
def test_a_wrong_argument_around_a_picture_is_refused_by_name(
    arguments: dict[str, Any], field: str, says: str, redis: Redis
) -> None:
    with pytest.raises(InvalidRequest, match=says) as refused:
        submit(redis=redis, **arguments)
    assert refused.value.field == field
    assert redis.dbsize() == 0
