"""Read pictures for jobs from Redis, within bounds, and believe none of them. Knows no model.

What lies under a digest was written by some producer: it is decoded with care, and its pixels must have that digest.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable
from typing import Final

from PIL import Image, PngImagePlugin
from redis import Redis

from common import keys, pictures
from common.errors import ImageTooLarge, ImageUnreadable
from common.pieces import pieces

SLICE_BYTES: Final = 16 * 1024**2
"""What one round trip brings at most, unless a single picture is larger."""
_HEADER: Final = struct.Struct(">8s4x4sII")  # signature, length, "IHDR", width, height
_DAMAGED: Final = (OSError, SyntaxError, ValueError, TypeError, LookupError, struct.error, zlib.error)


def sizes(connection: Redis, digests: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Return width and height of pictures, from their first bytes, in one round trip; what is not there is left out."""
    names = list(dict.fromkeys(digests))
    with connection.pipeline(transaction=False) as pipe:
        for name in names:
            pipe.getrange(keys.image(name), 0, _HEADER.size - 1)
        heads = dict(zip(names, pipe.execute(), strict=True))
    return {name: size for name, head in heads.items() if (size := _size(head)) is not None}


def fetch(connection: Redis, digests: Iterable[str], *, max_pixels: int) -> dict[str, bytes]:
    """Return pictures as they are stored, by digest, in a few round trips.

    What is not there, or is too long to be a picture of `max_pixels`, is left out. The caller bounds how many it asks
    for at once, by their `sizes`.
    """
    names = list(dict.fromkeys(digests))
    with connection.pipeline(transaction=False) as pipe:
        for name in names:
            pipe.strlen(keys.image(name))
        lengths = dict(zip(names, pipe.execute(), strict=True))
    limit = 5 * max_pixels + 4096  # PNG at its worst: nothing compressed, rows of one pixel, each with a filter byte
    found: dict[str, bytes] = {}
    wanted = [name for name, size in lengths.items() if 0 < size <= limit]
    for slice_ in pieces(wanted, lengths.__getitem__, SLICE_BYTES, len(wanted)):
        with connection.pipeline(transaction=False) as pipe:
            for name in slice_:
                pipe.get(keys.image(name))
            found.update((name, data) for name, data in zip(slice_, pipe.execute(), strict=True) if data)
    return found


def decode(digest: str, data: bytes | memoryview, *, max_pixels: int) -> Image.Image:
    """Return the RGB pixels of a stored picture.

    Raises:
        ImageTooLarge: more than `max_pixels`; found before anything is decoded.
        ImageUnreadable: no PNG, damaged, not RGB, or other pixels than the digest's.
    """
    image = _open(digest, data)
    width, height = image.size
    if width * height > max_pixels:
        raise ImageTooLarge(
            f"picture {digest[:12]} has {width:,} x {height:,} pixels, more than the {max_pixels:,} of "
            "RADIXQ_MAX_IMAGE_PIXELS on this worker"
        )
    try:
        image.load()
    except _DAMAGED as error:
        raise _no_png(digest) from error
    if image.mode != "RGB" or pictures.digest(width, height, image.tobytes()) != digest:
        raise ImageUnreadable(f"picture {digest[:12]} in Redis has other pixels than its digest says; store it again")
    return image


def missing(digest: str) -> ImageUnreadable:
    """Return the refusal of a job whose picture is not there."""
    return ImageUnreadable(
        f"picture {digest[:12]} is not in Redis: it was never stored there, or has expired; submit the job again"
    )


def _open(digest: str, data: bytes | memoryview) -> PngImagePlugin.PngImageFile:
    try:
        return PngImagePlugin.PngImageFile(io.BytesIO(data))
    except _DAMAGED as error:
        raise _no_png(digest) from error


def _no_png(digest: str) -> ImageUnreadable:
    return ImageUnreadable(f"picture {digest[:12]} in Redis is no PNG, or a damaged one")


def _size(head: bytes) -> tuple[int, int] | None:
    if len(head) < _HEADER.size:
        return None
    signature, kind, width, height = _HEADER.unpack(head)
    return (width, height) if (signature, kind) == (b"\x89PNG\r\n\x1a\n", b"IHDR") else None
