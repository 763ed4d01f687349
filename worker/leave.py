"""End this process with one line and the exit code of its reason: whoever called us (`rq worker`) prints tracebacks.

Knows no worker.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from common.errors import RadixqError, SettingsError


@contextmanager
def for_settings() -> Iterator[None]:
    """End the process where a setting inside the block is wrong."""
    try:
        yield
    except SettingsError as error:
        leave(error)


def leave(error: RadixqError) -> NoReturn:
    """End the process in order."""
    _say(error)
    raise SystemExit(error.exit_code)


def leave_at_once(error: RadixqError | None) -> NoReturn:
    """End the process while the engine's thread still runs: an orderly end would abort in MLX's streams."""
    if error is not None:
        _say(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if error is None else error.exit_code)


def _say(error: RadixqError) -> None:
    code = "" if error.code == RadixqError.code else f"{error.code}: "
    print(f"radixq: {code}{' '.join(str(error).split())}", file=sys.stderr, flush=True)  # noqa: T201
