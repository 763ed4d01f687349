"""`common.messages`: what is a job and a result on the wire, and that the committed schemas say the same."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from pydantic import ValidationError

from common.messages import Failure, GenerateJob, Result, Sampling, Timing, Usage

SCHEMAS = Path(__file__).resolve().parent.parent / "ops/schema"
HELLO = [{"role": "user", "content": "hello"}]
USAGE = {"prompt_tokens": 5, "cached_tokens": 3, "prefill_tokens": 2, "completion_tokens": 1}

GOOD_JOBS: list[dict[str, Any]] = [
    {"prompt": "Once"},
    {"v": 1, "messages": HELLO},
    {"v": 2, "prompt": "a"},
    {"messages": [{"role": "system", "content": ""}, {"role": "user", "content": [{"type": "text", "text": "a"}]}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "sha256:" + "0a" * 32}}]}]},
    {"prompt": "a", "sampling": {"max_tokens": 1, "temperature": 1, "seed": 0, "stop": ["\n"]}},
    {"prompt": "a", "model": "m", "metadata": {"k": "v"}, "chat_template_kwargs": {"a": [1]}, "custom_id": "c"},
]
BAD_JOBS: list[dict[str, Any]] = [
    {},
    {"prompt": ""},
    {"prompt": "a", "messages": HELLO},
    {"messages": []},
    {"messages": [{"role": "tool", "content": "a"}]},
    {"messages": [{"role": "user", "content": "a", "name": "b"}]},
    {"messages": [{"role": "user", "content": [{"type": "sound"}]}]},
    *(
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}
        for url in ("", "data:,", "sha256:", "sha256:" + "0A" * 32, "0a" * 32, 5)
    ),
    {"prompt": "a", "max_tokens": 3},
    {"prompt": "a", "v": 0},
    {"prompt": "a", "v": "1"},
    {"prompt": "a", "sampling": {"max_tokens": 0}},
    {"prompt": "a", "sampling": {"max_tokens": "3"}},
    {"prompt": "a", "sampling": {"temperature": "0"}},
    {"prompt": "a", "sampling": {"top_p": 0}},
    {"prompt": "a", "sampling": {"seed": 2**63}},
    {"prompt": "a", "sampling": {"stop": [""]}},
    {"prompt": "a", "sampling": {"n": 2}},
    {"prompt": "a", "metadata": {"k": 1}},
    {"prompt": "a", "model": ""},
]


def validator(name: str) -> Draft202012Validator:
    return Draft202012Validator(json.loads((SCHEMAS / name).read_text()))


@pytest.mark.parametrize("name", ["generate_job.json", "result.json"])
def test_the_committed_schema_is_the_generated_one(name: str) -> None:
    generated = runpy.run_path(str(SCHEMAS / "write.py"))["schema"](name)
    assert (SCHEMAS / name).read_text() == generated, "run python ops/schema/write.py"
    Draft202012Validator.check_schema(json.loads(generated))


@pytest.mark.parametrize("job", GOOD_JOBS)
def test_model_and_schema_accept_a_good_job(job: dict[str, Any]) -> None:
    validator("generate_job.json").validate(job)
    parsed = GenerateJob.model_validate(job)
    assert GenerateJob.model_validate_json(parsed.model_dump_json()) == parsed


@pytest.mark.parametrize("job", BAD_JOBS)
def test_model_and_schema_refuse_a_bad_job(job: dict[str, Any]) -> None:
    assert not validator("generate_job.json").is_valid(job)
    with pytest.raises(ValidationError):
        GenerateJob.model_validate(job)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, True])
def test_a_temperature_that_is_no_temperature_is_refused(value: Any) -> None:
    with pytest.raises(ValidationError):
        Sampling(temperature=value)


def test_one_stop_string_is_a_list_of_one() -> None:
    assert Sampling.model_validate({"stop": "\n"}).stop == ("\n",)
    assert Sampling.model_validate({"stop": None}).stop == ()


def test_a_job_knows_how_much_text_and_how_many_pictures_it_holds() -> None:
    picture = {"type": "image_url", "image_url": {"url": "sha256:" + "0a" * 32}}
    content = [{"type": "text", "text": "ab"}, picture, {"type": "text", "text": "c"}, picture]
    job = GenerateJob.model_validate(
        {"messages": [{"role": "system", "content": "de"}, {"role": "user", "content": content}]}
    )
    assert (job.num_chars, job.num_images) == (5, 2)
    assert job.digests == ("0a" * 32,) * 2
    assert job.messages
    assert job.messages[1].text == "abc"
    assert (GenerateJob(prompt="abcd").num_chars, GenerateJob(prompt="a").num_images) == (4, 0)


def test_a_job_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        GenerateJob(prompt="a").prompt = "b"


def test_token_counts_must_add_up() -> None:
    with pytest.raises(ValidationError, match="must equal"):
        Usage.model_validate({**USAGE, "cached_tokens": 4})


def test_a_result_is_a_flat_hash_of_plain_strings() -> None:
    timing = Timing(submitted_at="2026-11-22T14:03:05.123Z", queued_ms=12.0, decode_ms=0.12345, total_ms=1e6)
    result = Result(id="x", status="finished", text="", finish_reason="stop", usage=Usage(**USAGE), timing=timing)
    fields = result.to_hash()
    assert Result.model_validate_json(fields.pop("json")) == result
    assert fields == {
        "status": "finished",
        "text": "",
        "finish_reason": "stop",
        "prompt_tokens": "5",
        "cached_tokens": "3",
        "prefill_tokens": "2",
        "completion_tokens": "1",
        "attempts": "1",
        "submitted_at": "2026-11-22T14:03:05.123Z",
        "queued_ms": "12",
        "decode_ms": "0.123",
        "total_ms": "1000000",
    }


def test_a_failure_is_two_flat_fields_and_has_no_text() -> None:
    result = Result(id="x", status="failed", error=Failure(code="internal", message="why"))
    fields = result.to_hash()
    assert "text" not in fields
    assert (fields["error_code"], fields["error_message"]) == ("internal", "why")
    validator("result.json").validate(json.loads(fields["json"]))


def test_a_reader_ignores_what_a_newer_worker_added() -> None:
    newer = {"id": "x", "status": "finished", "text": "a", "mood": "fine", "usage": {**USAGE, "thinking_tokens": 0}}
    assert Result.model_validate(newer).text == "a"
    validator("result.json").validate(newer)
