"""The error tree: every way a job or a command can fail, with its code, its retry rule and its exit code.

    RadixqError
    +-- InvalidRequest          invalid_request            the job itself is wrong
    |   +-- ContextLengthExceeded  context_length_exceeded
    |   +-- Unsupported         unsupported                well formed, but not on this worker
    |   +-- ImageUnreadable     image_unreadable
    |   `-- ImageTooLarge       image_too_large
    +-- ModelNotLoaded          model_not_loaded           the worker cannot start
    +-- JobTimeout              timeout
    +-- Expired                 expired
    +-- Cancelled               cancelled
    +-- OutOfMemory             out_of_memory
    +-- PrefixPoisoned          prefix_poisoned
    +-- WorkerCrashed           worker_crashed
    +-- InternalError           internal
    +-- SettingsError           a setting is wrong (commands only)
    +-- BrokerUnavailable       Redis cannot be used (commands only)
    +-- QueueFull               as many jobs wait as the caller allows (submitting only)
    `-- GenerationFailed        raised by Ticket.result(); carries the code of what went wrong

Handlers read the class (`code`, `retry`, `exit_code`), never the text. Knows no Redis and no MLX.
"""

from __future__ import annotations

from typing import ClassVar


class RadixqError(Exception):
    """Base of everything radixq raises on purpose; the message says what, which value, and what to do."""

    code: ClassVar[str] = "internal"
    retry: ClassVar[bool] = False
    exit_code: ClassVar[int] = 1


class InvalidRequest(RadixqError, ValueError):
    """The request itself is wrong; sending it again cannot help.

    Attributes:
        field: name of the offending argument, as the caller wrote it, where there is one.
    """

    code = "invalid_request"
    exit_code = 2

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class ContextLengthExceeded(InvalidRequest):
    """The prompt, with at least one token of answer, does not fit the model's context."""

    code = "context_length_exceeded"


class Unsupported(InvalidRequest):
    """Well formed, but not something this worker can do."""

    code = "unsupported"


class ImageUnreadable(InvalidRequest):
    """A picture cannot be opened: truncated, lying about its type, or a type without a codec."""

    code = "image_unreadable"


class ImageTooLarge(InvalidRequest):
    """A picture is over the bound of bytes, pixels or frames."""

    code = "image_too_large"


class ModelNotLoaded(RadixqError):
    """The model cannot be loaded; the worker stops and jobs stay in Redis."""

    code = "model_not_loaded"
    exit_code = 3


class JobTimeout(RadixqError):
    """The job ran longer than its `timeout_s`."""

    code = "timeout"


class Expired(RadixqError):
    """The job was still waiting at its `expires_at`."""

    code = "expired"


class Cancelled(RadixqError):
    """Someone cancelled the job."""

    code = "cancelled"


class OutOfMemory(RadixqError):
    """The device ran out of memory while the job ran."""

    code = "out_of_memory"
    retry = True


class PrefixPoisoned(RadixqError):
    """A prefix this job shares failed to compute, and failed again for the job alone."""

    code = "prefix_poisoned"
    retry = True


class WorkerCrashed(RadixqError):
    """The worker process died while it ran this job alone."""

    code = "worker_crashed"


class InternalError(RadixqError):
    """A defect of ours; the worker's log has the details."""

    code = "internal"
    retry = True


class SettingsError(RadixqError):
    """A setting has a wrong name or a wrong value."""

    exit_code = 2


class BrokerUnavailable(RadixqError):
    """Redis cannot be reached or refuses us."""

    retry = True
    exit_code = 4


class QueueFull(RadixqError):
    """More jobs would wait in the queue than the caller's `max_queue_length`; nothing was written.

    Attributes:
        queue: its name.
        length: how many jobs wait in it now.
    """

    retry = True
    exit_code = 6

    def __init__(self, message: str, *, queue: str, length: int) -> None:
        super().__init__(message)
        self.queue = queue
        self.length = length


class GenerationFailed(RadixqError):
    """Raised by `Ticket.result()` for a job that did not finish.

    Attributes:
        code: the job's error code (`error_code` in Redis), for example `context_length_exceeded`.
        status: `failed`, `cancelled`, `expired` or `lost`.
    """

    exit_code = 5

    def __init__(self, message: str, *, code: str, status: str = "failed") -> None:
        super().__init__(message)
        self.code = code  # type: ignore[misc]  # the instance's own code, not the class's
        self.status = status


ERROR_CODES: tuple[str, ...] = (
    "invalid_request", "context_length_exceeded", "unsupported", "image_unreadable", "image_too_large",
    "model_not_loaded", "timeout", "expired", "cancelled", "out_of_memory", "prefix_poisoned", "worker_crashed",
    "internal",
)  # fmt: skip
