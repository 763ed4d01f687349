"""ops/bootstrap: what a machine lacks is said in one sentence, before anything is made."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT

TOOLS = ("awk", "cat", "cksum", "df", "dirname", "grep", "mkdir", "rm", "sh", "tail")
REAL = f'#!/bin/sh\nexec {sys.executable} "$@"\n'
OLD = '#!/bin/sh\ncase "$*" in *print*) echo 3.9.18 ;; *) exit 1 ;; esac\n'
WITHOUT_VENV = f'#!/bin/sh\ncase "$*" in *ensurepip*) exit 1 ;; esac\nexec {sys.executable} "$@"\n'
FULL_DISK = "#!/bin/sh\necho Filesystem; echo /dev/x 1000000 900000 100000 90% /\n"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with nothing but the set-up, and a PATH with nothing but small tools."""
    (tmp_path / "ops").mkdir()
    for name in ("bootstrap", "demo"):
        shutil.copy(ROOT / "ops" / name, tmp_path / "ops" / name)
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:
        (tmp_path / "bin" / tool).symlink_to(str(shutil.which(tool)))
    return tmp_path


def set_up(checkout: Path, **programs: str) -> subprocess.CompletedProcess[str]:
    for name, text in programs.items():
        program = checkout / "bin" / name
        program.unlink(missing_ok=True)
        program.write_text(text)
        program.chmod(0o755)
    return subprocess.run(
        [checkout / "ops" / "demo"], env={"PATH": str(checkout / "bin")}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("programs", "sentence"),
    [
        ({}, "radixq needs uv, or Python 3.11 or newer with venv; found: no python3, no uv"),
        ({"python3": OLD}, "radixq needs uv, or Python 3.11 or newer with venv; found: python3 is 3.9.18, no uv"),
        ({"python3": WITHOUT_VENV}, "has no venv module (on Debian: apt install python3-venv), no uv"),
        ({"python3": REAL, "df": FULL_DISK}, "97 MB are free"),
    ],
)
def test_what_is_missing_is_said_in_one_line(checkout: Path, programs: dict[str, str], sentence: str) -> None:
    done = set_up(checkout, **programs)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("setup: ")
    assert done.stderr.endswith(f"{sentence}\n")
    assert done.stderr.count("\n") == 1
    assert not (checkout / ".venv").exists()


def test_a_newer_python_is_taken_where_python3_is_too_old_and_a_full_disk_is_said(checkout: Path) -> None:
    newer = f'#!/bin/sh\n[ "$1" != -m ] || {{ echo "No space left on device"; exit 1; }}\nexec {sys.executable} "$@"\n'
    done = set_up(checkout, **{"python3": OLD, "python3.12": newer})
    assert done.returncode == 1
    assert "making .venv with python3.12 " in done.stderr
    assert "cannot make .venv: the disk is full" in done.stderr.splitlines()[-1]
