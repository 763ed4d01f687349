"""Pictures on their way to a worker: whatever the file, upright RGB pixels without anything else."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pillow_heif
import pytest
from PIL import Image
from redis import Redis

from common import pictures
from producer import submit
from producer.images import normalise
from tests.image_files import MANY, ORIENTATION, TURNED_RIGHT, UPRIGHT, data_url, file, held, scene, shown, turned
from worker import pictures as stored

LOSSLESS: list[tuple[str, dict[str, Any]]] = [("PNG", {}), ("WEBP", {"lossless": True})]


@pytest.mark.parametrize(("kind", "options"), LOSSLESS)
def test_a_lossless_file_keeps_its_pixels(kind: str, options: dict[str, Any]) -> None:
    assert shown(file(scene(), kind, **options)).tobytes() == scene().tobytes()


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "GIF", "WEBP"])
def test_a_lossy_file_keeps_its_size_and_about_its_colours(kind: str) -> None:
    image = Image.new("RGB", (33, 17), (200, 40, 90))
    got = shown(file(image, kind))
    assert (got.size, got.mode) == ((33, 17), "RGB")
    pixel = got.getpixel((16, 8))
    assert isinstance(pixel, tuple)
    assert all(abs(a - b) <= 8 for a, b in zip(pixel, (200, 40, 90), strict=True))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_stands_upright_whatever_its_file_says_about_turning(kind: str) -> None:
    image = Image.new("RGB", (40, 20), "white")
    image.paste((0, 0, 0), (0, 0, 20, 20))  # black on the left
    got = shown(file(image, kind, exif=turned(TURNED_RIGHT)))
    assert got.size == (20, 40)
    top, bottom = got.getpixel((10, 5)), got.getpixel((10, 35))
    assert isinstance(top, tuple)
    assert isinstance(bottom, tuple)
    assert max(top) < 60
    assert min(bottom) > 195


def test_sixteen_bit_grey_is_scaled_and_not_cut_off() -> None:
    image = Image.new("I;16", (3, 1))
    for x, value in enumerate((0, 32768, 65535)):
        image.putpixel((x, 0), value)
    assert [shown(file(image)).getpixel((x, 0)) for x in range(3)] == [(0,) * 3, (128,) * 3, (255,) * 3]
    for mode in ("I", "I;16B"):
        wide = Image.new(mode, (1, 1), 32768)
        assert normalise(wide, MANY).getpixel((0, 0)) == (128, 128, 128)


def test_transparent_parts_lie_on_white() -> None:
    half = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    half.putpixel((1, 0), (0, 0, 0, 128))
    for image in (half, half.convert("LA")):
        assert shown(file(image)).getpixel((0, 0)) == (255, 255, 255)
        assert shown(file(image)).getpixel((1, 0)) == (127, 127, 127)
    assert shown(file(half, "WEBP", lossless=True)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_the_transparent_colour_of_a_palette_becomes_white(kind: str) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    got = shown(file(image, kind, transparency=0))
    assert [got.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (200, 100, 50)]


@pytest.mark.parametrize(("mode", "transparency"), [("L", 0), ("RGB", (0, 0, 0)), ("1", 0)])
def test_a_transparent_colour_without_a_palette_becomes_white(mode: str, transparency: Any) -> None:
    assert shown(file(Image.new(mode, (2, 2)), transparency=transparency)).getpixel((0, 0)) == (255, 255, 255)


def test_cmyk_and_one_bit_become_rgb() -> None:
    red = shown(file(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")).getpixel((4, 4))
    assert isinstance(red, tuple)
    assert red[0] > 240
    assert max(red[1:]) < 15
    assert shown(file(Image.new("1", (8, 8), 1))).getpixel((4, 4)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("white", "black", "black")]
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    moving = file(frames[0], kind, save_all=True, append_images=frames[1:], duration=40, **options)
    assert shown(moving).getpixel((4, 4)) == (255, 255, 255)


def test_two_files_of_one_picture_are_one(redis: Redis, tmp_path: Path) -> None:
    path = tmp_path / "a.webp"
    path.write_bytes(file(scene(), "WEBP", lossless=True))
    sources: list[Any] = [
        file(scene()),
        data_url(file(scene(), compress_level=0)),
        path,
        scene(),
        bytearray(file(scene())),
    ]
    submit("What?", images=sources, redis=redis)
    turned_back = scene().transpose(Image.Transpose.ROTATE_90)  # and its file says: turn it right
    submit("What?", images=[file(turned_back, exif=turned(TURNED_RIGHT))], redis=redis)
    assert held(redis) == [pictures.digest(12, 8, scene().tobytes())]


def test_pictures_that_differ_in_one_pixel_or_in_shape_alone_are_two() -> None:
    other = scene()
    other.putpixel((3, 3), (1, 2, 3))
    reshaped = Image.frombytes("RGB", (8, 12), scene().tobytes())
    digests = {pictures.digest(*image.size, image.tobytes()) for image in (scene(), other, reshaped)}
    assert len(digests) == 3


def test_nothing_but_the_pixels_is_sent(redis: Redis) -> None:
    exif = turned(UPRIGHT)
    exif[0x010E] = "taken at home"
    submit("What?", images=[file(scene(), exif=exif, icc_profile=b"profile" * 50, dpi=(300, 300))], redis=redis)
    (digest,) = held(redis)
    png = stored.fetch(redis, [digest], max_pixels=MANY)[digest]
    assert {png[at : at + 4] for at in _chunks(png)} == {b"IHDR", b"IDAT", b"IEND"}
    assert stored.decode(digest, png, max_pixels=MANY).tobytes() == scene().tobytes()


def _chunks(png: bytes) -> list[int]:
    """Return where the names of a PNG's chunks are."""
    at, found = 12, []
    while at < len(png):
        found.append(at)
        at += int.from_bytes(png[at - 4 : at], "big") + 12
    return found


def test_the_callers_own_picture_is_left_as_it_was(redis: Redis) -> None:
    image = Image.open(io.BytesIO(file(scene(), exif=turned(TURNED_RIGHT))))
    submit("What?", images=[image], redis=redis)
    assert (image.size, image.getexif()[ORIENTATION]) == ((12, 8), TURNED_RIGHT)


def test_heic_is_read_where_its_codec_is_installed() -> None:
    held_ = io.BytesIO()
    pillow_heif.from_pillow(Image.new("RGB", (64, 32), (200, 40, 90))).save(held_)
    got = shown(held_.getvalue())
    assert (got.size, got.mode) == ((64, 32), "RGB")
