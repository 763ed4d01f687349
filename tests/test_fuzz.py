"""Whatever bytes lie in Redis: a payload is a job, a refusal by name, or left to a newer worker. Nothing else happens.

A short run for the gate; `ops/fuzz` runs the same for as long as one likes and writes down what fails.
"""

from __future__ import annotations

import json
import os
import pickle
import zlib
from typing import Any, Final

from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from redis import Redis
from rq.job import Job

from common import keys
from common.errors import InvalidRequest
from common.history import History, labels
from common.messages import GenerateJob, Result
from common.serializer import JobSerializer, unpack
from common.words import texts
from producer.request import parse
from worker.job import DAMAGED, QueuedJob
from worker.prepare import read_job
from worker.reject import is_id, to_bytes, to_text

MAX_BYTES: Final = 4_096
SCALAR: Final[st.SearchStrategy[Any]] = (
    st.none() | st.booleans() | st.integers() | st.integers(10**300, 10**310) | st.floats()
    | st.text(st.characters(codec=None), max_size=8)
    | st.sampled_from(["user", "text", "image_url", "data:,", "sha256:" + "0" * 64, "2026-11-22T14:03:05Z"])
    | st.sampled_from(["9999-12-31T23:59:59+00:01", "0001-01-01T00:00:00+23:59", "2026-13-01T00:00:00Z"])
)  # fmt: skip
NAME: Final = st.sampled_from(
    [*GenerateJob.model_fields, "max_tokens", "stop", "role", "content", "type", "text", "url", "image_url", "detail"]
) | st.text(st.characters(codec=None), max_size=4)
TREE: Final = st.recursive(
    SCALAR, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAME, inner, max_size=5), max_leaves=12
)
BODY: Final = st.dictionaries(NAME, TREE, max_size=6)
CALL: Final = st.tuples(
    st.just(keys.GENERATE) | SCALAR, st.none() | TREE, st.lists(BODY | TREE, max_size=2), BODY | TREE
)
JSON: Final = (CALL | TREE).map(lambda value: json.dumps(value).encode(errors="surrogatepass"))
BYTES: Final = (
    st.binary(max_size=64)
    | JSON
    | JSON.map(zlib.compress)
    | st.tuples(JSON.map(zlib.compress), st.integers(0, 60)).map(lambda pair: pair[0][: pair[1]])
    | st.tuples(JSON, st.integers(0, 80), st.binary(min_size=1, max_size=3)).map(
        lambda three: three[0][: three[1]] + three[2] + three[0][three[1] :]
    )
    | TREE.map(lambda value: pickle.dumps(value))
    | st.integers(1, 4).map(lambda n: zlib.compress(b"[" * n * 100_000))
)
FUZZ: Final = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    max_examples=int(os.environ.get("RADIXQ_TEST_FUZZ_EXAMPLES", "150")),
)


def check_reason(error: InvalidRequest) -> None:
    reason = str(error)
    assert reason
    assert len(reason) < 1_000
    reason.encode()  # it goes into a result


@FUZZ
@given(BYTES)
@example(b"[" * 100_000)
@example(b'["radixq.generate",null,[{"v":' + b"9" * 5_000 + b"}],{}]")
@example(b'["radixq.generate",null,[{"prompt":"\\ud800"}],{}]')
@example(b'["radixq.generate",null,[{"v":1e400,"prompt":"x"}],{}]')
@example(b"\x80\x05N.")
def test_any_payload_is_a_job_a_refusal_or_left_alone(data: bytes) -> None:
    try:
        job = read_job(data, max_bytes=MAX_BYTES)
    except InvalidRequest as error:
        check_reason(error)
        return
    if job is not None:
        again = JobSerializer.loads(JobSerializer.dumps(job.model_dump(mode="json")))
        assert GenerateJob.model_validate(again) == job
        assert job.expires_s > 0


@FUZZ
@given(BODY)
def test_any_body_is_a_job_or_a_refusal_and_its_labels_can_be_written(body: dict[str, Any]) -> None:
    assume("v" not in body)
    data = json.dumps([keys.GENERATE, None, [body], {}]).encode()
    try:
        read_job(data, max_bytes=10 * MAX_BYTES)
    except InvalidRequest as error:
        check_reason(error)
    found = labels(json.loads(data)[2][0])
    fields = Result(id="x", status="failed", **found).to_hash()
    for value in fields.values():
        value.encode()


@FUZZ
@given(st.binary(max_size=200) | JSON | JSON.map(zlib.compress), st.integers(1, 300))
def test_unpacking_never_gives_more_than_was_asked_for(data: bytes, most: int) -> None:
    assert len(unpack(data, most)) <= most


HASH: Final = st.dictionaries(
    st.sampled_from(
        ["created_at", "origin", "worker_name", "description", "enqueued_at", "started_at", "timeout", "result_ttl"]
        + ["failure_ttl", "status", "success_callback_name", "success_callback_timeout", "dependency_ids", "meta"]
        + ["allow_dependency_failures", "enqueue_at_front", "ttl", "number_of_retries", "retries_left"]
        + ["retry_intervals", "enqueue_at_front_on_retry", "group_id", "data"]
    ).map(str.encode),
    st.binary(max_size=12) | st.integers().map(lambda n: str(n).encode()) | JSON | st.just(b"9" * 400),
    max_size=8,
)


@FUZZ
@given(HASH)
@example({b"timeout": b"9" * 400})
@example({b"retries_left": b"9" * 400, b"retry_intervals": b'["x"]'})
@example({b"data": b"{", b"dependency_ids": b"5"})
@example({b"meta": b"5"})
@example({b"meta": b'{"a":NaN,"b":"\\ud800"}'})
@example({b"dependency_ids": b'["\\ud800"]'})
def test_any_hash_is_a_job_or_damaged_and_what_rq_would_write_of_it_can_be_written(raw: dict[bytes, bytes]) -> None:
    job = QueuedJob("x", connection=Redis())
    try:
        job.restore(raw)
    except DAMAGED:
        return
    assert job.timeout is None or -1 <= job.timeout <= 365 * 86_400
    assert (job.retries_left or 0) in range(26)
    assert not job.retries_left or job.get_retry_interval() >= 0
    written = job.to_dict()
    assert "data" not in written or not raw.get(b"data")
    "".join(texts(value for value in written.values() if not isinstance(value, bytes))).encode()
    job.body(MAX_BYTES)
    assert all(isinstance(one, str) for one in job._dependency_ids)


@FUZZ
@given(st.tuples(JSON | st.binary(max_size=9), st.none() | st.binary(max_size=9), st.none() | st.binary(max_size=9)))
def test_any_history_can_be_read_and_written(values: tuple[bytes, bytes | None, bytes | None]) -> None:
    Result(id="x", status="failed", **History.read(values).fields()).to_hash()["json"].encode()


@FUZZ
@given(st.binary(max_size=12))
def test_any_id_is_itself_again_and_rq_accepts_those_that_we_do(raw: bytes) -> None:
    job_id = to_text(raw)
    assert to_bytes(job_id) == raw
    if is_id(job_id):
        assert Job(job_id, connection=Redis()).id == job_id


FIELD: Final = st.sampled_from(
    ["text", "prompt", "messages", "metadata", "stop", "expires_at", "idempotency_key", "depends_on", "on_success"]
)


@FUZZ
@given(st.dictionaries(FIELD, TREE, max_size=5))
def test_any_arguments_are_a_request_or_a_refusal_with_a_field(fields: dict[str, Any]) -> None:
    refusal: InvalidRequest | None = None
    try:
        assert len(parse(fields, max_bytes=MAX_BYTES).sha) == 64
    except InvalidRequest as error:
        refusal = error
    assert refusal is None or refusal.field
