"""From what a caller wrote to a checked `GenerateJob`, or a refusal that names the field. Knows no Redis."""

from __future__ import annotations

import hashlib
import json
import math
import re
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final, cast

from pydantic import ValidationError

from common import keys
from common.errors import InvalidRequest, Unsupported
from common.keys import DEFAULT_TIMEOUT_S
from common.messages import GenerateJob, Sampling
from producer.options import brief, refuse_unknown

_JOB_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")
_MAX_KEY: Final = 256  # characters of an idempotency key
_MAX_PARENTS: Final = 1_000
_MAX_QUEUE: Final = 10**9
_YEARS: Final = 10 * 365 * 86_400
_CALLBACKS: Final = ("on_success", "on_failure", "on_stopped")
_FUNCTION: Final = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
_TEXT_FIELDS: Final = ("text", "messages", "prompt")
_RULES: Final = {
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
    "string_type": "must be a string",
    "tuple_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "union_tag_invalid": "has no known type; known are text and image_url",
    "union_tag_not_found": "has no type; known are text and image_url",
    "string_unicode": "is not valid Unicode: it holds a lone surrogate",
}


@dataclass(frozen=True, slots=True)
class Request:
    """One checked job and where it goes.

    Attributes:
        source: the field that holds its text: `text`, `messages` or `prompt`.
        named: whether the caller chose the id (it may then be taken).
        expires_in_s: what `expires_at` said, if it was relative; `job` then knows nothing of it yet.
        callbacks: function names by `on_success`, `on_failure`, `on_stopped`.
    """

    job: GenerateJob
    id: str
    queue: str
    timeout_s: int
    source: str
    named: bool
    expires_in_s: float | None
    key: str | None
    max_queue_length: int | None
    parents: tuple[str, ...]
    callbacks: Mapping[str, str]

    @property
    def sha(self) -> str:
        """Digest of what is asked for, and of nothing that may differ when the same thing is asked for again."""
        asked = self.job.model_dump(mode="json", exclude_defaults=True, exclude={"v", "expires_at"})
        return hashlib.sha256(json.dumps([self.queue, asked], sort_keys=True).encode()).hexdigest()

    def expiring(self, at_s: float) -> Request:
        """Return the request with a moment to expire at, in seconds since the epoch."""
        at = datetime.fromtimestamp(at_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return replace(self, job=self.job.model_copy(update={"v": 2, "expires_at": at}), expires_in_s=None)


def parse(fields: Mapping[str, Any], *, max_bytes: int) -> Request:
    """Check everything that can be checked without a server.

    Text of only spaces or newlines is allowed: it is a prompt like any other.

    Raises:
        InvalidRequest: with the field, as the caller wrote it, and its value, shortened.
        Unsupported: a field or a content that a later version may take.
    """
    refuse_unknown(fields)
    given = {name: value for name, value in fields.items() if value is not None}
    source = _source(given)
    body = _body(given, source)
    size = _num_chars(body)
    if size > max_bytes:
        raise too_large(source, size, max_bytes)
    try:
        job = GenerateJob.model_validate(body)
    except ValidationError as error:
        raise _refusal(error, body, source) from error
    _refuse_content(job)
    request = Request(
        job,
        id=str(given.get("job_id", uuid.uuid4())),
        queue=_queue(given),
        timeout_s=_timeout_s(given),
        source=source,
        named="job_id" in given,
        expires_in_s=None,
        key=_key(given),
        max_queue_length=_max_queue_length(given),
        parents=_parents(given),
        callbacks=_callbacks(given),
    )
    return _expiring(request, given.get("expires_at"))


def check_id(job_id: object) -> str:
    """Return the id if RQ can take it, raise `InvalidRequest` if not."""
    if not isinstance(job_id, str) or not _JOB_ID.fullmatch(job_id):
        raise _wrong("job_id", job_id, "must be 1 to 128 letters, digits, '_' or '-'")
    return job_id


def too_large(source: str, num_bytes: int, max_bytes: int) -> InvalidRequest:
    """Return the refusal of a job that is over `RADIXQ_MAX_JOB_BYTES`."""
    return InvalidRequest(
        f"{source}: the job takes {num_bytes:,} bytes, more than the {max_bytes:,} of RADIXQ_MAX_JOB_BYTES; "
        "shorten it, or raise the setting here and on the workers",
        field=source,
    )


def surrogate(fields: Mapping[str, Any]) -> InvalidRequest:
    """Return the refusal of the string, somewhere in the fields, that cannot be written as UTF-8."""
    for name, value in _strings(fields, ""):
        if any("\ud800" <= char <= "\udfff" for char in value):
            field = re.split(r"[.\[]", name, maxsplit=1)[0]
            return _wrong(name, value, "is not valid Unicode: it holds a lone surrogate", field)
    return InvalidRequest("a string is not valid Unicode: it holds a lone surrogate")


def _strings(value: object, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield name, str(key)
            yield from _strings(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _strings(item, f"{name}[{index}]")


def _source(given: Mapping[str, Any]) -> str:
    sources = [name for name in _TEXT_FIELDS if name in given]
    if len(sources) != 1:
        what = f"got {' and '.join(sources)}" if sources else "got none of them"
        raise InvalidRequest(f"give exactly one of text, messages and prompt; {what}", field=(sources or ["text"])[-1])
    if "system" in given and sources != ["text"]:
        raise InvalidRequest(f"system goes with text only; put it into {sources[0]}", field="system")
    if "images" in given and sources != ["text"]:
        hint = "put them into its parts" if sources == ["messages"] else "a raw prompt has none"
        raise InvalidRequest(f"images go with text, not with {sources[0]}; {hint}", field="images")
    for name in ("text", "prompt", "system"):
        if name in given and not isinstance(given[name], str):
            raise _wrong(name, given[name], "must be a string")
        if given.get(name) == "":
            raise InvalidRequest(f"{name} is empty", field=name)
    return sources[0]


def _body(given: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the fields of `GenerateJob`; what belongs to the queue is checked elsewhere."""
    if "job_id" in given:
        check_id(given["job_id"])
    sampling = {name: given[name] for name in Sampling.model_fields if name in given}
    body = {name: given[name] for name in GenerateJob.model_fields if name in given and name != "expires_at"}
    if source == "text":
        turns = [("system", given.get("system")), ("user", _with_images(given))]
        body["messages"] = [{"role": role, "content": content} for role, content in turns if content is not None]
    return {**body, "sampling": sampling}


def _with_images(given: Mapping[str, Any]) -> str | list[dict[str, Any]]:
    """Return the user's text, with the pictures before it as the examples of vision models have them."""
    images = given.get("images") or []
    if not isinstance(images, list):
        raise _wrong("images", images, "must be a list of pictures")
    if not images:
        return cast(str, given["text"])
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    return [*parts, {"type": "text", "text": given["text"]}]


def _num_chars(body: Mapping[str, Any]) -> int:
    """Return a lower bound of the job's bytes, cheaply and whatever the types are."""
    messages = body.get("messages")
    texts = [m.get("content") for m in messages if isinstance(m, Mapping)] if isinstance(messages, list) else []
    return sum(len(text) for text in (body.get("prompt"), *texts) if isinstance(text, str))


def _refuse_content(job: GenerateJob) -> None:
    if not job.num_chars and not job.num_images:
        raise InvalidRequest("messages hold neither text nor pictures", field="messages")


def _queue(given: Mapping[str, Any]) -> str:
    model, queue = given.get("model"), given.get("queue")
    if model is not None and not model.strip():
        raise _wrong("model", model, "must name a model")
    if queue is None:
        return keys.DEFAULT_QUEUE if model is None else keys.model_queue(model)
    if not isinstance(queue, str) or not queue.strip() or not queue.isprintable():
        raise _wrong("queue", queue, "must be a printable name")
    return queue


def _timeout_s(given: Mapping[str, Any]) -> int:
    value = given.get("timeout_s", DEFAULT_TIMEOUT_S)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 10**9:
        raise _wrong("timeout_s", value, "must be a positive number of seconds")
    return math.ceil(value)


def _expiring(request: Request, value: object) -> Request:
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise _wrong("expires_at", value, "has no time zone; say datetime.now(UTC) + timedelta(...)")
        try:
            return request.expiring(value.timestamp())
        except (OverflowError, ValueError) as error:
            raise _wrong("expires_at", value, "cannot be written in UTC") from error
    if value is None:
        return request
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= _YEARS:
        raise _wrong(
            "expires_at", value, "must be a datetime with a time zone, or a positive number of seconds from now"
        )
    return replace(request, expires_in_s=float(value))


def _key(given: Mapping[str, Any]) -> str | None:
    key = given.get("idempotency_key")
    if key is None or (isinstance(key, str) and 0 < len(key) <= _MAX_KEY and key.isprintable()):
        return key
    raise _wrong("idempotency_key", key, f"must be 1 to {_MAX_KEY} printable characters")


def _max_queue_length(given: Mapping[str, Any]) -> int | None:
    most = given.get("max_queue_length")
    if most is None or (isinstance(most, int) and not isinstance(most, bool) and 0 <= most <= _MAX_QUEUE):
        return most
    raise _wrong("max_queue_length", most, "must be a number of jobs")


def _parents(given: Mapping[str, Any]) -> tuple[str, ...]:
    value = given.get("depends_on", ())
    several = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(several) > _MAX_PARENTS:
        raise InvalidRequest(f"depends_on names {len(several):,} jobs, more than {_MAX_PARENTS:,}", field="depends_on")
    ids = [getattr(parent, "id", parent) for parent in several]
    for parent in ids:
        if not isinstance(parent, str) or not _JOB_ID.fullmatch(parent):
            raise _wrong("depends_on", parent, "must be a ticket or the id of a job, or a list of them")
    return tuple(dict.fromkeys(ids))


def _callbacks(given: Mapping[str, Any]) -> dict[str, str]:
    named = {name: given[name] for name in _CALLBACKS if name in given}
    for name, function in named.items():
        if not isinstance(function, str) or not _FUNCTION.fullmatch(function):
            raise _wrong(name, function, "must be the name of a function, 'package.module.function'")
    return named


def _refusal(error: ValidationError, body: Mapping[str, Any], source: str) -> InvalidRequest:
    """Translate the most specific of pydantic's errors into the caller's words."""
    found = [(_path(cast("dict[str, Any]", e), body), e) for e in error.errors(include_url=False)]
    path, first = max(found, key=lambda pair: len(pair[0]))  # the first of the longest: unions report every branch
    if path[:1] == ["sampling"]:
        path = path[1:]
    if path[:1] == ["messages"] and source == "text":
        path = [{"system": "system", "user": "text"}[body["messages"][path[1]]["role"]]]
    name = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".")
    field = str(path[0]) if path else source
    if first["type"] == "missing":
        return InvalidRequest(f"{name} is missing", field=field)
    if first["type"] == "extra_forbidden":
        return Unsupported(f"{name} is not supported by this version; leave it out", field=field)
    rule = _RULES.get(first["type"]) or first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return _wrong(name, first["input"], rule, field)


def _path(error: Mapping[str, Any], body: Any) -> list[Any]:
    """Return where in the caller's own data an error lies: pydantic's location without its union branches."""
    path: list[Any] = []
    here = body
    for step in error["loc"]:
        leads = isinstance(here, Mapping) and step in here
        leads = leads or (isinstance(here, (list, tuple)) and isinstance(step, int) and step < len(here))
        if leads:
            here = here[step]
            path.append(step)
    return [*path, error["loc"][-1]] if error["type"] == "missing" else path


def _wrong(name: str, value: object, rule: str, field: str | None = None) -> InvalidRequest:
    return InvalidRequest(f"{name}={brief(value)} {rule}", field=field or name)
