"""The wheel as another service gets it: built, installed into an empty environment, used outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("mlx", "mlx_lm", "numpy", "transformers", "tokenizers", "PIL", "worker", "argparse")


class Installed(NamedTuple):
    """A wheel and an environment that holds nothing else."""

    wheel: Path
    bin: Path

    def python(self, code: str, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.bin / "python"), "-W", "error", "-c", code, *arguments]
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=env)


def _run(*command: str | Path) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Build the wheel and install it, with uv where there is one, else with pip. Needs a package registry."""
    folder = tmp_path_factory.mktemp("packaging")
    beside = Path(sys.executable).with_name("uv")
    uv = str(beside) if beside.exists() else shutil.which("uv")
    python = folder / "venv/bin/python"
    if uv:
        _run(uv, "build", "--quiet", "--wheel", "--python", sys.executable, "--out-dir", folder, ROOT)
        _run(uv, "venv", "--quiet", "--python", sys.executable, folder / "venv")
    else:
        _run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT)
        _run(sys.executable, "-m", "venv", folder / "venv")
    (wheel,) = folder.glob("*.whl")
    if uv:
        _run(uv, "pip", "install", "--quiet", "--compile-bytecode", "--python", python, wheel)
    else:
        _run(python, "-m", "pip", "install", "--quiet", wheel)
    return Installed(wheel, python.parent)


def _distribution(wheel: Path) -> str:
    name, version = wheel.name.split("-")[:2]
    return f"{name}-{version}.dist-info"


def test_the_wheel_holds_three_packages_typed_and_licensed(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0] for name in names} == {"worker", "producer", "common", _distribution(installed.wheel)}
    assert {f"{package}/py.typed" for package in ("worker", "producer", "common")} <= names
    assert any(name.endswith("LICENSE") for name in names)
    here = {
        path.relative_to(ROOT).as_posix()
        for room in ("worker", "producer", "common")
        for path in (ROOT / room).rglob("*.py")
    }
    assert here <= names


def test_a_service_gets_nothing_of_mlx(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as archive:
        metadata = Parser().parsestr(archive.read(f"{_distribution(installed.wheel)}/METADATA").decode())
    base = [line for line in metadata.get_all("Requires-Dist") or [] if "extra ==" not in line]
    names = sorted(line.partition(">")[0].partition("<")[0].strip() for line in base)
    assert names == ["pillow", "pydantic", "redis", "rq"]
    assert metadata["License-Expression"] == "MIT"


def test_importing_producer_loads_no_model_library_and_is_cheap(installed: Installed, tmp_path: Path) -> None:
    code = (
        "import sys, time\nstart = time.process_time()\nimport rq, redis\nbefore = time.process_time()\n"
        "loaded = set(sys.modules)\nimport producer\nafter = time.process_time()\n"
        "print((after - before) / (before - start))\n"
        f"print(*sorted((set(sys.modules) - loaded) & {set(HEAVY)!r}))"
    )
    runs = [installed.python(code, tmp_path).stdout.splitlines() for _ in range(5)]
    assert {run[1] for run in runs} == {""}
    assert min(float(run[0]) for run in runs) < 1.5  # of what rq and redis cost by themselves (about 0.2 s)


@pytest.mark.parametrize(
    "spelling",
    [
        "from producer import submit; call = submit",
        "from producer.submit import submit; call = submit",
        "import producer; call = producer.submit",
    ],
)
def test_submit_can_be_spelled_in_three_ways(
    spelling: str, installed: Installed, tmp_path: Path, redis_url: str
) -> None:
    code = spelling + "; import sys; print(call('hello', redis=sys.argv[1]).status())"
    done = installed.python(code, tmp_path, redis_url)
    assert (done.stdout, done.stderr) == ("queued\n", "")


@pytest.mark.parametrize(
    "foreign", ["common.py", "common/__init__.py", "common/errors.py", "common/messages.py", "common/keys.py"]
)
def test_a_foreign_common_is_named_with_the_way_out(foreign: str, installed: Installed, tmp_path: Path) -> None:
    path = tmp_path / foreign
    path.parent.mkdir(exist_ok=True)
    path.write_text("")
    if path.parent != tmp_path:
        (path.parent / "__init__.py").touch()
    done = installed.python("import producer", tmp_path)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: radixq brings a package named 'common', but Python found another one at ")
    assert str(tmp_path / "common") in last
    assert "rename that one" in last


def test_another_missing_package_is_reported_as_itself(installed: Installed, tmp_path: Path) -> None:
    (tmp_path / "rq.py").write_text("raise ModuleNotFoundError(\"No module named 'click'\", name='click')")
    done = installed.python("import producer", tmp_path)
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'click'"


def test_the_package_names_what_it_exports(installed: Installed, tmp_path: Path) -> None:
    code = (
        "import producer; print(*sorted(producer.__all__)); assert all(hasattr(producer, n) for n in producer.__all__)"
    )
    done = installed.python(code, tmp_path)
    assert done.stderr == ""
    assert done.stdout.split() == [
        "BrokerUnavailable",
        "GenerationFailed",
        "InvalidRequest",
        "NoWorkerWarning",
        "QueueFull",
        "RadixqError",
        "Result",
        "SettingsError",
        "Ticket",
        "Unsupported",
        "asubmit",
        "asubmit_many",
        "get",
        "submit",
        "submit_many",
    ]


def test_the_commands_are_installed(installed: Installed, tmp_path: Path, redis_url: str) -> None:
    assert (installed.bin / "radixq-worker").exists()
    version = subprocess.run([installed.bin / "radixq", "--version"], capture_output=True, text=True, cwd=tmp_path)
    assert version.stdout == f"radixq {installed.wheel.name.split('-')[1]}\n"
    submit = [str(installed.bin / "radixq"), "submit", "hello", "--job-id", "x", "--redis", redis_url]
    done = subprocess.run(submit, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "x\n", "")
