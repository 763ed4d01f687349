"""Write ops/MODELS.md, the table of model families, from tests/families.toml; `--check` fails if it is out of date."""

from __future__ import annotations

import sys
import tomllib
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).parents[1]
SOURCE, TARGET = CHECKOUT / "tests" / "families.toml", CHECKOUT / "ops" / "MODELS.md"
INTRODUCTION = """\
# Model families

Written by `ops/families.py` from `tests/families.toml`; do not edit. What each family of mlx-lm {version} does with
prefixes that prompts share, found by building a tiny random model of it, and proven by `tests/test_families.py`: its
greedy tokens equal mlx-lm's for each job alone. A worker finds the same out by itself when it loads a model, by a short
trial, and says it in `radixq-worker doctor`; a family that is not listed is tried the same way.

| way | families | what happens to a prefix |
|---|---|---|
| shared | {shared} | stored once, read in place by all rows; rows run as one batch |
| copied | {copied} | stored once in the tree, copied for each row; rows run one after another |
| snapshot | {snapshot} | the whole state is kept where the queue shows that prompts part, and at the end of each job; \
copied for each row; rows run one after another |
| none | {none} | computed again for each job |
| refused | {refused} | the model cannot run here |

A name with a hyphen and no file of that name in mlx-lm is a variant of the family before the hyphen.

| family | way | why it is not shared in place |
|---|---|---|
"""


def table(families: dict[str, dict[str, Any]]) -> str:
    """Return the whole page."""
    counts = Counter(family["way"] for family in families.values())
    ways = {way: counts[way] for way in ("shared", "copied", "snapshot", "none", "refused")}
    rows = [f"| {name} | {family['way']} | {family.get('why', '')} |\n" for name, family in families.items()]
    return INTRODUCTION.format(version=version("mlx-lm"), **ways) + "".join(rows)


def main() -> int:
    page = table(tomllib.loads(SOURCE.read_text())["families"])
    if "--check" not in sys.argv[1:]:
        TARGET.write_text(page)
    elif not TARGET.exists() or TARGET.read_text() != page:
        print("ops/MODELS.md is not up to date: run python ops/families.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
