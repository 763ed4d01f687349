"""What anybody who can write to Redis may leave there: it fails with a reason, and a real worker goes on as before."""

from __future__ import annotations

import json
import os
import pickle
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from common import keys
from common.messages import WIRE_VERSION
from producer import GenerationFailed, get, submit
from producer.inspection import find
from tests.models import save_tiny
from tests.processes import Process, Processes, wait_until
from worker import server

QUEUE = "rq:queue:radixq"
MAX_JOB_BYTES = 1_000_000
GOOD = {"prompt": "once", "sampling": {"max_tokens": 2}}
HUGE = 100_000_000


def call(body: Any, function: str = keys.GENERATE) -> bytes:
    return json.dumps([function, None, [body], {}]).encode()


class Target:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self._path,)


class House:
    """One worker and its server, for all tests here; a test that ends the worker fails them all."""

    def __init__(self, url: str, worker: Process) -> None:
        self.url = url
        self.redis = Redis.from_url(url)
        self.worker = worker

    def put(self, job_id: str | bytes, data: bytes = call(GOOD), **fields: Any) -> bytes:
        """Queue a job by hand, as a foreign program would."""
        raw = job_id.encode() if isinstance(job_id, str) else job_id
        start = {"status": "queued", "origin": "radixq", "created_at": "2026-11-22T14:03:05.123456Z", "data": data}
        self.redis.hset(b"rq:job:" + raw, mapping=start | fields)
        self.redis.rpush(QUEUE, raw)
        return raw

    def result(self, raw: bytes) -> dict[str, str]:
        found: Any = self.redis.hgetall(b"radixq:result:" + raw)
        return {name.decode(): value.decode() for name, value in found.items()}

    def ended(self, raw: bytes) -> dict[str, str]:
        def look() -> dict[str, str] | None:
            assert self.worker.running, "the worker died"
            if self.redis.type(b"radixq:result:" + raw) != b"hash":
                return None
            fields = self.result(raw)
            return fields if fields.get("status") in ("finished", "failed", "cancelled", "expired") else None

        ended = wait_until(look, f"{raw!r} has ended")
        assert ended
        return ended

    def refused(self, raw: bytes, *says: str, code: str = "invalid_request") -> None:
        fields = self.ended(raw)
        assert (fields["status"], fields["error_code"]) == ("failed", code)
        assert all(word in fields["error_message"] for word in says), fields["error_message"]
        assert len(fields["error_message"]) < 600
        assert raw not in self.redis.lrange(QUEUE, 0, -1)
        assert self.redis.llen(f"{QUEUE}:intermediate") == 0

    def rss_bytes(self) -> int:
        """Resident memory of the worker and the process that reads the queues for it."""
        pids = [
            self.worker.pid,
            *map(int, Path(f"/proc/{self.worker.pid}/task/{self.worker.pid}/children").read_text().split()),
        ]
        return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 for pid in pids)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    directory = tmp_path_factory.mktemp("hostile")
    model = save_tiny(directory / "tiny")
    running = server.start(directory / "server", persistent=False)
    env = {"RADIXQ_MAX_ROWS": "4", "RADIXQ_WORKER_NAME": "mac", "RADIXQ_MAX_JOB_BYTES": str(MAX_JOB_BYTES)}
    try:
        with Processes(directory) as processes:
            worker = processes.rq_worker(running.url, "radixq", model=model, env=env)
            worker.wait_for_log("ready")
            house = House(running.url, worker)
            house.ended(house.put("warm"))
            yield house
            assert submit("hello", max_tokens=2, redis=running.url).result(timeout_s=60).text is not None
            assert worker.stop() == 0
            house.redis.close()
    finally:
        running.stop()


PAYLOADS: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "no data"),
    "not JSON": (lambda: b"{{{{", "cannot be read"),
    "half of it": (lambda: call(GOOD)[:-9], "cannot be read"),
    "cut zlib": (lambda: zlib.compress(call(GOOD))[:-9], "breaks off"),
    "not text": (lambda: b"\xff\xfe\x00", "neither JSON nor text"),
    "UTF-16": (lambda: json.dumps(["x"]).encode("utf-16"), "what RQ writes"),
    "another shape": (lambda: b'{"v": 1}', "what RQ writes"),
    "two arguments": (lambda: json.dumps([keys.GENERATE, None, [GOOD, GOOD], {}]).encode(), "exactly one argument"),
    "by name": (lambda: json.dumps([keys.GENERATE, None, [GOOD], {"a": 1}]).encode(), "exactly one argument"),
    "a method": (lambda: json.dumps([keys.GENERATE, {"a": 1}, [GOOD], {}]).encode(), "exactly one argument"),
    "a list": (lambda: call([1]), "exactly one argument"),
    "deep": (lambda: b"[" * 200_000 + b"]" * 200_000, "nested too deep"),
    "deep inside": (lambda: call(GOOD)[:-6] + b',"metadata":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_005, ""),
    "another function": (lambda: call("/tmp/x", "os.mkdir"), "runs only 'radixq.generate'"),
    "a huge function name": (lambda: call(GOOD, "x" * 900_000), "runs only 'radixq.generate'"),
    "unknown field": (lambda: call(GOOD | {"temperatur": 1}), "temperatur"),
    "lone surrogate": (lambda: call({"prompt": "\ud800"}), "prompt"),
    "surrogate in a name": (lambda: call(GOOD | {"\udfff": 1}), "surrogate"),
    "surrogate in a label": (lambda: call(GOOD | {"custom_id": "\ud800"}), "custom_id"),
    "NaN": (lambda: call({"prompt": "x", "sampling": {"temperature": float("nan")}}), "temperature"),
    "infinity": (lambda: call({"prompt": "x", "sampling": {"temperature": float("inf")}}), "temperature"),
    "a number of 5000 digits": (lambda: b'["radixq.generate",null,[{"v":' + b"9" * 5000 + b"}],{}]", "cannot be read"),
    "v is no number": (lambda: call(GOOD | {"v": "2"}), "v"),
    "v is nothing": (lambda: call(GOOD | {"v": 0}), "v"),
    "expires in words": (lambda: call(GOOD | {"v": 2, "expires_at": "tomorrow"}), "expires_at"),
    "expires on no day": (lambda: call(GOOD | {"v": 2, "expires_at": "2026-02-31T00:00:00Z"}), "expires_at"),
    "zip bomb": (lambda: zlib.compress(b"[" + b" " * HUGE * 3), "more than the 1,000,000"),
    "100 MB": (lambda: b" " * HUGE, "more than the 1,000,000"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ({"repeats_left": "1000000", "repeat_intervals": "[0]"}, "Repeat"),
        ({"rate_limit_key": "a\nb", "rate_limit_concurrency": "1"}, "RateLimit"),
    ],
)
def test_what_rq_offers_and_we_do_not_is_refused_by_name(house: House, asked: dict[str, Any], name: str) -> None:
    house.refused(house.put(f"asks-for-{name}", **asked), f"RQ's {name} is not supported", code="unsupported")


@pytest.mark.parametrize("what", PAYLOADS)
def test_a_payload_that_is_none_fails_with_a_reason(house: House, what: str) -> None:
    make, says = PAYLOADS[what]
    house.refused(house.put("payload-" + what.replace(" ", "-"), make()), says)


def test_a_pickle_fails_and_is_not_executed(house: House, tmp_path: Path) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        target = tmp_path / str(protocol)
        data = pickle.dumps(("os.getcwd", None, (Target(str(target)),), {}), protocol)
        for form, packed in {"plain": data, "packed": zlib.compress(data)}.items():
            house.refused(house.put(f"pickle-{protocol}-{form}", packed))
        house.refused(house.put(f"meta-{protocol}", b"{", meta=data))
        assert not target.exists()


FIELDS: dict[str, dict[str, Any]] = {
    "status": {"status": "evil"},
    "times": {"created_at": "yesterday", "enqueued_at": "-1", "started_at": "x"},
    "no text": dict.fromkeys(
        ("created_at", "worker_name", "description", "group_id", "success_callback_name"), b"\xff"
    ),
    "numbers": dict.fromkeys(("timeout", "retries_left", "result_ttl", "failure_ttl", "ttl"), "many"),
    "huge numbers": dict.fromkeys(("timeout", "retries_left", "result_ttl", "failure_ttl", "ttl"), "9" * 400),
    "negative numbers": dict.fromkeys(("timeout", "retries_left", "result_ttl", "failure_ttl", "ttl"), "-7"),
    "intervals": {"retry_intervals": '{"a": [1]}', "retries_left": "3"},
    "parents": {"dependency_ids": '{"a": 1}'},
    "parents by number": {"dependency_ids": "[1, [2], null]"},
    "deep meta": {"meta": "[" * 30_000 + "]" * 30_000},
    "meta that cannot be written": {"meta": '{"a": NaN, "b": "\\ud800"}'},
    "parents that cannot be written": {"dependency_ids": '["\\ud800"]'},
    "webhooks": {"webhooks": '[{"url": "http://127.0.0.1:1/", "statuses": ["finished"]}]'},
    "huge": dict.fromkeys(("description", "meta", "success_callback_name", "result", "exc_info"), b"x" * (HUGE // 5)),
    "huge and unknown": {"mine": b"x" * HUGE},
}


@pytest.mark.parametrize("what", FIELDS)
def test_fields_of_rqs_hash_that_rq_did_not_write_do_not_keep_the_job_from_its_answer(house: House, what: str) -> None:
    raw = house.put("fields-" + what.replace(" ", "-"), **FIELDS[what])
    assert house.ended(raw)["status"] == "finished"
    assert house.ended(raw)["attempts"] == "1"
    house.redis.delete(b"rq:job:" + raw)


@pytest.mark.parametrize("what", FIELDS)
def test_nor_do_they_keep_it_from_failing(house: House, what: str) -> None:
    raw = house.put("failing-" + what.replace(" ", "-"), b"", **FIELDS[what])
    house.refused(raw, "no data")
    house.redis.delete(b"rq:job:" + raw)


@pytest.mark.parametrize(
    "job_id", [b"a\nb", b"a b", b"\xff\xfe", b"", "\u00e9".encode(), b"my.job", b"a:b", b"x" * 400]
)
def test_an_id_that_rq_refuses_fails_with_a_reason(house: House, job_id: bytes) -> None:
    house.put(job_id)
    if len(job_id) < 300:
        house.refused(job_id, "letters, digits")
        assert 0 < house.redis.ttl(b"rq:job:" + job_id) <= 3600
    else:
        assert house.ended(job_id)["status"] == "finished"


def test_an_id_of_a_megabyte_leaves_the_queue(house: House) -> None:
    house.redis.rpush(QUEUE, b"x" * 1_000_000)
    wait_until(lambda: not house.redis.llen(QUEUE), "it is gone")
    assert not house.redis.exists(b"radixq:result:" + b"x" * 1_000_000)


WRONG_KEYS = (
    "rq:job:{}",
    "radixq:result:{}",
    "rq:job:{}:dependents",
    "rq:job::{}:dependencies",
    "rq:results:{}",
    "rq:executions:{}",
)


@pytest.mark.parametrize("kind", ["list", "string"])
@pytest.mark.parametrize("key", WRONG_KEYS)
def test_a_key_of_the_wrong_type_fails_its_job_by_name(house: House, key: str, kind: str) -> None:
    job_id = f"wrong-{WRONG_KEYS.index(key)}-{kind}"
    name = key.format(job_id)
    with house.redis.pipeline() as pipe:
        if not name.startswith("rq:job:wrong") or name.endswith("dependents"):
            pipe.hset(f"rq:job:{job_id}", mapping={"status": "queued", "origin": "radixq", "data": call(GOOD)})
        pipe.rpush(name, "x") if kind == "list" else pipe.set(name, "x")
        pipe.rpush(QUEUE, job_id)
        pipe.execute()
    house.refused(job_id.encode(), name, f"holds a {kind}")


def test_a_newer_wire_version_waits(house: House) -> None:
    raw = house.put("newer", call({"v": WIRE_VERSION + 1, "thought": 1}))
    house.ended(house.put("after"))
    assert house.redis.lrange(QUEUE, 0, -1) == [raw]
    house.redis.lrem(QUEUE, 1, raw.decode())


def test_bombs_that_wait_elsewhere_are_no_bombs(house: House) -> None:
    """RQ's scheduler, and what it does for dependents, would unpack them."""
    bomb = zlib.compress(b"[" + b" " * HUGE * 3)
    for job_id, status in (("later", "scheduled"), ("child", "deferred")):
        fields: dict[Any, Any] = {"status": status, "origin": "radixq", "data": bomb, "dependency_ids": '["parent"]'}
        house.redis.hset(f"rq:job:{job_id}", mapping=fields | {"created_at": "2026-11-22T14:03:05.123456Z"})
    strange: dict[Any, Any] = {"a\nb": 1, b"\xff": 1}
    house.redis.zadd("rq:scheduled:radixq", strange | {"later": 1})
    house.redis.zadd("rq:deferred:radixq", strange | {"child": 1})
    house.redis.sadd("rq:job:parent:dependents", "child")
    house.redis.sadd("rq:job::child:dependencies", "parent")
    house.ended(house.put("parent"))
    house.refused(b"later", "more than the 1,000,000")
    house.refused(b"child", "more than the 1,000,000")
    wait_until(lambda: not house.redis.zcard("rq:deferred:radixq"), "what is no job is gone from the registry")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_workers_memory_does_not_grow(house: House) -> None:
    def round_of(number: int) -> None:
        bomb = zlib.compress(b"[" + b" " * HUGE)
        ids = [house.put(f"big-{number}-{n}", data) for n, data in enumerate((bomb, b" " * HUGE, b"[" * 900_000))]
        ids += [house.put(f"fields-{number}", meta=b"x" * HUGE, description=b"y" * HUGE)]
        for raw in ids:
            house.ended(raw)
            house.redis.delete(b"rq:job:" + raw)

    round_of(0)
    before = house.rss_bytes()
    for number in range(1, 5):
        round_of(number)
    assert house.rss_bytes() - before < 60_000_000


def test_who_reads_about_it_is_not_hurt_either(house: House) -> None:
    raw = house.put("read", b"{{{")
    house.refused(raw, "cannot be read")
    house.redis.hset("radixq:result:read", mapping={"json": b"\xff{", "status": b"\xff", "expires_at": "never"})
    ticket = get("read", redis=house.url)
    assert ticket.status() == "failed"
    with pytest.raises(GenerationFailed, match="cannot be read"):
        ticket.result(timeout_s=5)
    assert find(house.redis, "read")
