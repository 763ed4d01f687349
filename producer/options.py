"""The keyword arguments of `submit`: which there are, what they mean, the refusal of all others. Checks no value."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from os import PathLike
from typing import TYPE_CHECKING, Any, Final, Protocol, TypedDict

from common.errors import InvalidRequest, Unsupported

if TYPE_CHECKING:
    from PIL.Image import Image


class HasId(Protocol):
    """What a dependency may be given as, instead of its id: a `Ticket`."""

    id: str


class Options(TypedDict, total=False):
    """Keyword arguments of `submit`; None always means the default.

    `images` are shown before the text: `data:` URLs, bytes of a file, a `pathlib.Path`, a `PIL.Image.Image`, or http(s)
    URLs where `RADIXQ_IMAGE_URLS` allows it; the same may stand in `messages` as the `url` of an `image_url` part.
    Files are PNG, JPEG, WebP, GIF, and HEIC where pillow-heif is installed.
    `timeout_s` counts from the moment the worker starts the job, never the time in the queue; default one hour.
    `expires_at` is a moment (a datetime with a time zone) or a number of seconds from now, by the server's clock; a job
    that has not started by then never does, and ends as `expired`.
    `idempotency_key`: as long as the result of the job that was first submitted with it is kept, another submit returns
    that job's ticket; whether it waits, runs or has ended in whatever way. A different request is refused.
    `max_queue_length` refuses the job with `QueueFull` when more would wait in its queue; jobs that run, or wait for
    another job or for their next attempt, do not count.
    `depends_on` names one job or several, by ticket or id; the job waits for them to finish. When one of them fails,
    expires or is cancelled, so is this one, and its result says why.
    `on_success`, `on_failure` and `on_stopped` name a function, `package.module.function`, that the worker calls with
    what RQ gives to a callback, if its owner lists it in `RADIXQ_CALLBACKS`.
    """

    system: str | None
    messages: Sequence[Mapping[str, Any]] | None
    prompt: str | None
    images: Sequence[str | bytes | PathLike[str] | Image] | None
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    model: str | None
    queue: str | None
    job_id: str | None
    custom_id: str | None
    metadata: Mapping[str, str] | None
    chat_template_kwargs: Mapping[str, Any] | None
    timeout_s: float | None
    expires_at: datetime | float | None
    idempotency_key: str | None
    max_queue_length: int | None
    depends_on: str | HasId | Sequence[str | HasId] | None
    on_success: str | None
    on_failure: str | None
    on_stopped: str | None


_KNOWN: Final = ("text", *Options.__annotations__)
_LATER: Final = {
    "audio", "batch_id", "best_of", "echo", "format", "frequency_penalty", "function_call", "functions", "grammar",
    "json_schema", "logit_bias", "logprobs", "n", "parallel_tool_calls", "presence_penalty", "priority",
    "prompt_logprobs", "repetition_penalty", "response_format", "store", "stream", "stream_options", "suffix",
    "tool_choice", "tools", "top_logprobs", "user", "webhooks",
}  # fmt: skip
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60


def brief(value: object) -> str:
    """Return a value as a message quotes it: as it is written in Python, shortened."""
    return _short.repr(value)


def refuse_unknown(names: Iterable[str]) -> None:
    """Raise for a name that is no option, with the one that was probably meant.

    Raises:
        InvalidRequest: never heard of.
        Unsupported: a later version may take it.
    """
    for name in names:
        if name in _KNOWN:
            continue
        if name in _LATER:
            raise Unsupported(f"{name} is not supported by this version; leave it out", field=name)
        close = difflib.get_close_matches(name, _KNOWN, 1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(_KNOWN)}"
        raise InvalidRequest(f"unknown field {brief(name)}; {hint}", field=name)
