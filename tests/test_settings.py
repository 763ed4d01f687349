"""`common.settings`: every setting from the environment, checked, with a name and a unit one can rely on."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import SettingsError
from common.settings import Settings, hide_password

CONTRACT = (
    "RADIXQ_REDIS_URL MLX_MODEL_PATH RADIXQ_MODEL_ALIASES RADIXQ_HOME RADIXQ_WORKER_NAME RADIXQ_DTYPE"
    " RADIXQ_FAST_BLAS RADIXQ_EXACT RADIXQ_MAX_ROWS RADIXQ_MAX_TOKENS RADIXQ_CHAT_TEMPLATE_KWARGS"
    " RADIXQ_PREFILL_CHUNK_TOKENS RADIXQ_WINDOW_JOBS RADIXQ_WINDOW_BYTES RADIXQ_KV_BYTES RADIXQ_RESULT_TTL_S"
    " RADIXQ_PROMPT_TTL_S RADIXQ_DRAIN_S RADIXQ_MAX_JOB_BYTES RADIXQ_CALLBACKS RADIXQ_LOG"
)


def test_every_setting_of_the_contract_exists() -> None:
    names = [name for name, _, _ in Settings.from_env({}).rows()]
    assert set(names) >= set(CONTRACT.split())
    assert len(names) == len(set(names))


def test_every_setting_says_what_it_is() -> None:
    assert all(meaning for _, _, meaning in Settings.from_env({}).rows())


def test_defaults_hold_where_nothing_or_nothing_but_space_is_set() -> None:
    assert Settings.from_env({"RADIXQ_MAX_ROWS": " "}) == Settings.from_env({})
    defaults = Settings.from_env({})
    assert (defaults.max_tokens, defaults.result_ttl_s, defaults.prompt_ttl_s) == (1024, 7 * 86_400, 3_600)
    assert (defaults.url, defaults.exact) == ("redis://localhost:6379", False)


def test_the_environment_of_the_process_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RADIXQ_MAX_ROWS", "7")
    assert Settings.from_env().max_rows == 7


@pytest.mark.parametrize(
    ("env", "url"),
    [
        ({}, "redis://localhost:6379"),
        ({"RQ_REDIS_URL": "redis://rq"}, "redis://rq"),
        ({"RADIXQ_REDIS_URL": "redis://ours", "RQ_REDIS_URL": "redis://rq"}, "redis://ours"),
        ({"RADIXQ_REDIS_URL": "", "RQ_REDIS_URL": "redis://rq"}, "redis://rq"),
    ],
)
def test_our_url_goes_before_rqs_and_localhost_is_last(env: dict[str, str], url: str) -> None:
    assert Settings.from_env(env).url == url


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("8GB", 8 * 10**9), ("8GiB", 8 * 2**30), ("512", 512), ("1.5MB", 1_500_000)]
)
def test_sizes_are_written_with_units(text: str, num_bytes: int) -> None:
    assert Settings.from_env({"RADIXQ_KV_BYTES": text}).kv_bytes == num_bytes


def test_lists_are_comma_separated_and_objects_are_json() -> None:
    read = Settings.from_env(
        {"RADIXQ_MODEL_ALIASES": "a, b ,,c", "RADIXQ_CHAT_TEMPLATE_KWARGS": '{"enable_thinking": false}'}
    )
    assert read.model_aliases == ("a", "b", "c")
    assert read.chat_template_kwargs == {"enable_thinking": False}


def test_the_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Settings.from_env({}).home == tmp_path / ".radixq"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RADIXQ_MAX_ROWS", "0"),
        ("RADIXQ_MAX_ROWS", "many"),
        ("RADIXQ_KV_BYTES", "8 potatoes"),
        ("RADIXQ_KV_BYTES", "0"),
        ("RADIXQ_WINDOW_BYTES", "0"),
        ("RADIXQ_MAX_JOB_BYTES", "-1"),
        ("RADIXQ_MAX_IMAGE_BYTES", "0"),
        ("RADIXQ_DTYPE", "float8"),
        ("RADIXQ_EXACT", "perhaps"),
        ("RADIXQ_RESULT_TTL_S", "-1"),
        ("RADIXQ_DRAIN_S", "nan"),
        ("RADIXQ_CHAT_TEMPLATE_KWARGS", "{"),
        ("RADIXQ_CHAT_TEMPLATE_KWARGS", "[1]"),
        ("RADIXQ_LOG", "xml"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_the_setting_and_the_value(name: str, value: str) -> None:
    with pytest.raises(SettingsError) as wrong:
        Settings.from_env({name: value})
    assert name in str(wrong.value)
    assert value in str(wrong.value)
    assert wrong.value.exit_code == 2


def test_an_unknown_name_is_an_error_with_a_suggestion() -> None:
    with pytest.raises(SettingsError, match="unknown setting RADIXQ_MAX_ROW; did you mean RADIXQ_MAX_ROWS"):
        Settings.from_env({"RADIXQ_MAX_ROW": "1"})
    with pytest.raises(SettingsError, match="unknown setting RADIXQ_XYZZY_QQQ; known are .*RADIXQ_CALLBACKS"):
        Settings.from_env({"RADIXQ_XYZZY_QQQ": "1"})


def test_other_programs_settings_are_none_of_our_business() -> None:
    assert Settings.from_env({"RQ_KEY_PREFIX": "x", "PATH": "/bin", "RADIX": "1"}) == Settings.from_env({})


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings.from_env({}).max_rows = 3


def test_passwords_are_not_shown() -> None:
    rows = Settings.from_env({"RADIXQ_REDIS_URL": "redis://ann:secret@host:1/0"}).rows()
    assert ("RADIXQ_REDIS_URL", "redis://ann:***@host:1/0") in [row[:2] for row in rows]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://host", "redis://host"),
        ("redis://:p@host", "redis://:***@host"),
        ("rediss://u:p@@host:1", "rediss://u:***@host:1"),
        ("unix://u:p@/tmp/s", "unix://u:***@/tmp/s"),
        ("redis://u@host", "redis://u@host"),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    assert hide_password(url) == shown


def test_a_changed_environment_is_read_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RADIXQ_HOME", raising=False)
    monkeypatch.setenv("RADIXQ_MAX_ROWS", "7")
    assert Settings.from_env() is Settings.from_env()
    monkeypatch.setenv("RADIXQ_MAX_ROWS", "8")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (Settings.from_env().max_rows, Settings.from_env().home) == (8, tmp_path / ".radixq")
