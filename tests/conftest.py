"""What every test gets: a clean environment, one choice of BLAS, a real server with a database of its own.

The BLAS is fixed per process: tests marked `stock_blas` run with RADIXQ_FAST_BLAS=0 and the others without it, so a
complete run is two runs (`ops/check` makes both). A Mac has one BLAS, and one run.
"""

from __future__ import annotations

import gc
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from redis import Redis

from tests.processes import Process, Processes
from worker import platform, server

if TYPE_CHECKING:
    from tests.broker import Broker
    from tests.desk import Desk

_STOCK_BLAS = os.environ.get("RADIXQ_FAST_BLAS") == "0"
_BLAS = platform.prepare(fast_blas=not _STOCK_BLAS)  # before anything imports MLX
_NUM_DATABASES = 512
_DEVELOPERS_OWN = ("RADIXQ_", "RQ_", "REDIS_", "MLX_", "HF_")
_KEPT = ("RADIXQ_TEST_", "RADIXQ_FAST_BLAS")


def pytest_configure() -> None:
    """Forget the developer's settings; keep two for those who ask: the model to test, and the home directory."""
    if "MLX_MODEL_PATH" in os.environ:
        os.environ["RADIXQ_TEST_MODEL_PATH"] = os.environ["MLX_MODEL_PATH"]
    os.environ.setdefault("RADIXQ_TEST_HOME", str(Path.home()))
    for name in list(os.environ):
        if name.startswith(_DEVELOPERS_OWN) and not name.startswith(_KEPT):
            del os.environ[name]
    os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_report_header() -> str:
    """Say which BLAS multiplies in this run."""
    return f"BLAS: {_BLAS.name}" + (f" ({_BLAS.note})" if _BLAS.note else "")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of this process's BLAS. What is long is slow: `-m "not slow"` leaves it out too."""
    for item in items:
        if item.get_closest_marker("long") is not None:
            item.add_marker("slow")
    if sys.platform == "darwin":
        return
    fits = [item for item in items if (item.get_closest_marker("stock_blas") is not None) == _STOCK_BLAS]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(fits)])
    items[:] = fits


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RADIXQ_HOME", str(tmp_path / "home" / ".radixq"))


@pytest.fixture
def held_bytes() -> Iterator[Callable[[], int]]:
    """What MLX's allocator holds, exactly: without its pool, which hands out buffers larger than what was asked for."""
    import mlx.core as mx

    def settled() -> int:
        before = -1
        while before != (now := mx.get_active_memory()):  # what earlier tests left in cycles may take several passes
            before = now
            gc.collect()
            mx.synchronize()  # a stream's thread lets go of its last task's arrays a moment after they are there
        return before

    limit = mx.set_cache_limit(0)
    mx.clear_cache()
    yield settled
    mx.set_cache_limit(limit)


@pytest.fixture(scope="session")
def _databases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Iterator[str]]:
    """Start one server for this process (each xdist worker is one) and count through its databases."""
    home = tmp_path_factory.mktemp("server")
    with server.start(home, persistent=False, databases=_NUM_DATABASES) as running:
        yield (f"{running.url}/{number}" for number in itertools.count())


@pytest.fixture
def redis_url(_databases: Iterator[str]) -> str:
    """A URL of a real server with an empty database that no other test uses. Nobody ever flushes it."""
    url = next(_databases)
    assert int(url.rpartition("/")[2]) < _NUM_DATABASES, "more tests than databases: raise _NUM_DATABASES"
    return url


@pytest.fixture
def redis(redis_url: str) -> Iterator[Redis]:
    """A client of `redis_url` that returns bytes."""
    with Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def broker(redis_url: str) -> Iterator[Broker]:
    """See that database as producers and onlookers do."""
    from tests.broker import Broker  # late: RQ reads the environment when it is imported

    broker = Broker(redis_url)
    yield broker
    broker.redis.close()


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny model that writes as many tokens as it is asked for."""
    from tests.models import save_endless  # late: it imports MLX, which most test files do without

    return save_endless(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    """Start processes that end with the test; their logs are shown when it fails."""
    with Processes(tmp_path) as running:
        yield running


@pytest.fixture
def start(processes: Processes, broker: Broker, endless: Path) -> Callable[..., Process]:
    """Start workers named mac, of four rows, for that database; the test fails when one does."""
    from tests.broker import ROWS

    def start(*arguments: str, **env: str) -> Process:
        worker = processes.rq_worker(broker.url, *(arguments or ("radixq",)), model=endless, env=ROWS | env)
        broker.workers.append(worker)
        return worker

    return start


@pytest.fixture
def desk(redis_url: str) -> Iterator[Desk]:
    """Make a worker without an engine, for that database."""
    from tests.desk import CALLS, Desk

    CALLS.clear()
    desk = Desk(redis_url)
    yield desk
    desk.close()
