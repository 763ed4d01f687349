"""The JSON job serializer that RQ is given on both sides, and RQ's job with it. Never executes what it reads.

RQ's default is pickle, which runs code of whoever can write to Redis; RQ's own `json` serializer accepts NaN.
Pass this class as `serializer=` to `rq.Queue`, or use `rq.serializers.JSONSerializer`: the bytes agree.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

from redis import Redis
from rq.job import Job


class JobSerializer:
    """`dumps` and `loads` as RQ expects them, over UTF-8 JSON."""

    @staticmethod
    def dumps(value: Any) -> bytes:
        """Encode as UTF-8 JSON.

        Raises:
            ValueError: NaN, infinity or a lone surrogate is in the value.
            TypeError: the value has a type that JSON lacks.
        """
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()

    @staticmethod
    def loads(data: bytes) -> Any:
        """Decode JSON.

        Raises:
            ValueError: the bytes are not JSON; a pickle is named as such.
        """
        if data[:1] == b"\x80":
            raise ValueError(
                "the job was written with pickle, which radixq never reads; "
                "enqueue with serializer=rq.serializers.JSONSerializer or with producer.submit"
            )
        return json.loads(data)


class JsonJob(Job):
    """An RQ job in JSON.

    RQ itself looks at the serializer anew with every job, through a `typing.Protocol`, and on Python 3.11 that takes
    longer than to make the rest of the job.
    """

    def __init__(self, id: str | None = None, connection: Redis | None = None, serializer: Any = None) -> None:
        """As RQ's; a `serializer` is taken as it is."""
        super().__init__(id, connection)
        self.serializer = serializer or JobSerializer


def unpack(packed: bytes, max_bytes: int) -> bytes:
    """Undo RQ's compression, where there is one, as far as `max_bytes`; a payload may claim to be of any size."""
    try:
        return zlib.decompressobj().decompress(packed, max_bytes)
    except zlib.error:  # written without compression, as other languages may
        return packed[:max_bytes]
