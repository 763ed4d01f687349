"""worker/doctor.py: each thing that stops a worker is seen, on a real server, and comes with its fix."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis
from rq import Queue, Worker

from common import keys
from common.settings import Settings
from tests.families import TABLE
from tests.models import save_tiny
from worker import doctor, server
from worker.doctor import Check


def look(**settings: object) -> dict[str, Check]:
    """Run all checks; `name` is the field's name in `Settings`."""
    return {check.name: check for check in doctor.examine(Settings.model_validate(settings))}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def other_server(tmp_path: Path) -> Iterator[Redis]:
    """A server whose configuration a test may spoil."""
    with server.start(tmp_path / "other", persistent=False) as running, Redis.from_url(running.url) as redis:
        yield redis


def url_of(redis: Redis) -> str:
    return f"redis://127.0.0.1:{redis.connection_pool.connection_kwargs['port']}"


def sign_in(redis: Redis, name: str, *queues: str) -> Worker:
    """Let Redis know of a plain rq worker that listens to these queues."""
    worker = Worker([Queue(queue, connection=redis) for queue in queues], name=name, connection=redis)
    worker.register_birth()  # type: ignore[no-untyped-call]
    return worker


def test_a_good_machine_passes_every_check(other_server: Redis, model: Path) -> None:
    other_server.config_set("appendonly", "yes")
    found = look(redis_url=url_of(other_server), model_path=str(model))
    found.pop("versions")  # whether radixq is installed is not known here
    assert {check.name: check.detail for check in found.values() if not check.ok} == {}
    assert all(check.fix == "" for check in found.values())
    assert found["prefixes"].detail == "shared: stored once and read in place (KVCache)"
    assert found["pictures"].detail == "none: it reads text only"
    assert found["model"].detail == "tiny, context 4096 tokens"
    assert found["attention"].detail.endswith("(rows x tokens)")
    assert "this machine's clock is 0." in found["clock"].detail


def test_a_server_that_is_away_is_named_without_its_password() -> None:
    check = look(redis_url="redis://user:secret@127.0.0.1:1")["redis"]
    assert not check.ok
    assert "redis://user:***@127.0.0.1:1" in check.detail
    assert "RADIXQ_REDIS_URL" in check.fix


def test_without_a_url_there_need_be_no_server_yet(monkeypatch: pytest.MonkeyPatch, other_server: Redis) -> None:
    monkeypatch.setattr("common.settings.DEFAULT_REDIS_URL", "redis://127.0.0.1:1")
    check = look()["redis"]
    assert check.ok
    assert check.detail == "none yet: `radixq-worker run` starts one"
    other_server.config_set("requirepass", "secret")
    monkeypatch.setattr("common.settings.DEFAULT_REDIS_URL", url_of(other_server))
    assert not look()["redis"].ok  # one is there, and refuses


def test_a_wrong_url_is_a_failed_check_and_the_others_still_run(model: Path) -> None:
    found = look(redis_url="http://127.0.0.1", model_path=str(model))
    assert not found["redis"].ok
    assert found["model"].ok


def test_a_server_that_forgets_or_drops_keys_fails(other_server: Redis) -> None:
    other_server.config_set("maxmemory-policy", "allkeys-lru")
    found = look(redis_url=url_of(other_server))
    assert not found["persistence"].ok
    assert "appendonly yes" in found["persistence"].fix
    assert not found["eviction policy"].ok
    assert "allkeys-lru" in found["eviction policy"].detail
    other_server.config_set("appendonly", "yes")
    other_server.config_set("maxmemory-policy", "noeviction")
    found = look(redis_url=url_of(other_server))
    assert found["persistence"].ok
    assert found["eviction policy"].ok


def test_the_embedded_server_of_the_home_is_found_without_a_url(tmp_path: Path) -> None:
    with server.start(tmp_path / "embedded", persistent=False) as running:
        check = look(home=tmp_path / "embedded")["redis"]
    assert check.ok
    assert check.detail.startswith(f"{running.url} (embedded) answers")


def test_a_plain_rq_worker_on_our_queue_is_a_foreign_one_and_one_elsewhere_is_not(redis: Redis, redis_url: str) -> None:
    sign_in(redis, "mailer", "mail")
    assert look(redis_url=redis_url)["foreign workers"].ok
    plain = sign_in(redis, "plain", "mail", keys.DEFAULT_QUEUE)
    check = look(redis_url=redis_url)["foreign workers"]
    assert not check.ok
    assert "plain" in check.detail
    assert "mailer" not in check.detail
    plain.register_death()  # type: ignore[no-untyped-call]
    assert look(redis_url=redis_url)["foreign workers"].ok


def test_a_worker_that_signed_in_as_ours_is_not_foreign(redis: Redis, redis_url: str) -> None:
    redis.zadd(keys.WORKERS, {"mac 1": 1.0})
    sign_in(redis, "mac-1.host.17.abc", "radixq.tiny")
    assert look(redis_url=redis_url)["foreign workers"].ok


@pytest.mark.parametrize(
    ("path", "says"),
    [
        (None, "MLX_MODEL_PATH is not set"),
        ("/nowhere/model.gguf", "does not exist"),
    ],
)
def test_a_model_that_is_not_there_is_said_with_its_path(path: str | None, says: str) -> None:
    check = look(model_path=path)["model"]
    assert not check.ok
    assert says in check.detail


def test_a_hub_id_that_was_never_fetched_is_not_fetched_now() -> None:
    check = look(model_path="nobody/nothing-4bit")["model"]
    assert check.ok
    assert "will fetch it" in check.detail


@pytest.mark.parametrize(
    ("arch", "way", "caches"),
    [
        ("gemma3_text", "snapshot", "(KVCache, RotatingKVCache)"),
        ("gemma2", "copied", "(KVCache)"),
    ],
)
def test_the_way_of_reuse_is_said_with_the_caches_that_decide_it(
    tmp_path: Path, arch: str, way: str, caches: str
) -> None:
    config = {**TABLE["sizes"], "sliding_window_pattern": 2, "rope_scaling": None}
    check = look(model_path=str(save_tiny(tmp_path / arch, arch, **config)))["prefixes"]
    assert check.detail.startswith(f"{way}: ")
    assert check.detail.endswith(caches)
    assert check.ok


def test_another_package_named_common_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "__init__.py").touch()
    monkeypatch.delitem(sys.modules, "common")
    monkeypatch.syspath_prepend(tmp_path)
    check = look()["package names"]
    assert not check.ok
    assert f"common is at {tmp_path / 'common'}" in check.detail
