"""Turn a job as it lies in Redis into a `Prompt`, or refuse it with a sentence: the one border for bad input.

Knows no Redis and no MLX; a tokenizer is what `worker.reader.load_tokenizer` returns. Refusals never quote the prompt.

Tokens are those of mlx-lm. A chat is rendered as its server does it: the model's template with
`add_generation_prompt`, no BOS but the template's own. A raw prompt is encoded as `mlx_lm.stream_generate` does it:
with the tokenizer's BOS unless the text begins with it. The text of a special token, such as `<|im_end|>` in a
message, becomes that token, as in mlx-lm; a producer whose users may write such things passes
`chat_template_kwargs={"sanitize_control_tokens": True}`, and it stays text.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError
from pydantic import ValidationError

from common import keys
from common.errors import ContextLengthExceeded, InvalidRequest, Unsupported
from common.messages import WIRE_VERSION, GenerateJob, ImagePart, Message, Sampling
from common.serializer import JobSerializer
from common.settings import Settings
from worker.processor import Processor, place
from worker.sequence import Picture, Prompt, Tokens

if TYPE_CHECKING:
    from worker.reader import LoadedTokenizer

# Arguments of transformers' apply_chat_template that are no variables of the template. `chat_template` would be code.
_RESERVED = frozenset({
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "max_length", "messages",
    "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "tokenize", "tokenizer_kwargs",
    "truncation",
})  # fmt: skip
# What a template or a tokenizer raises over content that it did not expect.
_UNRENDERABLE = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
_MAX_NAME = 80  # characters of a foreign name that a message quotes

Fetch = Callable[[str], bytes | None]
"""Gets the stored picture of a digest, or None if it is gone."""


def _nothing(_: str) -> None:
    """Get no picture."""


def read_job(data: bytes, *, max_bytes: int) -> GenerateJob | None:
    """Decode the `data` field of an RQ job; None for a newer wire version, which is left to a newer worker.

    Raises:
        InvalidRequest: over `max_bytes` when unpacked, no JSON, another function, or not a `GenerateJob`.
    """
    call = _decode(_unpack(data, max_bytes))
    if not isinstance(call, list) or len(call) != 4:
        raise InvalidRequest("the job's data is not what RQ writes: a list of function, instance, arguments, keywords")
    function, instance, args, named = call
    if function != keys.GENERATE:
        raise InvalidRequest(
            f"the job calls {str(function)[:_MAX_NAME]!r}, but this worker runs only {keys.GENERATE!r}; "
            "give other functions to a queue of their own"
        )
    if instance is not None or named or not isinstance(args, list) or len(args) != 1 or not isinstance(args[0], dict):
        raise InvalidRequest(f"{keys.GENERATE} takes exactly one argument, a JSON object, and nothing by name")
    return _validate(args[0])


def too_large(num_bytes: int, max_bytes: int) -> InvalidRequest:
    """Return the refusal of a job that is over `RADIXQ_MAX_JOB_BYTES`."""
    return InvalidRequest(
        f"the job takes at least {num_bytes:,} bytes, more than the {max_bytes:,} of RADIXQ_MAX_JOB_BYTES on this "
        "worker; shorten it, or raise the setting"
    )


def prepare(job: GenerateJob, loaded: LoadedTokenizer, settings: Settings, fetch: Fetch = _nothing) -> Prompt:
    """Return the job's tokens and how to continue them. `fetch` is asked only for pictures never seen before.

    `max_tokens` is the job's, else the setting's, but never more than the context has left, which is at least one.

    Raises:
        InvalidRequest: the template refuses the messages, or there is not one token.
        ContextLengthExceeded: no room is left for an answer.
        Unsupported: the job has a picture, and the worker or its model takes none, or not this one.
        ImageUnreadable: a picture is gone, or is none.
    """
    _check_pictures(job, loaded)
    tokens = _encode(job.prompt, loaded) if job.prompt is not None else _render(job, loaded, settings)
    pictures: tuple[Picture, ...] = ()
    if loaded.processor is not None and job.digests:
        tokens, pictures = _placed(tokens, job.digests, loaded.processor, fetch)
    if not tokens.size:
        raise InvalidRequest("the prompt has no tokens", field="prompt" if job.prompt is not None else "messages")
    left = loaded.context_length - tokens.size
    if left < 1:
        raise ContextLengthExceeded(
            f"the prompt has {tokens.size:,} tokens, but the context of {loaded.name} holds {loaded.context_length:,} "
            "with at least one of them for the answer; shorten the prompt"
        )
    max_tokens = min(job.sampling.max_tokens or settings.max_tokens, left)
    return Prompt(tokens, job.sampling.model_copy(update={"max_tokens": max_tokens}), pictures=pictures)


def try_out(loaded: LoadedTokenizer, settings: Settings) -> None:
    """Prepare one word, whatever comes of it: a tokenizer or template that ends the process does so before any job."""
    with contextlib.suppress(InvalidRequest):
        prepare(GenerateJob(messages=(Message(role="user", content="word"),)), loaded, settings)


def seeded(sampling: Sampling, job_id: str) -> Sampling:
    """Return the sampling with a seed: the job's own, else one made of its id, so that a retry answers the same."""
    if sampling.seed is not None:
        return sampling
    return sampling.model_copy(update={"seed": zlib.crc32(job_id.encode())})


# -- the wire ----------------------------------------------------------------------------------------------------------


def _unpack(data: bytes, max_bytes: int) -> bytes:
    """Undo RQ's compression, where there is one, without unpacking more than is allowed."""
    inflate = zlib.decompressobj()
    try:
        unpacked = inflate.decompress(data, max_bytes + 1)
    except zlib.error:  # written without compression, as other languages may
        unpacked = data
    else:
        if len(unpacked) <= max_bytes and not inflate.eof:
            raise InvalidRequest("the job's data is damaged: its compressed form breaks off")
    if len(unpacked) > max_bytes:
        raise too_large(len(unpacked), max_bytes)
    return unpacked


def _decode(unpacked: bytes) -> Any:
    try:
        return JobSerializer.loads(unpacked)
    except RecursionError as error:
        raise InvalidRequest("the job's data is JSON that is nested too deep") from error
    except UnicodeDecodeError as error:
        raise InvalidRequest("the job's data is neither JSON nor text; write it with JSON, as RQ does") from error
    except ValueError as error:
        raise InvalidRequest(f"the job's data cannot be read: {error}") from error


def _validate(body: dict[str, Any]) -> GenerateJob | None:
    version = body.get("v")
    if type(version) is int and version > WIRE_VERSION:
        return None
    _refuse_surrogates(body)
    try:
        return GenerateJob.model_validate(body)
    except ValidationError as error:
        raise _refusal(error, body) from error


def _refuse_surrogates(body: dict[str, Any]) -> None:
    """JSON can escape what no UTF-8 can hold, and so neither a result nor a tokenizer."""
    with contextlib.suppress(UnicodeEncodeError, RecursionError):
        json.dumps(body, ensure_ascii=False).encode()
        return
    for name, value in body.items():
        try:
            json.dumps({name: value}, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            field = name.encode(errors="backslashreplace").decode()[:_MAX_NAME]
            raise InvalidRequest(f"{field}: not valid Unicode, it holds a lone surrogate", field=field) from error
        except RecursionError as error:
            raise InvalidRequest("the job's data is JSON that is nested too deep") from error


def _refusal(error: ValidationError, body: dict[str, Any]) -> InvalidRequest:
    """Name the field and the rule, and the value where it is a number and so no part of a prompt."""
    found = error.errors(include_url=False, include_context=False)
    first = max(found, key=lambda one: len(one["loc"]))  # the most specific: a union reports all of its kinds
    field = _place(first["loc"], body, missing=first["type"] in {"missing", "extra_forbidden"})
    if first["type"] == "extra_forbidden":
        return InvalidRequest(f"unknown field {field!r}; leave it out", field=field)
    value = first["input"]
    got = f", got {json.dumps(value)}" if value is None or isinstance(value, int | float) else f", got {_kind(value)}"
    rule = first["msg"].removeprefix("Value error, ")
    return InvalidRequest(f"{field}: {rule}{got}" if field else rule, field=field or None)


def _place(location: tuple[int | str, ...], body: Any, *, missing: bool) -> str:
    """Return `messages[0].role`: the steps that lead into the input; others name variants of a type."""
    name, here = "", body
    for number, step in enumerate(location, 1):
        inside = (isinstance(here, dict) and step in here) or (
            isinstance(here, list) and isinstance(step, int) and step < len(here)
        )
        if inside or (missing and number == len(location)):
            name += f"[{step}]" if isinstance(step, int) else f".{str(step)[:_MAX_NAME]}"
        if inside:
            here = here[step]
    return name.lstrip(".")


def _kind(value: object) -> str:
    return "an object" if isinstance(value, dict) else "a list" if isinstance(value, list) else "a string"


# -- tokens ------------------------------------------------------------------------------------------------------------


def _check_pictures(job: GenerateJob, loaded: LoadedTokenizer) -> None:
    for index, message in enumerate(job.messages or ()):
        if message.num_images and loaded.processor is None:
            raise Unsupported(
                f"messages[{index}] has a picture, and {loaded.name} takes none here: {loaded.blind}; send text, or "
                "give the job to a worker with radixq[vision] installed and a vision model, for example a Qwen2-VL",
                field="messages",
            )
        for part in () if isinstance(message.content, str) else message.content:
            if isinstance(part, ImagePart) and part.image_url.detail != "auto":
                raise Unsupported(
                    f"messages[{index}]: detail must be auto; a model sees each picture at the size that it chooses",
                    field="messages",
                )


def _placed(
    tokens: Tokens, digests: Sequence[str], processor: Processor, fetch: Fetch
) -> tuple[Tokens, tuple[Picture, ...]]:
    """Put the pictures into a rendered prompt."""
    places = int(np.count_nonzero(tokens == processor.placeholder))
    if places != len(digests):
        raise InvalidRequest(
            f"the rendered messages have places for {places} pictures, but there are {len(digests)}: leave the model's "
            "own marks of pictures out of the text",
            field="messages",
        )
    layouts = {digest: processor.layout(digest, fetch) for digest in dict.fromkeys(digests)}
    placed, pictures = place(tokens, digests, [layouts[digest] for digest in digests], processor.placeholder)
    if pictures[-1].stop == len(placed):
        raise InvalidRequest("the prompt ends with a picture; let text follow it", field="messages")
    return placed, pictures


def _encode(prompt: str, loaded: LoadedTokenizer) -> Tokens:
    tokenizer: Any = loaded.tokenizer
    begun = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
    try:
        ids = tokenizer.encode(prompt, add_special_tokens=not begun)
    except _UNRENDERABLE as error:
        reason = type(error).__name__  # its words may quote the prompt
        raise InvalidRequest(f"the tokenizer cannot encode the prompt: {reason}", field="prompt") from error
    return np.array(ids, np.int32)


def _render(job: GenerateJob, loaded: LoadedTokenizer, settings: Settings) -> Tokens:
    tokenizer: Any = loaded.tokenizer
    variables = {**settings.chat_template_kwargs, **job.chat_template_kwargs}
    reserved = sorted(_RESERVED & variables.keys())
    if reserved:
        raise InvalidRequest(
            f"chat_template_kwargs: {reserved[0]!r} is the worker's and no variable of the template; leave it out",
            field="chat_template_kwargs",
        )
    template = loaded.processor.chat_template if loaded.processor and job.num_images else None
    if template is not None:
        variables["chat_template"] = template
    try:
        messages = [_as_template_wants(message, tokenizer, template) for message in job.messages or ()]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, **variables)
    except _UNRENDERABLE as error:
        # A template's own words are about the roles; what Python or Jinja say may quote the content.
        reason = str(error) if isinstance(error, TemplateError) else type(error).__name__
        raise InvalidRequest(
            f"the chat template of {loaded.name} cannot render these messages: {reason}", field="messages"
        ) from error
    return np.array(ids, np.int32)


def _as_template_wants(message: Message, tokenizer: Any, template: str | None) -> dict[str, Any]:
    """Return a message whose content is a string, or parts where it has pictures or the template wants them."""
    if not message.num_images and _takes_strings(tokenizer, template):
        return {"role": message.role, "content": message.text}
    if isinstance(message.content, str):
        return {"role": message.role, "content": [{"type": "text", "text": message.content}]}
    parts = [
        {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text}
        for part in message.content
    ]
    return {"role": message.role, "content": parts}


@lru_cache(maxsize=4)
def _takes_strings(tokenizer: Any, template: str | None) -> bool:
    """Whether a template writes content that is a string; some that know pictures go through it as a list of parts."""
    chosen = {} if template is None else {"chat_template": template}
    shown = tokenizer.apply_chat_template([{"role": "user", "content": "word"}], tokenize=False, **chosen)
    return "word" in shown
