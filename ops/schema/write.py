"""Write the JSON Schemas of the wire, `generate_job.json` and `result.json`, beside this file.

Run it after a change of `common/messages.py`: `python ops/schema/write.py`. A test fails while they differ.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from common.messages import GenerateJob, Result  # noqa: E402

SCHEMAS = {"generate_job.json": GenerateJob, "result.json": Result}


def schema(name: str) -> str:
    """Return the text of one schema file."""
    draft = {"$schema": "https://json-schema.org/draft/2020-12/schema", **SCHEMAS[name].model_json_schema()}
    return json.dumps(draft, indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    for name in SCHEMAS:
        (HERE / name).write_text(schema(name))
        print(f"wrote {HERE / name}")
