"""Pictures on their way to the wire: what becomes of every kind of file, what is refused before anything is sent."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageFile, ImageSequence
from redis import ConnectionPool, Redis
from redis import exceptions as redis_errors
from redis.connection import Connection

from common import keys, pictures
from common.errors import ImageTooLarge, ImageUnreadable, InvalidRequest, Unsupported
from common.messages import GenerateJob
from producer import images, submit, submit_many
from producer.images import normalise, open_file
from producer.submit import CHUNK_JOBS
from worker import pictures as stored

ROOT = Path(__file__).resolve().parent.parent
MANY = 10**6
UPRIGHT, TURNED_RIGHT = 1, 6
ORIENTATION = 0x0112


def scene(width: int = 12, height: int = 8) -> Image.Image:
    """Return a picture in which every pixel is another one: the red says the column, the green the row."""
    image = Image.new("RGB", (width, height))
    for x in range(width):
        for y in range(height):
            image.putpixel((x, y), (x * 20, y * 30, 77))
    return image


def file(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    held = io.BytesIO()
    image.save(held, kind, **options)
    return held.getvalue()


def data_url(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def shown(data: bytes) -> Image.Image:
    return normalise(open_file(data), MANY)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def argument(redis: Redis, job_id: str) -> Any:
    data: Any = redis.hget(f"rq:job:{job_id}", "data")
    return json.loads(zlib.decompress(data))[2][0]


def held(redis: Redis) -> list[str]:
    """Return the digests of the pictures in Redis."""
    names: Any = redis.keys("radixq:image:*")
    return [name.decode().rpartition(":")[2] for name in names if not name.endswith(b":jobs")]


def question(url: object, **extra: object) -> list[dict[str, Any]]:
    content = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": url, **extra}}]
    return [{"role": "user", "content": content}]


# --- what a picture becomes ------------------------------------------------------------------------------------------

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
    heif = pytest.importorskip("pillow_heif")
    held_ = io.BytesIO()
    heif.from_pillow(Image.new("RGB", (64, 32), (200, 40, 90))).save(held_)
    got = shown(held_.getvalue())
    assert (got.size, got.mode) == ((64, 32), "RGB")


# --- what is refused -------------------------------------------------------------------------------------------------

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


# --- the job ---------------------------------------------------------------------------------------------------------


def test_a_job_names_its_pictures_by_digest_and_its_description_counts_them(redis: Redis) -> None:
    other = Image.new("RGB", (5, 5), "red")
    ticket = submit("Which?", system="Be brief.", images=[scene(), other, scene()], redis=redis)
    first, second = (f"sha256:{pictures.digest(*image.size, image.tobytes())}" for image in (scene(), other))
    job = argument(redis, ticket.id)
    assert job["v"] == 1
    assert [part.get("image_url", part.get("text")) for part in job["messages"][1]["content"]] == [
        {"url": first}, {"url": second}, {"url": first}, "Which?",
    ]  # fmt: skip
    assert redis.hget(f"rq:job:{ticket.id}", "description") == b"chat, 15 characters, 3 images"
    assert GenerateJob.model_validate(job).digests == tuple(url.partition(":")[2] for url in (first, second, first))
    assert pictures.named(job) == tuple(url.partition(":")[2] for url in (first, second))


def test_messages_keep_their_order_and_detail_and_need_no_text(redis: Redis) -> None:
    ticket = submit(messages=question(scene(), detail="low"), redis=redis)
    text, image = argument(redis, ticket.id)["messages"][0]["content"]
    assert (text["text"], image["image_url"]["detail"]) == ("What?", "low")
    alone = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_url(file(scene()))}}]}]
    submit(messages=alone, redis=redis)
    with pytest.raises(InvalidRequest, match="neither text nor pictures"):
        submit(messages=[{"role": "user", "content": []}], redis=redis)


def test_a_thousand_questions_on_one_picture_send_it_once(redis: Redis) -> None:
    picture = file(Image.effect_noise((300, 300), 90))
    url = data_url(picture)
    before = _received(redis)
    submit_many(({"text": f"Question {n}?", "images": [url]} for n in range(CHUNK_JOBS)), redis=redis)
    (digest,) = held(redis)
    size = redis.strlen(keys.image(digest))
    jobs = sum(len(redis.dump(key) or b"") for key in redis.keys("rq:job:*"))
    assert size > 60_000
    assert _received(redis) - before < 2 * size + 4 * jobs
    submit("One more?", images=[picture], redis=redis)  # in a call of its own
    sent = _received(redis)
    submit("And one more?", images=[picture], redis=redis)
    assert _received(redis) - sent < size / 2
    assert redis.zcard(keys.image_jobs(digest)) == CHUNK_JOBS + 2


def test_one_file_is_decoded_once_in_a_call_however_it_is_given(
    redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, path, opened = file(scene()), tmp_path / "a.png", []
    path.write_bytes(data)

    def counting(given: bytes) -> ImageFile.ImageFile:
        opened.append(given)
        return open_file(given)

    monkeypatch.setattr(images, "open_file", counting)
    sources: list[Any] = [data_url(data), bytearray(data), path, data_url(data, "image/jpeg")]
    submit_many([{"text": "What?", "images": [source]} for source in sources * 20], redis=redis)
    assert opened == [data]


def _received(redis: Redis) -> int:
    return int(redis.info("stats")["total_net_input_bytes"])


def test_the_frames_of_an_animation_that_are_one_object_are_not_taken_for_one_picture(redis: Redis) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("white", "black", "red")]
    moving = Image.open(io.BytesIO(file(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)))
    submit_many(({"text": "What?", "images": [frame]} for frame in ImageSequence.Iterator(moving)), redis=redis)
    assert len(held(redis)) == 3


def test_a_file_that_changes_between_two_jobs_is_read_again(redis: Redis, tmp_path: Path) -> None:
    path = tmp_path / "frame.png"

    def jobs() -> Any:
        for colour in ("red", "blue"):
            path.write_bytes(file(Image.new("RGB", (8, 8), colour), compress_level=0))
            yield {"text": "What?", "images": [path]}

    submit_many(jobs(), redis=redis)
    assert len(held(redis)) == 2


def test_one_bad_picture_among_many_jobs_is_named_and_nothing_is_written(redis: Redis) -> None:
    jobs = [{"text": "a", "images": [scene()]}, {"text": "b", "images": [scene(), b"no"]}]
    with pytest.raises(ImageUnreadable, match=r"^jobs\[1\]: images\[1\]: not a picture"):
        submit_many(jobs, redis=redis)
    assert redis.dbsize() == 0


def test_a_picture_of_many_megabytes_arrives_whole(redis: Redis) -> None:
    picture = Image.frombytes("RGB", (1200, 1000), os.urandom(1200 * 1000 * 3))
    submit("What?", images=[picture], redis=redis)
    (digest,) = held(redis)
    png = stored.fetch(redis, [digest], max_pixels=10**7)[digest]
    assert len(png) > 3 * 1024**2
    assert stored.decode(digest, png, max_pixels=10**7).tobytes() == picture.tobytes()


class Breaking(Connection):
    """A connection that breaks once, when a transaction has been sent and not yet answered."""

    left = 0

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        super().send_packed_command(command, check_health=check_health)  # type: ignore[no-untyped-call]
        if b"EXEC" in b"".join(command):
            type(self).left -= 1
            if type(self).left == 0:
                self.disconnect()  # type: ignore[no-untyped-call]
                raise redis_errors.ConnectionError("the network is gone")


@pytest.mark.parametrize("number", [1, 2])
def test_a_connection_lost_while_a_picture_is_stored_leaves_job_and_picture(
    number: int, redis_url: str, redis: Redis
) -> None:
    client = Redis(connection_pool=ConnectionPool.from_url(redis_url, connection_class=Breaking))
    submit("connect", redis=client)
    Breaking.left = number
    ticket = submit("What?", images=[scene()], redis=client)
    assert Breaking.left < 1
    (digest,) = held(redis)
    png = stored.fetch(redis, [digest], max_pixels=MANY)[digest]
    assert stored.decode(digest, png, max_pixels=MANY).size == (12, 8)
    assert redis.zrange(keys.image_jobs(digest), 0, -1) == [ticket.id.encode()]


def test_a_service_that_sends_text_never_loads_pillow(redis_url: str) -> None:
    script = (
        "import sys\nfrom producer import submit\nsubmit('a', redis=sys.argv[1])\n"
        "assert not [name for name in sys.modules if name.partition('.')[0] == 'PIL']"
    )
    done = subprocess.run([sys.executable, "-c", script, redis_url], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_sends_files_and_shows_a_picture_by_its_size(
    redis_url: str, redis: Redis, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from producer.cli import main

    first, second = tmp_path / "a.png", tmp_path / "b.jpg"
    first.write_bytes(file(scene()))
    second.write_bytes(file(scene(20, 20), "JPEG"))
    assert main(["submit", "What?", "--image", str(first), "--image", str(second), "--redis", redis_url]) == 0
    job_id = capsys.readouterr().out.strip()
    assert len(pictures.named(argument(redis, job_id))) == 2
    digest = pictures.digest(12, 8, scene().tobytes())
    size = redis.strlen(keys.image(digest))
    assert main(["inspect", keys.image(digest), "--redis", redis_url]) == 0
    assert capsys.readouterr().out == f'"<PNG, {size:,} bytes>"\n'
    assert main(["inspect", "radixq:image*", "--redis", redis_url]) == 0
    assert len(capsys.readouterr().out) < 2_000
    assert main(["submit", "What?", "--image", str(tmp_path / "no.png"), "--redis", redis_url]) == 2
    assert "images[0]" in capsys.readouterr().err
