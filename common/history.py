"""What a job's record keeps from one attempt to the next: labels, earlier errors, and what finds the job again.

Knows no Redis command; `FIELDS` are of `radixq:result:ID`, where anybody may have written.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from common.errors import RadixqError
from common.messages import Attempt

FIELDS: Final = ("errors", "idempotency_key", "request_sha")
MAX_ERRORS: Final = 32
_MAX_CHARS: Final = 4_096
_LABELS: Final = ("custom_id", "batch_id", "expires_at")
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_ERRORS: Final = TypeAdapter(tuple[Attempt, ...])


@dataclass(frozen=True, slots=True)
class History:
    """The part of a record that outlives an attempt; empty for a job that nobody submitted through us."""

    errors: tuple[Attempt, ...] = ()
    idempotency_key: str | None = None
    request_sha: str | None = None

    @classmethod
    def read(cls, values: Sequence[bytes | None]) -> History:
        """Take the values of `FIELDS`; what cannot be read counts as absent."""
        errors, key, sha = values
        try:
            known = _ERRORS.validate_json(errors or b"[]")[-MAX_ERRORS:]
        except ValidationError:
            known = ()
        return cls(known, _text(key), _text(sha))

    def with_error(self, attempt: int, error: RadixqError, worker: str, ended_at: str) -> History:
        """Return the history after one more attempt that did not succeed."""
        one = Attempt(
            attempt=attempt, code=error.code, message=str(error)[:_MAX_CHARS], worker=worker, ended_at=ended_at
        )
        return History((*self.errors, one)[-MAX_ERRORS:], self.idempotency_key, self.request_sha)

    def fields(self) -> dict[str, Any]:
        """Return it as fields of a `Result`."""
        return {name: getattr(self, name) for name in FIELDS}


def labels(body: Any) -> dict[str, Any]:
    """Pick what the producer wants to find again in the result, as far as it can be read."""
    if not isinstance(body, dict):
        return {}
    found = {name: body[name] for name in _LABELS if _writable(body.get(name))}
    metadata = body.get("metadata")
    if isinstance(metadata, dict) and all(_writable(part) for item in metadata.items() for part in item):
        found["metadata"] = metadata
    return found


def _writable(value: object) -> bool:
    """Whether it is a string that UTF-8 can hold: JSON can escape lone surrogates, which it cannot."""
    return isinstance(value, str) and not _SURROGATE.search(value)


def _text(value: bytes | None) -> str | None:
    try:
        return value.decode() if value and len(value) <= _MAX_CHARS else None
    except UnicodeDecodeError:
        return None
