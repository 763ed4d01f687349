"""`common.log` and what of RQ's reaches the log of a worker."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator

import pytest

from common.log import LineFormatter

AT = 1_795_356_185.123  # 2026-11-22 14:03:05.123 UTC


@pytest.fixture
def in_new_york(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "EST5")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def record() -> logging.LogRecord:
    made = logging.makeLogRecord({"name": "radixq.worker.drain", "levelname": "INFO", "msg": "claimed", "jobs": 3})
    made.created = AT
    return made


@pytest.mark.usefixtures("in_new_york")
def test_a_line_of_text_has_the_date_and_the_local_time_as_rqs_lines_beside_it_have() -> None:
    ours = LineFormatter(as_json=False).format(record())
    rqs = logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S").format(record())
    assert ours == "2026-11-22 09:03:05.123 INFO worker.drain claimed jobs=3"
    assert rqs.startswith("09:03:05 ")


@pytest.mark.usefixtures("in_new_york")
def test_a_line_of_json_has_utc() -> None:
    line = json.loads(LineFormatter(as_json=True).format(record()))
    assert (line["at"], line["event"], line["jobs"]) == ("2026-11-22T14:03:05.123+00:00", "claimed", 3)
