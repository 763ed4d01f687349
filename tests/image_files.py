"""Pictures and files for the tests of the producer's side, and what a job says of them."""

from __future__ import annotations

import base64
import io
import json
import zlib
from pathlib import Path
from typing import Any

from PIL import Image
from redis import Redis

from producer.images import normalise, open_file

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
