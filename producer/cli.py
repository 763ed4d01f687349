"""The `radixq` command: submit one job, ask for it, cancel it, look at what Redis holds. Knows no model."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from common import keys
from common.errors import InvalidRequest, RadixqError
from common.settings import Settings
from producer import dead, inspection
from producer.broker import connect
from producer.submit import submit
from producer.ticket import Ticket, get


def moment(text: str) -> datetime | float:
    """Return what `--expires-at` says; a time without a zone is refused by `submit`."""
    return float(text) if text.replace(".", "", 1).isdigit() else datetime.fromisoformat(text)


_LATER = ("batch", "top", "why")
_DEAD_FIELDS = ("job_id", "at", "queue", "error_code", "crashes", "reason")
_OPTIONS: dict[str, tuple[Callable[[str], Any], str]] = {
    "system": (str, "system message before the text"),
    "max-tokens": (int, "length of the answer; default: the worker's RADIXQ_MAX_TOKENS"),
    "temperature": (float, "0 is greedy; default 0"),
    "top-p": (float, "nucleus sampling; default 1"),
    "top-k": (int, "0 is off; default 0"),
    "min-p": (float, "default 0"),
    "seed": (int, "makes a sampled answer repeatable"),
    "model": (str, "only a worker that serves this model takes the job"),
    "queue": (str, "default radixq, or the model's queue"),
    "job-id": (str, "default: a random one"),
    "expires-at": (
        moment,
        "seconds from now, or a time such as 2026-11-23T06:00:00Z; not started then, never started",
    ),
    "idempotency-key": (str, "the same key again returns the job of the first time"),
    "max-queue-length": (int, "refuse when more jobs would wait"),
    "timeout-s": (float, f"seconds the job may run once started; default {keys.DEFAULT_TIMEOUT_S:,}"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; errors are one line on stderr."""
    try:
        words = sys.argv[1:] if argv is None else argv
        if words and words[0] in _LATER:
            raise InvalidRequest(f"radixq {words[0]} comes later; this version has no such command")
        arguments = _parser().parse_args(words)
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            arguments.run(arguments)
        sys.stdout.flush()
    except RadixqError as error:
        return _fail(str(error), error.exit_code)
    except TimeoutError as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Exit with one line, where argparse would print the usage before it."""
        sys.exit(_fail(f"{message}; see {self.prog} --help", InvalidRequest.exit_code))


def _parser() -> argparse.ArgumentParser:
    about = "Submit jobs to radixq workers and read their answers."
    parser = _Parser(prog="radixq", description=about, epilog=f"Reserved for later: {', '.join(_LATER)}.")
    parser.add_argument("--version", action="version", version=f"radixq {_version()}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    common = _Parser(add_help=False)
    common.add_argument("--redis", metavar="URL", help="else RADIXQ_REDIS_URL, RQ_REDIS_URL, redis://localhost:6379")
    common.add_argument("--json", action="store_true", help="print JSON")

    def command(name: str, run: Callable[[argparse.Namespace], None], about: str) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = commands.add_parser(name, parents=[common], help=about, description=about)
        added.set_defaults(run=run)
        return added

    _add_submit(command("submit", _submit, "submit one job and print its id, or with --wait its answer"))
    result = command("result", _result, "wait for a job and print its answer")
    result.add_argument("--timeout", type=float, metavar="S", help="give up waiting after this many seconds")
    for added in (result, command("status", _status, "print queued, running, finished, failed, ...")):
        added.add_argument("id", metavar="ID")
    command("cancel", _cancel, "cancel a job that has not ended").add_argument("id", metavar="ID")
    look = command("inspect", _inspect, "print what redis-cli would of a job's result, of a key, of all keys like it")
    _add_dead(command("dead", _dead, "list jobs that were given up, queue them again, or delete them"))
    look.add_argument("key", metavar="KEY-or-ID", help="a job's id, a key, or a pattern such as 'radixq:metrics:*'")
    return parser


def _add_submit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", metavar="TEXT", help="one user message; - reads it from stdin")
    for name, (kind, about) in _OPTIONS.items():
        parser.add_argument(f"--{name}", type=kind, help=about, metavar=name.upper().replace("-", "_"))
    parser.add_argument("--stop", action="append", metavar="STOP", help="ends the answer; may be given several times")
    parser.add_argument(
        "--image", action="append", type=Path, metavar="FILE", help="shown before TEXT; may be given several times"
    )
    parser.add_argument(
        "--depends-on", action="append", metavar="ID", help="run after this job; may be given several times"
    )
    parser.add_argument("--prompt", action="store_true", help="TEXT is a raw prompt: no chat template")
    parser.add_argument("--wait", action="store_true", help="wait for the answer and print it")
    parser.add_argument("--timeout", type=float, metavar="S", help="with --wait: give up waiting after this long")


def _submit(arguments: argparse.Namespace) -> None:
    text = _stdin() if arguments.text == "-" else arguments.text
    options: dict[str, Any] = {name.replace("-", "_"): getattr(arguments, name.replace("-", "_")) for name in _OPTIONS}
    options["prompt" if arguments.prompt else "text"] = text
    options |= {"stop": arguments.stop, "images": arguments.image, "depends_on": arguments.depends_on}
    ticket = submit(redis=arguments.redis, **options)
    if arguments.wait:
        _print_result(ticket, arguments)
    else:
        print(json.dumps({"id": ticket.id}) if arguments.json else ticket.id)


def _stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"stdin is not UTF-8: {error}", field="text") from error


def _result(arguments: argparse.Namespace) -> None:
    _print_result(get(arguments.id, redis=arguments.redis), arguments)


def _print_result(ticket: Ticket, arguments: argparse.Namespace) -> None:
    result = ticket.result(arguments.timeout)
    print(result.model_dump_json(exclude_none=True) if arguments.json else result.text)


def _status(arguments: argparse.Namespace) -> None:
    status = get(arguments.id, redis=arguments.redis).status()
    print(json.dumps({"id": arguments.id, "status": status}) if arguments.json else status)


def _cancel(arguments: argparse.Namespace) -> None:
    ticket = get(arguments.id, redis=arguments.redis)
    cancelled = ticket.cancel()
    status = ticket.status()
    if not cancelled:
        raise InvalidRequest(f"job {ticket.id} has already ended: {status}", field="id")
    print(json.dumps({"id": ticket.id, "status": status}) if arguments.json else status)


def _inspect(arguments: argparse.Namespace) -> None:
    with connect(arguments.redis, Settings.from_env()).speaking() as client:
        found = inspection.find(client, arguments.key)
    if not found:
        raise InvalidRequest(f"no key and no job {arguments.key!r} there", field="key")
    if arguments.json:
        print(json.dumps({key: inspection.plain(value) for key, value in found.items()}, ensure_ascii=False))
        return
    for key, value in found.items():
        if key not in (arguments.key, keys.result(arguments.key)):
            print(f"# {key}")  # one of several that match a pattern
        print(*inspection.lines(value), sep="\n")


def _add_dead(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["list", "requeue", "purge"], help="show them, queue again, or delete")
    parser.add_argument("ids", nargs="*", metavar="ID", help="with requeue and purge: which")
    parser.add_argument("--all", action="store_true", help="with requeue and purge: all that are listed")


def _dead(arguments: argparse.Namespace) -> None:
    settings = Settings.from_env()
    broker = connect(arguments.redis, settings)
    if (arguments.action == "list") == bool(arguments.ids or arguments.all) or (arguments.ids and arguments.all):
        raise InvalidRequest("radixq dead: list takes nothing more; requeue and purge take ids, or --all", field="ids")
    with broker.speaking() as client:
        entries = dead.listed(client)
        ids = list(dict.fromkeys(entry["job_id"] for entry in entries)) if arguments.all else arguments.ids
        if arguments.action == "requeue":
            entries = [
                {"job_id": job_id} for job_id in dead.requeue(client, ids, broker.now_s(), settings.max_job_bytes)
            ]
        elif arguments.action == "purge":
            entries = [{"job_id": job_id} for job_id in dead.purge(client, ids, settings.max_job_bytes)]
    if arguments.json:
        print(json.dumps(entries))
        return
    for entry in entries:
        print(*(entry.get(name, "-") for name in _DEAD_FIELDS) if arguments.action == "list" else entry.values())


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    """Print a warning like an error: Python's own form shows a line of our source."""
    _fail(f"warning: {message}", 0)


def _fail(message: str, code: int) -> int:
    print(f"radixq: {' '.join(message.split())}", file=sys.stderr)
    return code


def _version() -> str:
    try:
        return metadata.version("radixq")
    except metadata.PackageNotFoundError:
        return "(not installed: run from a checkout)"


if __name__ == "__main__":
    sys.exit(main())
