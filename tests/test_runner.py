"""The engine's thread: it loads, runs what it is given, reports through a descriptor, and says why it died."""

from __future__ import annotations

import select
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from common.settings import Settings
from tests.engines import prompt
from tests.models import save_tiny
from worker import platform
from worker.runner import SPARE_PROMPTS, Runner
from worker.sequence import Died, Event, Failed, Finished, Ready


def settings(model: Path | str | None, **more: str) -> Settings:
    env = {"MLX_MODEL_PATH": str(model or ""), "RADIXQ_MAX_ROWS": "4", "RADIXQ_KV_BYTES": "20MB", **more}
    return Settings.from_env(env)


def events(runner: Runner, count: int) -> list[Event]:
    """Wait on the descriptor until so many events came."""
    got: list[Event] = []
    while len(got) < count:
        ready, _, _ = select.select([runner], [], [], 60)
        assert ready, f"only {got} came"
        got += runner.events()
    return got


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[Runner]:
    started = Runner(settings(save_tiny(tmp_path / "tiny")))
    started.start()
    (ready,) = events(started, 1)
    assert isinstance(ready, Ready)
    assert ready.model == "tiny"
    assert any("stored once" in note for note in ready.notes)
    yield started
    started.stop()


def test_prompts_go_in_and_finished_events_come_out(runner: Runner) -> None:
    for i in range(6):
        runner.submit(str(i), prompt([i, *range(20)], 5))
    done = events(runner, 6)
    assert {e.id for e in done if isinstance(e, Finished)} == set("012345")
    assert runner.stats().prompt_tokens == 6 * 21


def test_room_shrinks_with_what_runs_and_comes_back(runner: Runner) -> None:
    assert runner.room == 4 + SPARE_PROMPTS
    runner.submit("a", prompt(range(10), 5))
    assert runner.room == 4 + SPARE_PROMPTS - 1
    events(runner, 1)
    assert runner.room == 4 + SPARE_PROMPTS


def test_what_is_aborted_ends_in_silence(runner: Runner) -> None:
    runner.submit("long", prompt(range(2, 12), 3000))
    runner.abort("long")
    runner.submit("short", prompt(range(10), 3))
    assert [e.id for e in events(runner, 1) if isinstance(e, Finished | Failed)] == ["short"]
    assert runner.room == 4 + SPARE_PROMPTS


def test_stop_ends_the_thread_while_something_runs(runner: Runner) -> None:
    runner.submit("long", prompt(range(2, 12), 3000))
    runner.stop()
    assert not [e for e in runner.events() if isinstance(e, Died)]


@pytest.mark.parametrize("path", [None, "/no/such/model"])
def test_a_model_that_is_not_there_is_reported_as_death(path: str | None) -> None:
    runner = Runner(settings(path))
    runner.start()
    (died,) = events(runner, 1)
    assert isinstance(died, Died)
    assert died.error.code == "model_not_loaded"
    assert "MLX_MODEL_PATH" in str(died.error)
    runner.stop()


@pytest.mark.parametrize(
    ("given", "says"), [("100KB", "RADIXQ_KV_BYTES is 0.0001 GB"), (None, "which leaves 0.0000 GB")]
)
def test_a_model_beside_which_no_job_fits_is_refused_with_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None, says: str
) -> None:
    if given is None:  # a device that the weights fill
        full = replace(platform.device(), working_set_bytes=1)
        monkeypatch.setattr(platform, "device", lambda: full)
    more = {"RADIXQ_KV_BYTES": given or ""}
    runner = Runner(settings(save_tiny(tmp_path / "tiny"), **more))
    runner.start()
    (died,) = events(runner, 1)
    assert isinstance(died, Died)
    assert died.error.code == "model_not_loaded"
    assert says in str(died.error)
    assert "1024 tokens need 0.0005 GB" in str(died.error)
    runner.stop()
