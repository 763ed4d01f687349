"""Find the pictures in submit's arguments, put digests in their place, store them once. Knows no codec.

The digest is over the pixels, so two files of one picture are one. Pillow is loaded when the first picture comes.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from redis import Redis

from common import keys, pictures
from common.errors import InvalidRequest

if TYPE_CHECKING:
    from PIL import Image

    from common.settings import Settings
    from producer.images import Source

_PIECE: Final = 1024**2  # of a picture in one argument: each is given the connection's whole patience


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

    def replace(self, fields: Mapping[str, Any]) -> tuple[Mapping[str, Any], tuple[Picture, ...]]:
        """Return a copy of submit's arguments with `sha256:` URLs for pictures, and the pictures, each once.

        What is no picture part stays as it is, whether it is right or not.

        Raises:
            ImageUnreadable, ImageTooLarge: the message begins with the part, `messages[0].content[1]` or `images[0]`.
            InvalidRequest, Unsupported: the same for what is not the kind of thing that can be a picture.
        """
        found: dict[str, Picture] = {}
        fields = dict(fields)
        images = fields.get("images")
        if isinstance(images, (list, tuple)):
            fields["images"] = [self._url(source, f"images[{at}]", "images", found) for at, source in enumerate(images)]
        messages = fields.get("messages")
        if isinstance(messages, (list, tuple)):
            fields["messages"] = [
                self._message(message, f"messages[{at}]", found) for at, message in enumerate(messages)
            ]
        return fields, tuple(found.values())

    def _message(self, message: Any, place: str, found: dict[str, Picture]) -> Any:
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, (list, tuple)):
            return message
        parts = [self._part(part, f"{place}.content[{at}]", found) for at, part in enumerate(content)]
        return {**message, "content": parts}

    def _part(self, part: Any, place: str, found: dict[str, Picture]) -> Any:
        image = part.get("image_url") if isinstance(part, Mapping) and part.get("type") == "image_url" else None
        if not isinstance(image, Mapping) or image.get("url") is None:
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
        if not isinstance(source, str):  # never by identity: the frames of an animation are one object
            return self._load(source)
        if source not in self._by_url:
            self._by_url[source] = self._load(source)
        return self._by_url[source]

    def _load(self, source: Source) -> Picture:
        from producer import images  # late: a service that sends only text never loads Pillow

        given, max_pixels = images.read(source, self._settings), self._settings.max_image_pixels
        if not isinstance(given, bytes):
            return self._keep(images.normalise(given, max_pixels))
        name = hashlib.sha256(given).digest()
        if name not in self._by_file:
            self._by_file[name] = self._keep(images.normalise(images.open_file(given), max_pixels))
        return self._by_file[name]

    def _keep(self, rgb: Image.Image) -> Picture:
        digest = pictures.digest(*rgb.size, rgb.tobytes())
        if digest not in self._by_pixels:
            file = io.BytesIO()
            rgb.save(file, "PNG")
            self._by_pixels[digest] = Picture(digest, file.getvalue())
        return self._by_pixels[digest]


def store(client: Redis, needed: Mapping[str, Collection[Picture]], now_s: float) -> None:
    """Hold pictures for the jobs that are about to be put into their queues, and send those that Redis lacks.

    `needed` are the pictures by job id. Done twice, it does nothing more. A job that then is not queued after all is
    forgotten by the workers' sweep.
    """
    wanted = {picture.digest: picture for pictures_ in needed.values() for picture in pictures_}
    jobs: dict[str, list[str]] = {}
    for job_id, pictures_ in needed.items():
        for picture in pictures_:
            jobs.setdefault(picture.digest, []).append(job_id)
    with client.pipeline() as pipe:  # held first: what is there then stays there
        for digest, job_ids in jobs.items():
            pictures.hold(pipe, digest, job_ids, now_s)
        for digest in wanted:
            pipe.exists(keys.image(digest))
        there = pipe.execute()[-len(wanted) :]
    for picture, exists in zip(wanted.values(), there, strict=True):
        if not exists:
            _send(client, picture)


def _send(client: Redis, picture: Picture) -> None:
    key, png = keys.image(picture.digest), memoryview(picture.png)
    with client.pipeline() as pipe:
        pipe.set(key, b"")
        for at in range(0, len(png), _PIECE):
            pipe.append(key, png[at : at + _PIECE])
        pipe.execute()
