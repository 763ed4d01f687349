"""The `radixq` command: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from common import keys
from common.messages import Failure, Result
from producer import waiting
from producer.cli import main

ROOT = Path(__file__).resolve().parent.parent


class Said:
    """What one call of the command left behind."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def radixq(redis_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Call the command on the test's server."""
    monkeypatch.setenv("RADIXQ_REDIS_URL", redis_url)

    def call(*words: str) -> Said:
        try:
            code = main(words)
        except SystemExit as end:
            code = int(end.code or 0)
        return Said(code, *capsys.readouterr())

    return call


def ends(redis: Redis, job_id: str, **fields: Any) -> None:
    with redis.pipeline() as pipe:
        pipe.hset(f"rq:job:{job_id}", "status", "finished" if fields["status"] == "finished" else "failed")
        pipe.hset(keys.result(job_id), mapping=Result(id=job_id, **fields).to_hash())  # type: ignore[arg-type]
        pipe.execute()


def test_submit_prints_the_id_and_status_where_it_stands(radixq: Any, redis: Redis) -> None:
    said = radixq("submit", "hello", "--system", "Be brief.", "--max-tokens", "4", "--stop", "a", "--stop", "b")
    job_id = said.out.strip()
    assert (said.code, said.err) == (0, "")
    assert redis.lrange("rq:queue:radixq", 0, -1) == [job_id.encode()]
    assert radixq("status", job_id).out == "queued\n"
    assert json.loads(radixq("status", job_id, "--json").out) == {"id": job_id, "status": "queued"}


@pytest.mark.filterwarnings("default::producer.NoWorkerWarning")
def test_a_warning_is_one_line_like_an_error(radixq: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "NO_WORKER_AFTER_S", 0.1)
    said = radixq("submit", "hello", "--wait", "--timeout", "1")
    warning, error = said.err.splitlines()
    assert warning.startswith("radixq: warning: waited ")
    assert error.startswith("radixq: job ")


def test_every_option_of_submit_reaches_the_job(radixq: Any, redis: Redis) -> None:
    words = "--prompt --max-tokens 4 --temperature 0.5 --top-p 0.9 --top-k 5 --min-p 0.1 --seed 7 --model m"
    said = radixq("submit", "Once", *words.split(), "--queue", "q", "--job-id", "x", "--timeout-s", "9", "--json")
    assert json.loads(said.out) == {"id": "x"}
    assert redis.hget("rq:job:x", "timeout") == b"9"
    assert redis.hget("rq:job:x", "description") == b"prompt, 4 characters"
    shown = json.loads(radixq("inspect", "rq:queue:q", "--json").out)
    assert shown == {"rq:queue:q": ["x"]}


def test_submit_takes_keys_lengths_parents_and_times(radixq: Any, redis: Redis) -> None:
    first = radixq("submit", "a", "--idempotency-key", "k", "--expires-at", "60").out
    assert radixq("submit", "a", "--idempotency-key", "k", "--expires-at", "2099-01-01T00:00:00Z").out == first
    radixq("submit", "b", "--depends-on", first.strip(), "--job-id", "child")
    assert redis.hget("rq:job:child", "status") == b"deferred"
    full = radixq("submit", "c", "--max-queue-length", "1")
    assert (full.code, "holds 1 waiting job" in full.err) == (6, True)
    wrong = radixq("submit", "c", "--expires-at", "soon")
    assert (wrong.code, "moment" in wrong.err) == (2, True)


def test_the_text_can_come_from_stdin(redis_url: str, redis: Redis) -> None:
    command = [sys.executable, "-m", "producer.cli", "submit", "-", "--redis", redis_url, "--job-id", "x"]
    done = subprocess.run(command, input=b"h\xc3\xa9llo", capture_output=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"x\n", b"")
    assert redis.hget("rq:job:x", "description") == b"chat, 5 characters"
    done = subprocess.run(command, input=b"\xff", capture_output=True, cwd=ROOT)
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
    assert b"stdin is not UTF-8" in done.stderr


def test_result_prints_the_text_or_all_of_it(radixq: Any, redis: Redis) -> None:
    radixq("submit", "hello", "--job-id", "x")
    ends(redis, "x", status="finished", text="good day", finish_reason="stop")
    assert radixq("result", "x").out == "good day\n"
    assert json.loads(radixq("result", "x", "--json").out)["finish_reason"] == "stop"


def test_submit_wait_prints_the_answer(redis_url: str, redis: Redis) -> None:
    command = [sys.executable, "-m", "producer.cli", "submit", "hi", "--wait", "--redis", redis_url, "--job-id", "x"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as waits:
        while not redis.exists("rq:job:x"):
            assert waits.poll() is None
        ends(redis, "x", status="finished", text="good day")
        assert waits.communicate()[0] == b"good day\n"
    assert waits.returncode == 0


def test_a_result_that_does_not_come_in_time_is_an_error(radixq: Any) -> None:
    radixq("submit", "hello", "--job-id", "x")
    said = radixq("result", "x", "--timeout", "0.1")
    assert (said.code, said.out) == (1, "")
    assert said.err.startswith("radixq: job x has not ended within 0.1 s")


def test_a_failed_job_is_an_error_with_its_reason(radixq: Any, redis: Redis) -> None:
    radixq("submit", "hello", "--job-id", "x")
    ends(redis, "x", status="failed", error=Failure(code="unsupported", message="two\nlines"))
    said = radixq("result", "x")
    assert (said.code, said.out, said.err) == (5, "", "radixq: job x failed: two lines\n")


def test_cancel_cancels_once(radixq: Any) -> None:
    radixq("submit", "hello", "--job-id", "x")
    assert radixq("cancel", "x").out == "cancelled\n"
    said = radixq("cancel", "x")
    assert (said.code, said.err) == (2, "radixq: job x has already ended: cancelled\n")
    assert radixq("status", "x").out == "cancelled\n"


# --- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_prints_a_result_as_redis_cli_prints_a_hash(radixq: Any, redis: Redis) -> None:
    redis.hset("radixq:result:x", mapping={"status": "finished", "text": 'a "b"\n\u00e9'})
    expected = '1) "status"\n2) "finished"\n3) "text"\n4) "a \\"b\\"\\n\u00e9"\n'
    assert radixq("inspect", "x").out == expected
    assert radixq("inspect", "radixq:result:x").out == expected
    assert json.loads(radixq("inspect", "x", "--json").out)["radixq:result:x"]["text"] == 'a "b"\n\u00e9'


def test_inspect_prints_every_type_of_key(radixq: Any, redis: Redis) -> None:
    redis.set("s", b"\xff\x00")
    redis.rpush("l", *"abcdefghij")
    redis.sadd("set", "b", "a")
    redis.zadd("z", {"one": 1, "half": 0.5})
    redis.xadd("radixq:dead", {"id": "x", "why": "crash"}, id="5-1")
    assert radixq("inspect", "s").out == '"\\xff\\x00"\n'
    assert radixq("inspect", "l").out.splitlines()[::9] == [' 1) "a"', '10) "j"']
    assert radixq("inspect", "set").out == '1) "a"\n2) "b"\n'
    assert radixq("inspect", "z").out == '1) "half"\n2) "0.5"\n3) "one"\n4) "1"\n'
    assert radixq("inspect", "radixq:dead").out == (
        '1) 1) "5-1"\n   2) 1) "id"\n      2) "x"\n      3) "why"\n      4) "crash"\n'
    )


def test_inspect_takes_a_pattern(radixq: Any, redis: Redis) -> None:
    for worker in ("b", "a"):
        redis.hset(f"radixq:metrics:{worker}", "state", worker)
    assert radixq("inspect", "radixq:metrics:*").out == (
        '# radixq:metrics:a\n1) "state"\n2) "a"\n# radixq:metrics:b\n1) "state"\n2) "b"\n'
    )


@pytest.mark.parametrize("key", ["nothing", "nothing:*"])
def test_inspect_of_nothing_is_an_error(key: str, radixq: Any) -> None:
    said = radixq("inspect", key)
    assert (said.code, said.err) == (2, f"radixq: no key and no job '{key}' there\n")


# --- errors and help -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ([], 2, "COMMAND"),
        (["bogus"], 2, "bogus"),
        (["submit"], 2, "TEXT"),
        (["submit", "a", "--bogus"], 2, "--bogus"),
        (["submit", "a", "--max-tokens", "x"], 2, "--max-tokens"),
        (["submit", "a", "--max-tokens", "-1"], 2, "max_tokens=-1"),
        (["submit", "a", "--temperature", "nan"], 2, "temperature=nan"),
        (["submit", ""], 2, "text is empty"),
        (["status", "nobody"], 2, "no job 'nobody'"),
        (["status", "a:b"], 2, "job_id='a:b'"),
        (["status", "a", "--redis", "redis://127.0.0.1:1"], 4, "cannot reach Redis at 127.0.0.1:1"),
        (["status", "a", "--redis", "nonsense"], 2, "nonsense"),
        (["batch", "in.jsonl", "--out", "x"], 2, "radixq batch comes later"),
        (["top"], 2, "radixq top comes later"),
        (["top", "--help"], 2, "radixq top comes later"),
        (["why", "x"], 2, "radixq why comes later"),
    ],
)
def test_an_error_is_one_line_on_stderr_and_an_exit_code(words: list[str], code: int, says: str, radixq: Any) -> None:
    said = radixq(*words)
    assert (said.code, said.out, said.err.count("\n")) == (code, "", 1)
    assert said.err.startswith("radixq: ")
    assert says in said.err


def test_a_wrong_setting_is_an_error(radixq: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RADIXQ_RESULT_TTL", "5")
    said = radixq("status", "x")
    assert (said.code, said.err) == (
        2,
        "radixq: unknown setting RADIXQ_RESULT_TTL; did you mean RADIXQ_RESULT_TTL_S?\n",
    )


@pytest.mark.parametrize("command", [[], ["submit"], ["result"], ["status"], ["cancel"], ["inspect"]])
def test_every_command_explains_itself(command: list[str], radixq: Any) -> None:
    said = radixq(*command, "--help")
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith("usage: radixq")
    if command:
        assert "--redis" in said.out
        assert "--json" in said.out


def test_version_is_one_line(radixq: Any) -> None:
    assert re.fullmatch(r"radixq \S.*\n", radixq("--version").out)


def test_a_reader_that_leaves_early_is_no_error(redis_url: str, redis: Redis) -> None:
    redis.rpush("long", *["x" * 100] * 5_000)
    command = [sys.executable, "-m", "producer.cli", "inspect", "long", "--redis", redis_url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as writer:
        assert writer.stdout
        assert writer.stderr
        writer.stdout.readline()
        writer.stdout.close()
        assert writer.stderr.read() == b""
    assert writer.returncode == 0
