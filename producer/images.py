"""Open, bound, normalise and hash a picture for the wire. Knows no Redis and no job.

Whatever was given becomes upright RGB pixels, written as a PNG without any metadata; the digest is over the pixels, so
two files of one picture are one. Transparent parts lie on white; 16 bits per channel become 8, by the upper byte; of
an animation the first frame is taken; colour profiles are ignored.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote_to_bytes

from PIL import GifImagePlugin, Image, ImageFile, ImageOps, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from common import pictures
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


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture as it lies in Redis."""

    digest: str
    png: bytes = field(repr=False)

    @property
    def url(self) -> str:
        """What a job says in its place."""
        return f"sha256:{self.digest}"


class Album:
    """The pictures of one call of `submit` or `submit_many`; each is decoded, encoded and held once."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._by_url: dict[str, Picture] = {}
        self._by_file: dict[bytes, Picture] = {}  # digest of the bytes
        self._by_pixels: dict[str, Picture] = {}

    def replace(self, fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Picture]]:
        """Return a copy of submit's arguments with `sha256:` URLs for pictures, and those pictures by their digest.

        What is no picture part stays as it is, whether it is right or not.

        Raises:
            ImageUnreadable, ImageTooLarge: the message begins with the part, `messages[0].content[1]` or `images[0]`.
            InvalidRequest, Unsupported: the same for what is not the kind of thing that can be a picture.
        """
        found: dict[str, Picture] = {}
        fields = dict(fields)
        images = fields.get("images")
        if isinstance(images, (list, tuple)):
            fields["images"] = [
                self._url(source, f"images[{at}]", "images", found) for at, source in enumerate(images)
            ]
        messages = fields.get("messages")
        if isinstance(messages, (list, tuple)):
            fields["messages"] = [
                self._message(message, f"messages[{at}]", found) for at, message in enumerate(messages)
            ]
        return fields, found

    def _message(self, message: Any, place: str, found: dict[str, Picture]) -> Any:
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, (list, tuple)):
            return message
        return {**message, "content": [self._part(part, f"{place}.content[{at}]", found) for at, part in enumerate(content)]}

    def _part(self, part: Any, place: str, found: dict[str, Picture]) -> Any:
        image = part.get("image_url") if isinstance(part, Mapping) and part.get("type") == "image_url" else None
        if not isinstance(image, Mapping) or image.get("url") in (None, ""):
            return part
        return {**part, "image_url": {**image, "url": self._url(image["url"], place, "messages", found)}}

    def _url(self, source: Source, place: str, name: str, found: dict[str, Picture]) -> str:
        try:
            picture = self._picture(source)
        except InvalidRequest as error:
            error.args, error.field = (f"{place}: {error}",), name
            raise
        found[picture.digest] = picture
        return picture.url

    def _picture(self, source: Source) -> Picture:
        if isinstance(source, str):
            if source not in self._by_url:
                self._by_url[source] = self._of_file(read(source, self._settings))
            return self._by_url[source]
        return self._of_pixels(source) if isinstance(source, Image.Image) else self._of_file(read(source, self._settings))

    def _of_file(self, data: bytes) -> Picture:
        name = hashlib.sha256(data).digest()
        if name not in self._by_file:
            self._by_file[name] = self._of_pixels(open_file(data))
        return self._by_file[name]

    def _of_pixels(self, image: Image.Image) -> Picture:
        rgb = normalise(image, self._settings.max_image_pixels)
        digest = pictures.digest(*rgb.size, rgb.tobytes())
        if digest not in self._by_pixels:
            self._by_pixels[digest] = Picture(digest, _png(rgb))
        return self._by_pixels[digest]


# -- from what was given to a file's bytes -----------------------------------------------------------------------------


def read(source: Source, settings: Settings) -> bytes:
    """Return the bytes of a picture's file.

    A string is a URL and never a path: messages may come from elsewhere, and must not name files of this machine.
    """
    limit = settings.max_image_bytes
    if isinstance(source, str):
        data = _read_url(source, settings)
    elif isinstance(source, os.PathLike):
        data = _read_file(Path(source), limit)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
    else:
        raise InvalidRequest(
            f"a {type(source).__name__} is no picture; give a data: URL, bytes, a pathlib.Path or a PIL.Image.Image"
        )
    if len(data) > limit:
        raise download.too_many_bytes(len(data), limit)
    return data


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
    if not comma:
        raise ImageUnreadable("the data: URL has no comma, and so no data")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(payload)
    if len(payload) * 3 // 4 > limit + 3:
        raise download.too_many_bytes(len(payload) * 3 // 4, limit)
    try:
        return base64.b64decode(unquote_to_bytes(payload), validate=True)
    except binascii.Error as error:
        raise ImageUnreadable(f"the data: URL is not base64: {str(error).lower()}") from error


def _read_file(path: Path, limit: int) -> bytes:
    try:
        about = path.stat()
        if not S_ISREG(about.st_mode):
            raise ImageUnreadable(f"{str(path)!r} is not a file")
        if about.st_size > limit:
            raise download.too_many_bytes(about.st_size, limit)
        with path.open("rb") as file:
            return file.read(limit + 1)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise ImageUnreadable(f"{str(path)!r} cannot be read: {getattr(error, 'strerror', None) or error}") from error


# -- from bytes to pixels ----------------------------------------------------------------------------------------------


def open_file(data: bytes) -> Image.Image:
    """Return the picture, not decoded yet: its size and mode are from the header.

    What it is, its first bytes say; names and media types are ignored. Pillow's own `open` would look at everything
    that the process has registered, and warn about large pictures before we could refuse them.
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
    try:
        rgb = _to_rgb(ImageOps.exif_transpose(image))
    except _DAMAGED as error:
        raise ImageUnreadable(f"the {image.format or 'picture'} is damaged: {_reason(error)}") from error
    rgb.info.clear()
    return rgb


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its pixels are floating point numbers, whose range nobody knows; convert it to RGB")
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


def _png(rgb: Image.Image) -> bytes:
    file = io.BytesIO()
    rgb.save(file, "PNG")
    return file.getvalue()


def _opener(data: bytes) -> tuple[str, Callable[[io.BytesIO], ImageFile.ImageFile]]:
    for kind, begins, opener in _KINDS:
        if begins(data):
            return kind, opener
    if data[4:8] == b"ftyp" and data[8:12] in _HEIC:
        return "HEIC", _heic()
    raise ImageUnreadable(
        "the file is empty" if not data else "not a picture of a known kind; known are PNG, JPEG, WebP, GIF and HEIC"
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
