"""Wire types: what a producer puts into Redis and what a worker writes back. Knows no Redis and no MLX.

A job travels as one JSON object, `GenerateJob`; its answer is a `Result`. Both are frozen and have a JSON Schema
(`ops/schema/`). A job with a field that is not known is refused by its name.
"""

from __future__ import annotations

import json
import math
import re
from datetime import datetime
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, WithJsonSchema, field_validator, model_validator

WIRE_VERSION: Final = 2
"""Highest `v` this version writes and reads. A worker leaves jobs of a newer `v` in the queue.

2 adds `expires_at`. A job that does not use it is of version 1.
"""

Status = Literal["queued", "running", "finished", "failed", "cancelled", "expired", "lost"]
FinishReason = Literal["stop", "length"]
Text = Annotated[str, StringConstraints(min_length=1)]
PICTURE: Final = re.compile("sha256:([0-9a-f]{64})")
"""The `url` of a picture on the wire; its group is the digest."""
Time = Annotated[
    str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?(Z|[+-]\d\d:\d\d)$", max_length=32)
]
"""A moment in ISO 8601 with its zone, for example `2026-11-22T14:03:05.123Z`."""


class Wire(BaseModel):
    """Base of all wire types: frozen, strict about unknown fields, NaN and infinity refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TextPart(Wire):
    """A piece of text in a message."""

    type: Literal["text"]
    text: str


class ImageUrl(Wire):
    """Which picture: `sha256:` and the digest under which its producer stored it in Redis."""

    url: Annotated[str, WithJsonSchema({"type": "string", "pattern": "^sha256:[0-9a-f]{64}$"})]
    detail: Literal["auto", "low", "high"] = "auto"

    @field_validator("url")
    @classmethod
    def _stored(cls, value: str) -> str:
        if not PICTURE.fullmatch(value):
            raise ValueError(
                "must be sha256: and 64 hexadecimal digits, the digest of a picture in Redis; producer.submit stores "
                "pictures there, and so may others"
            )
        return value

    @property
    def digest(self) -> str:
        """The picture's digest in hexadecimal, by which `common.keys.image` finds it."""
        return self.url.partition(":")[2]


class ImagePart(Wire):
    """A picture in a message (OpenAI's `image_url` content part)."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(Wire):
    """One turn of a conversation, in OpenAI's form."""

    role: Literal["system", "user", "assistant"]
    content: str | tuple[Part, ...]

    @property
    def text(self) -> str:
        """The message's text; pictures are left out."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content if isinstance(part, TextPart))

    @property
    def num_images(self) -> int:
        """How many pictures the message holds."""
        return 0 if isinstance(self.content, str) else sum(isinstance(p, ImagePart) for p in self.content)


class Sampling(Wire):
    """How the next token is chosen: OpenAI's names, and mlx-lm's for `top_k` and `min_p`.

    Temperature 0 is greedy. `seed` makes a sampled answer depend on the job alone, not on its batch; without one
    the worker draws a seed. `stop` strings end the answer and are not part of it.
    """

    max_tokens: int | None = Field(default=None, ge=1, strict=True)
    temperature: float = Field(default=0.0, ge=0.0, le=10.0, strict=True)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0, strict=True)
    top_k: int = Field(default=0, ge=0, strict=True)
    min_p: float = Field(default=0.0, ge=0.0, le=1.0, strict=True)
    seed: int | None = Field(default=None, ge=0, lt=2**63, strict=True)
    stop: tuple[Text, ...] = Field(default=(), max_length=16)

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_string(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else () if value is None else value


class GenerateJob(Wire):
    """One request for text: either `messages` (through the model's chat template) or a raw `prompt`.

    It is not started at or after `expires_at` (since version 2).
    """

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["messages"]}, {"required": ["prompt"]}]})

    v: int = Field(default=1, ge=1, strict=True)
    messages: tuple[Message, ...] | None = Field(default=None, min_length=1)
    prompt: Text | None = None
    sampling: Sampling = Sampling()
    model: Text | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    metadata: dict[str, str] = Field(default_factory=dict)
    custom_id: str | None = None
    batch_id: str | None = None
    expires_at: Time | None = None

    @field_validator("expires_at")
    @classmethod
    def _a_real_moment(cls, value: str | None) -> str | None:
        if value is not None:
            datetime.fromisoformat(value).timestamp()  # ValueError: no such day or hour
        return value

    @model_validator(mode="after")
    def _messages_or_prompt(self) -> GenerateJob:
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("give either messages or prompt, and not both")
        return self

    @property
    def expires_s(self) -> float:
        """When the job expires, in seconds since the epoch; infinity where it does not."""
        return datetime.fromisoformat(self.expires_at).timestamp() if self.expires_at else math.inf

    @property
    def num_chars(self) -> int:
        """Length of all text in characters, for descriptions that must not show the text."""
        return len(self.prompt) if self.prompt is not None else sum(len(m.text) for m in self.messages or ())

    @property
    def num_images(self) -> int:
        """How many pictures the job holds."""
        return sum(message.num_images for message in self.messages or ())

    @property
    def digests(self) -> tuple[str, ...]:
        """The pictures of the job in order; one that is there twice is twice here."""
        parts = (part for m in self.messages or () if not isinstance(m.content, str) for part in m.content)
        return tuple(part.image_url.digest for part in parts if isinstance(part, ImagePart))


class Answer(Wire):
    """Base of what workers write: unknown fields are ignored, since the worker may be newer than its reader."""

    model_config = ConfigDict(extra="ignore")


class Usage(Answer):
    """Token counts of one job; `prompt_tokens == cached_tokens + prefill_tokens`, always.

    `prefill_tokens` are the prompt tokens whose computation this job caused; `cached_tokens` are those whose KV was
    found in the tree or computed by another job.
    """

    prompt_tokens: int = Field(ge=0)
    cached_tokens: int = Field(ge=0)
    prefill_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)

    @model_validator(mode="after")
    def _adds_up(self) -> Usage:
        if self.prompt_tokens != self.cached_tokens + self.prefill_tokens:
            raise ValueError("prompt_tokens must equal cached_tokens + prefill_tokens")
        return self


class Timing(Answer):
    """When things happened (ISO 8601, UTC, the Redis server's clock) and how long they took, in milliseconds.

    `queued_ms` runs from submission to the start, `prefill_ms` from the start to the first token, `decode_ms` from
    there to the last, `total_ms` from submission to the end.
    """

    submitted_at: str | None = None
    started_at: str | None = None
    finished_at: str | None = None
    queued_ms: float | None = None
    prefill_ms: float | None = None
    decode_ms: float | None = None
    total_ms: float | None = None


class Failure(Answer):
    """Why there is no text: one of `common.errors.ERROR_CODES` and a sentence."""

    code: str
    message: str


class Attempt(Failure):
    """How an earlier attempt of a job ended; the job was then queued again."""

    attempt: int = Field(ge=0)
    worker: str | None = None
    ended_at: str | None = None


class Result(Answer):
    """What became of a job. A failed job has no `text`; an empty answer is `finished` with `text == ""`.

    `errors` are the attempts before the last one. `idempotency_key` and `request_sha` (of what the caller asked for)
    let a repeated submission find this job.
    """

    id: str
    status: Status
    text: str | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timing: Timing = Timing()
    model: str | None = None
    worker: str | None = None
    attempts: int = Field(default=1, ge=0)
    error: Failure | None = None
    errors: tuple[Attempt, ...] = ()
    custom_id: str | None = None
    batch_id: str | None = None
    metadata: dict[str, str] = Field(default_factory=dict)
    expires_at: str | None = None
    idempotency_key: str | None = None
    request_sha: str | None = None

    def to_hash(self) -> dict[str, str]:
        """Return the fields of `radixq:result:ID`: plain strings, absent where there is nothing to say."""
        usage = self.usage.model_dump() if self.usage else {}
        error = {"error_code": self.error.code, "error_message": self.error.message} if self.error else {}
        flat = {
            **self.model_dump(exclude={"id", "usage", "timing", "error", "errors", "metadata"}),
            **usage, **error, **self.timing.model_dump(),
        }  # fmt: skip
        if self.errors:
            flat["errors"] = json.dumps([one.model_dump(exclude_none=True) for one in self.errors], ensure_ascii=False)
        fields = {name: _plain(value) for name, value in flat.items() if value is not None}
        return {**fields, "json": self.model_dump_json(exclude_none=True, exclude=None if self.errors else {"errors"})}


def _plain(value: object) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
