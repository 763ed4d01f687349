"""The `radixq-worker` command: run a worker with its settings shown, or look whether one could run. Knows no job."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Final, NoReturn

from redis import ConnectionPool

from common import keys
from common.errors import InvalidRequest, ModelNotLoaded, RadixqError, SettingsError
from common.settings import Settings, hide_password
from worker import doctor, server

_LATER: Final = ("batch", "top", "why")  # of the `radixq` command
_USUAL_PORT: Final = 6379  # where producers look when nobody tells them
_UNITS: Final = {"_S": "s", "_TOKENS": "tokens", "_ROWS": "rows", "_JOBS": "jobs"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; errors are one line on stderr."""
    try:
        words = list(sys.argv[1:] if argv is None else argv)
        if words and words[0] in _LATER:
            raise InvalidRequest(f"radixq {words[0]} comes later; this version has no such command")
        arguments = _parser().parse_args(words)
        status: int = arguments.command(arguments)
        sys.stdout.flush()
    except RadixqError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Exit with one line, where argparse would print the usage before it."""
        sys.exit(_fail(f"{message}; see {self.prog} --help", InvalidRequest.exit_code))


def _parser() -> argparse.ArgumentParser:
    about = "Run a radixq worker. Its settings come from the environment: MLX_MODEL_PATH and RADIXQ_*."
    parser = _Parser(prog="radixq-worker", description=about)
    parser.add_argument("--version", action="version", version=f"radixq {_version()}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    about = "Print the settings, start the embedded server when no Redis URL is given, and become `rq worker`."
    run = commands.add_parser("run", help="run a worker", description=about)
    run.add_argument("queues", nargs="*", metavar="QUEUE", help=f"in order of priority; default {keys.DEFAULT_QUEUE}")
    run.add_argument("-b", "--burst", action="store_true", help="end when no job waits")
    run.add_argument("--max-jobs", type=int, metavar="N", help="end after so many jobs")
    run.set_defaults(command=_run)

    about = "Check Redis, versions, device, memory and model; exit 1 if anything is wrong."
    look = commands.add_parser("doctor", help="check everything a worker needs", description=about)
    look.add_argument("--json", action="store_true", help="print JSON")
    look.set_defaults(command=_doctor)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    settings = Settings.from_env()
    _print_settings(settings)
    if settings.model_path is None:
        raise ModelNotLoaded("no model: set MLX_MODEL_PATH to a directory, a hub id or a .gguf file")
    url = _checked(settings.redis_url) if settings.redis_url else _embedded(settings)
    words = [sys.executable, "-m", "rq.cli", "worker", "--worker-class", "worker.BatchWorker"]
    words += ["--burst"] if arguments.burst else []
    words += [] if arguments.max_jobs is None else ["--max-jobs", str(arguments.max_jobs)]
    words += arguments.queues or [keys.DEFAULT_QUEUE]
    sys.stdout.flush()
    # The URL goes by the environment: a password in it must not show in the list of processes.
    os.execve(sys.executable, words, {**os.environ, "RADIXQ_REDIS_URL": url, "RQ_REDIS_URL": url})


def _checked(url: str) -> str:
    """Return the URL if it is one: RQ would answer a wrong one with a traceback."""
    try:
        ConnectionPool.from_url(url)
    except ValueError as error:
        raise SettingsError(f"Redis URL {hide_password(url)!r}: {error}") from None
    return url


def _embedded(settings: Settings) -> str:
    """Return the URL of the home's own server, started if need be, and tell how producers find it."""
    try:
        running = server.start(settings.home, usual=_USUAL_PORT)
    except OSError as error:
        raise SettingsError(f"RADIXQ_HOME cannot be used: {error}; name a directory that can be written") from error
    print(f"server {running.url}, {'started' if running.process else 'found'}; data and log in {settings.home}")
    if not running.url.endswith(f":{_USUAL_PORT}"):
        print(f"producers need: export RADIXQ_REDIS_URL={running.url}")
    return running.url


def _print_settings(settings: Settings) -> None:
    rows = [("setting", "value", "source", "meaning")]
    for name, value, meaning in settings.rows():
        unit = next((unit for ending, unit in _UNITS.items() if name.endswith(ending)), "")
        rows.append((name, f"{value} {unit}".rstrip() if value else "-", _source(name), meaning))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for *cells, meaning in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)), meaning, sep="  ")


def _source(name: str) -> str:
    if os.environ.get(name, "").strip():
        return "environment"
    if name == "RADIXQ_REDIS_URL" and os.environ.get("RQ_REDIS_URL", "").strip():
        return "RQ_REDIS_URL"
    return "default"


def _doctor(arguments: argparse.Namespace) -> int:
    checks = []
    for check in doctor.examine(Settings.from_env()):
        checks.append(check)
        if not arguments.json:
            fix = f"; fix: {check.fix}" if check.fix else ""
            print(f"{'ok' if check.ok else 'failed':<7}{check.name}: {check.detail}{fix}", flush=True)
    if arguments.json:
        print(json.dumps([asdict(check) for check in checks], ensure_ascii=False))
    return 0 if all(check.ok for check in checks) else 1


def _fail(message: str, status: int) -> int:
    print(f"radixq-worker: {' '.join(message.split())}", file=sys.stderr)
    return status


def _version() -> str:
    try:
        return metadata.version("radixq")
    except metadata.PackageNotFoundError:
        return "(not installed: run from a checkout)"


if __name__ == "__main__":
    sys.exit(main())
