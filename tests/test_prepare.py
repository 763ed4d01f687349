"""Jobs become tokens exactly as in mlx-lm, or are refused with a sentence that says what to do."""

from __future__ import annotations

import json
import pickle
import zlib
from dataclasses import replace
from typing import Any

import mlx_lm
import pytest

from common.errors import ContextLengthExceeded, InvalidRequest, Unsupported
from common.messages import WIRE_VERSION, GenerateJob, Sampling
from common.settings import Settings
from tests.models import EOS, tiny, tiny_tokenizer
from worker.prepare import prepare, read_job, seeded
from worker.reader import LoadedTokenizer

MAX_BYTES = 10_000
SETTINGS = Settings.from_env({"RADIXQ_MAX_TOKENS": "50"})
SECRET = "the patient is called Anna"  # stands in a prompt, and so in no message

PICTURE = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{SECRET}"}}


@pytest.fixture
def loaded() -> LoadedTokenizer:
    return LoadedTokenizer(tiny_tokenizer(), "tiny", 200, frozenset({EOS}))


def chat(*turns: tuple[str, str], **more: Any) -> GenerateJob:
    return GenerateJob.model_validate({"messages": [{"role": role, "content": text} for role, text in turns], **more})


def wire(*args: Any, function: str = "radixq.generate", instance: Any = None, **named: Any) -> bytes:
    return zlib.compress(json.dumps([function, instance, list(args), named]).encode())


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_a_chat_gets_the_tokens_of_the_models_template(loaded: LoadedTokenizer) -> None:
    prompt = prepare(chat(("system", "Be brief."), ("user", "Hi <|im_end|>")), loaded, SETTINGS)
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    assert prompt.tokens.tolist() == loaded.tokenizer.encode(text, add_special_tokens=False)
    assert prompt.tokens.tolist().count(EOS) == 3  # special tokens in a message count, as in mlx-lm
    assert prompt.branches == ()


def test_special_tokens_in_a_message_stay_text_when_the_job_asks_for_it(loaded: LoadedTokenizer) -> None:
    job = chat(("user", "Hi <|im_end|>"), chat_template_kwargs={"sanitize_control_tokens": True})
    tokens = prepare(job, loaded, SETTINGS).tokens.tolist()
    assert tokens.count(EOS) == 1
    assert loaded.tokenizer.decode(tokens).count("<|im_end|>") == 2


def test_text_parts_of_a_message_are_joined(loaded: LoadedTokenizer) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    in_parts = GenerateJob.model_validate({"messages": [{"role": "user", "content": parts}]})
    assert prepare(in_parts, loaded, SETTINGS).tokens.tolist() == (
        prepare(chat(("user", "Hello")), loaded, SETTINGS).tokens.tolist()
    )


@pytest.mark.parametrize("bos", [None, "<note>"])
@pytest.mark.parametrize("text", ["Once upon a time", "<note>Once", "<|im_start|>user\nHi<|im_end|>", " "])
def test_a_raw_prompt_gets_the_tokens_that_mlx_lm_computes(
    loaded: LoadedTokenizer, monkeypatch: pytest.MonkeyPatch, bos: str | None, text: str
) -> None:
    from tokenizers.processors import TemplateProcessing

    if bos is not None:
        inner = loaded.tokenizer._tokenizer
        inner.bos_token = bos
        processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, inner.convert_tokens_to_ids(bos))])
        inner.backend_tokenizer.post_processor = processor
    model = tiny()
    seen: list[int] = []
    monkeypatch.setattr(type(model), "__call__", _recording(type(model).__call__, seen))
    mlx_lm.generate(model, loaded.tokenizer, prompt=text, max_tokens=1)
    ours = prepare(GenerateJob(prompt=text), loaded, SETTINGS).tokens.tolist()
    assert ours == seen[: len(ours)]
    assert len(ours) == len(seen) - 1 or len(ours) == len(seen)  # the generated token may be fed once more


def _recording(call: Any, seen: list[int]) -> Any:
    def record(self: Any, inputs: Any, *args: Any, **named: Any) -> Any:
        seen.extend(inputs.reshape(-1).tolist())
        return call(self, inputs, *args, **named)

    return record


def test_the_jobs_template_variables_win_over_the_settings(loaded: LoadedTokenizer) -> None:
    loaded.tokenizer._tokenizer.chat_template = "{{ a }}{{ b }}"
    settings = Settings.from_env({"RADIXQ_CHAT_TEMPLATE_KWARGS": '{"a": "1", "b": "2"}'})
    tokens = prepare(chat(("user", "x"), chat_template_kwargs={"b": "3"}), loaded, settings).tokens
    assert loaded.tokenizer.decode(tokens.tolist()) == "13"


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "messages", "truncation"])
def test_arguments_of_the_tokenizer_are_no_template_variables(loaded: LoadedTokenizer, name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"'{name}'"):
        prepare(chat(("user", "x"), chat_template_kwargs={name: "x"}), loaded, SETTINGS)


def test_what_the_template_raises_is_the_refusal(loaded: LoadedTokenizer) -> None:
    loaded.tokenizer._tokenizer.chat_template = "{{ raise_exception('Roles must alternate user/assistant') }}"
    with pytest.raises(InvalidRequest, match="tiny cannot render these messages: Roles must alternate user/assistant"):
        prepare(chat(("user", "x"), ("user", "y")), loaded, SETTINGS)


@pytest.mark.parametrize("template", ["{{ messages[0].content + 1 }}", "{{ messages[9].content.x }}", "{{ 1 / 0 }}"])
def test_a_template_that_breaks_refuses_the_job_without_quoting_it(loaded: LoadedTokenizer, template: str) -> None:
    loaded.tokenizer._tokenizer.chat_template = template
    with pytest.raises(InvalidRequest, match="cannot render") as refused:
        prepare(chat(("user", SECRET)), loaded, SETTINGS)
    assert SECRET not in str(refused.value)


def test_a_prompt_without_tokens_is_refused(loaded: LoadedTokenizer) -> None:
    loaded.tokenizer._tokenizer.chat_template = "{# nothing #}"
    with pytest.raises(InvalidRequest, match="no tokens"):
        prepare(chat(("user", "x")), loaded, SETTINGS)


def test_a_picture_is_refused_with_the_way_to_serve_it(loaded: LoadedTokenizer) -> None:
    picture = {"type": "image_url", "image_url": {"url": "sha256:" + "0a" * 32}}
    job = GenerateJob.model_validate({"messages": [{"role": "user", "content": [picture]}]})
    with pytest.raises(Unsupported, match=r"tiny takes none here: it reads text only.*radixq\[vision\]"):
        prepare(job, loaded, SETTINGS)


@pytest.mark.parametrize(("asked", "given"), [(None, 50), (7, 7), (10_000, 190)])
def test_max_tokens_is_the_jobs_else_the_settings_but_never_more_than_fits(
    loaded: LoadedTokenizer, asked: int | None, given: int
) -> None:
    job = GenerateJob.model_validate({"prompt": "0123456789", "sampling": {"max_tokens": asked}})
    assert prepare(job, loaded, SETTINGS).sampling.max_tokens == given


def test_a_prompt_that_leaves_no_room_for_one_token_is_refused_with_both_figures(loaded: LoadedTokenizer) -> None:
    ten = replace(loaded, context_length=10)
    assert prepare(GenerateJob(prompt="012345678"), ten, SETTINGS).sampling.max_tokens == 1
    with pytest.raises(ContextLengthExceeded, match="has 10 tokens.*holds 10 "):
        prepare(GenerateJob(prompt="0123456789"), ten, SETTINGS)


# -- the wire ----------------------------------------------------------------------------------------------------------


def test_a_job_is_read_compressed_or_not() -> None:
    data = wire({"prompt": "x"})
    job = GenerateJob(prompt="x")
    assert read_job(data, max_bytes=MAX_BYTES) == read_job(zlib.decompress(data), max_bytes=MAX_BYTES) == job


def test_a_newer_wire_version_is_left_whatever_it_holds() -> None:
    assert read_job(wire({"v": WIRE_VERSION + 1, "thoughts": "x"}), max_bytes=MAX_BYTES) is None


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (pickle.dumps(print), "written with pickle"),
        (zlib.compress(pickle.dumps(print)), "written with pickle"),
        (b"", "breaks off"),
        (b"prompt", "cannot be read"),
        (b"\xff\xfe\xff", "neither JSON nor text"),
        (b"[" * 9_000, "nested too deep"),
        (zlib.compress(b"[1, 2, 3, 4]")[:-6], "breaks off"),
        (b'{"prompt": "x"}', "not what RQ writes"),
        (wire({"prompt": "x"}, function="os.system"), "calls 'os.system', but this worker runs only 'radixq.generate'"),
        (wire({"prompt": "x"}, {}), "exactly one argument"),
        (wire(prompt="x"), "exactly one argument"),
        (wire("x"), "exactly one argument"),
        (wire({"prompt": "x"}, instance="x"), "exactly one argument"),
        (wire({}), "either messages or prompt"),
        (wire({"prompt": "x", "best_of": 2}), "unknown field 'best_of'"),
        (wire({"prompt": "x", "sampling": {"beam": 2}}), "unknown field 'sampling.beam'"),
        (wire({"prompt": "x", "sampling": {"max_tokens": -3}}), "sampling.max_tokens: .* got -3"),
        (wire({"prompt": "x", "sampling": {"temperature": float("nan")}}), "sampling.temperature: .* got NaN"),
        (wire({"prompt": "x", "v": "2"}), "v: .* got a string"),
        (wire({"prompt": "x", "v": 0}), "v: .* got 0"),
        (wire({"messages": [{"role": "wizard", "content": SECRET}]}), r"messages\[0\].role: "),
        (wire({"messages": [{"role": "user"}]}), r"messages\[0\].content: "),
        (wire({"messages": [{"role": "user", "content": [SECRET]}]}), r"messages\[0\].content"),
        (wire({"messages": SECRET}), "messages: .* got a string"),
        (wire({"messages": [{"role": "user", "content": [PICTURE]}]}), r"content\[0\]\.image_url\.url: must be sha256"),
        (wire({"prompt": [SECRET]}), "prompt: .* got a list"),
        (wire({"prompt": ""}), "prompt: "),
        (wire({"prompt": "\ud800"}), "prompt: .* lone surrogate"),
        (wire({"prompt": "x", "custom_id": "\udfff"}), "custom_id: .* lone surrogate"),
        (wire({"prompt": "x", "metadata": {"\ud800": "v"}}), "metadata: .* lone surrogate"),
        (wire({"prompt": "x", "\ud800": 1}), r"\\ud800: .* lone surrogate"),
    ],
)
def test_bad_input_is_refused_with_a_sentence_that_does_not_quote_the_prompt(data: bytes, sentence: str) -> None:
    with pytest.raises(InvalidRequest, match=sentence) as refused:
        read_job(data, max_bytes=MAX_BYTES)
    assert SECRET not in str(refused.value)


def test_a_job_that_unpacks_to_more_than_allowed_is_refused_before_it_is_unpacked() -> None:
    bomb = zlib.compress(b" " * 50_000_000)
    with pytest.raises(InvalidRequest, match=r"at least 10,001 bytes, more than the 10,000 of RADIXQ_MAX_JOB_BYTES"):
        read_job(bomb, max_bytes=MAX_BYTES)


def test_a_job_without_a_seed_gets_one_that_depends_on_its_id_alone() -> None:
    plain = Sampling(temperature=1.0)
    assert seeded(plain, "a") == seeded(plain, "a") != seeded(plain, "b")
    assert seeded(Sampling(seed=7), "a").seed == 7
