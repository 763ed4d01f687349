"""Read, bound and normalise one picture. Knows no Redis and no job.

Whatever was given becomes upright RGB pixels without any metadata. Transparent parts lie on white; 16 bits per channel
become 8, by the upper byte; of an animation the first frame is taken; colour profiles are ignored.
"""

from __future__ import annotations

import base64
import io
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote_to_bytes

from PIL import GifImagePlugin, Image, ImageFile, ImageOps, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from common.errors import ImageTooLarge, ImageUnreadable, InvalidRequest, Unsupported
from producer import download

if TYPE_CHECKING:
    from common.settings import Settings

Source = str | bytes | os.PathLike[str] | Image.Image
"""A picture as the caller gives it: a `data:` or http(s) URL, a file's bytes, the path of a file, or Pillow's own."""

_HEIC: Final = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
# What Pillow raises over a damaged file, besides its own errors, which are OSErrors.
_DAMAGED: Final = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, EOFError, RuntimeError,
    struct.error, zlib.error, Warning,
)  # fmt: skip
_BOMB: Final = (Image.DecompressionBombError, Image.DecompressionBombWarning)


# -- from what was given to a file's bytes -----------------------------------------------------------------------------


def read(source: Source, settings: Settings) -> bytes | Image.Image:
    """Return the bytes of a picture's file, or the picture that Pillow has opened already.

    A string is a URL and never a path: messages may come from elsewhere, and must not name files of this machine.
    """
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, str):
        return _read_url(source, settings)
    if isinstance(source, os.PathLike):
        return _read_file(Path(source), settings.max_image_bytes)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _bounded(bytes(source), settings.max_image_bytes)
    raise InvalidRequest(
        f"a {type(source).__name__} is no picture; give a data: URL, bytes, a pathlib.Path or a PIL.Image.Image"
    )


def _read_url(url: str, settings: Settings) -> bytes:
    scheme = url[:8].partition(":")[0].lower()
    if scheme == "data":
        return _read_data(url, settings.max_image_bytes)
    if scheme in ("http", "https"):
        if not settings.image_urls:
            raise Unsupported(
                f"{url[:80]!r} is not fetched: send the picture itself, or allow this process to fetch pictures with "
                "RADIXQ_IMAGE_URLS=1"
            )
        return download.fetch(url, max_bytes=settings.max_image_bytes, within_s=settings.image_fetch_s)
    raise InvalidRequest(
        f"{url[:80]!r} is neither a data: nor an http(s) URL; name a file by a pathlib.Path, since a string may come "
        "from elsewhere"
    )


def _read_data(url: str, limit: int) -> bytes:
    head, comma, payload = url.partition(",")
    if len(payload) > 4 * limit:  # whatever way it is written
        raise download.too_many_bytes(len(payload) // 4, limit)
    if not comma:
        raise ImageUnreadable("the data: URL has no comma, and so no data")
    try:
        data = unquote_to_bytes(payload)
        if head.lower().endswith(";base64"):
            data = base64.b64decode(data, validate=True)
    except ValueError as error:
        raise ImageUnreadable(f"the data: URL is not base64, or no URL at all: {str(error).lower()}") from error
    return _bounded(data, limit)


def _read_file(path: Path, limit: int) -> bytes:
    try:
        if not S_ISREG(path.stat().st_mode):  # reading a pipe would wait
            raise IsADirectoryError(None, "not a regular file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(limit + 1) if size <= limit else b""  # it may grow meanwhile
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise ImageUnreadable(f"{str(path)!r} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if size > limit:
        raise download.too_many_bytes(size, limit)
    return _bounded(data, limit)


def _bounded(data: bytes, limit: int) -> bytes:
    if len(data) > limit:
        raise download.too_many_bytes(len(data), limit)
    return data


# -- from bytes to pixels ----------------------------------------------------------------------------------------------


def open_file(data: bytes) -> ImageFile.ImageFile:
    """Return the picture, not decoded yet: its size and mode are from the header.

    What it is, its first bytes say; names and media types are ignored. Pillow's own `open` would look at everything
    that the process has registered, and warn about large pictures before we could refuse them. What the process set as
    Pillow's `LOAD_TRUNCATED_IMAGES` holds here too.
    """
    kind, opener = _opener(data)
    try:
        return opener(io.BytesIO(data))
    except _BOMB as error:
        raise ImageTooLarge(f"the {kind} declares more pixels than Pillow opens: {error}") from error
    except _DAMAGED as error:
        raise ImageUnreadable(f"the {kind} file is damaged: {_reason(error)}") from error


def normalise(image: Image.Image, max_pixels: int) -> Image.Image:
    """Return a new RGB picture: upright, without transparency, metadata and colour profile.

    Raises:
        ImageTooLarge: more than `max_pixels`; found before anything is decoded.
        ImageUnreadable: the file breaks off or is damaged; or its mode is none of those known.
    """
    width, height = image.size
    if width * height > max_pixels:
        raise ImageTooLarge(
            f"{width:,} x {height:,} are {width * height:,} pixels, more than the {max_pixels:,} of "
            "RADIXQ_MAX_IMAGE_PIXELS; scale it down, models look at a few megapixels at most"
        )
    if not width or not height:
        raise ImageUnreadable(f"a picture of {width} x {height} pixels shows nothing")
    if image.mode == "F":
        raise ImageUnreadable("its pixels are floating point numbers, whose range nobody knows; convert it to RGB")
    try:
        rgb = _to_rgb(ImageOps.exif_transpose(image))
    except _DAMAGED as error:
        raise ImageUnreadable(f"the {image.format or 'picture'} is damaged: {_reason(error)}") from error
    rgb.info.clear()
    return rgb


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        image = _upper_bytes(image)
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        shown = image.convert("RGBA")
        image = Image.new("RGB", image.size, "white")
        image.paste(shown, mask=shown.getchannel("A"))
    return image.convert("RGB")


def _upper_bytes(image: Image.Image) -> Image.Image:
    """Return 16-bit grey as 8-bit grey: Pillow's own conversion cuts everything above 255."""
    if image.mode == "I":  # 32 bits; what decoders give so has 16
        image = image.convert("I;16")
    upper = 0 if image.mode == "I;16B" else 1
    return Image.frombytes("L", image.size, image.tobytes()[upper::2])


def _opener(data: bytes) -> tuple[str, Callable[[io.BytesIO], ImageFile.ImageFile]]:
    for kind, begins, opener in _KINDS:
        if begins(data):
            return kind, opener
    if data[4:8] == b"ftyp" and data[8:12] in _HEIC:
        return "HEIC", _heic()
    raise ImageUnreadable(
        "not a picture of a known kind; send a PNG, JPEG, WebP, GIF or HEIC" if data else "the file is empty"
    )


_KINDS: Final[Sequence[tuple[str, Callable[[bytes], bool], Callable[[io.BytesIO], ImageFile.ImageFile]]]] = (
    ("PNG", lambda data: data.startswith(b"\x89PNG\r\n\x1a\n"), PngImagePlugin.PngImageFile),
    ("JPEG", lambda data: data.startswith(b"\xff\xd8\xff"), JpegImagePlugin.JpegImageFile),
    ("GIF", lambda data: data.startswith((b"GIF87a", b"GIF89a")), GifImagePlugin.GifImageFile),
    ("WebP", lambda data: data[:4] == b"RIFF" and data[8:12] == b"WEBP", WebPImagePlugin.WebPImageFile),
)


def _heic() -> Callable[[io.BytesIO], ImageFile.ImageFile]:
    try:
        from pillow_heif import HeifImageFile
    except ImportError as error:
        raise ImageUnreadable("HEIC needs a codec: pip install pillow-heif, or send a JPEG") from error
    opener: Callable[[io.BytesIO], ImageFile.ImageFile] = HeifImageFile
    return opener


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
