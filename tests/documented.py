"""Programs that the documentation shows: run as somebody else would, without our packages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_ALONE = "import sys; assert not {'producer', 'common', 'pydantic'} & set(sys.modules)\n"


def run(script: str, redis_url: str, cwd: Path) -> str:
    """Run a Python script in an empty folder; return the one thing that it prints."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", script + _ALONE],
        cwd=cwd,
        env={**os.environ, "RADIXQ_REDIS_URL": redis_url},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()
