"""The README is true: its settings are the code's, its example runs as written, its names exist."""

from __future__ import annotations

import os
import plistlib
import re
import sys
from pathlib import Path

from common.settings import Settings
from tests.models import save_tiny
from tests.processes import Processes

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def settings_table() -> str:
    """Return the table that the README must hold."""
    rows = Settings.from_env({"HOME": "/"}).rows()
    lines = ["| name | default | meaning |", "|---|---|---|"]
    for name, value, meaning in rows:
        default = "~/.radixq" if name == "RADIXQ_HOME" else value
        lines.append(f"| `{name}` | {f'`{default}`' if default else ''} | {meaning} |")
    return "\n".join(lines)


def test_the_table_of_settings_is_what_the_code_reads() -> None:
    held = README.partition("<!-- settings -->")[2].partition("<!-- /settings -->")[0].strip()
    assert held == settings_table(), "paste into README.md:\n" + settings_table()


def test_every_file_the_documents_name_exists() -> None:
    for document in (ROOT / "README.md", *sorted((ROOT / "ops").glob("*.md"))):
        for name in re.findall(r"(?<![\w/])(?:ops|worker|producer|common|tests)/[\w./-]*\w", document.read_text()):
            assert (ROOT / name).exists(), f"{document.name} names {name}"


def test_the_worker_that_starts_at_login_gets_a_model_of_the_table() -> None:
    file = plistlib.loads((ROOT / "ops" / "launchd" / "radixq.worker.plist").read_bytes())
    assert f"| `{file['EnvironmentVariables']['MLX_MODEL_PATH']}` |" in README


def test_the_first_example_runs_as_written(tmp_path: Path, redis_url: str) -> None:
    code = README.partition("```python\n")[2].partition("```")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 8
    with Processes(tmp_path) as processes:
        processes.rq_worker(redis_url, model=save_tiny(tmp_path / "tiny"))
        service = processes.start(
            sys.executable, "-c", code, env={"RADIXQ_REDIS_URL": redis_url, "PYTHONPATH": os.fspath(ROOT)}
        )
        assert service.wait() == 0, service.log
        assert service.log.count("->") == 3
