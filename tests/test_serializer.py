"""`common.serializer`: plain JSON in RQ's hands, and nothing that is read is ever executed."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rq.serializers import JSONSerializer

from common.serializer import JobSerializer

JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(JSON)
def test_what_is_written_is_read_back_by_us_and_by_rq(value: Any) -> None:
    rqs: Any = JSONSerializer
    data = JobSerializer.dumps(value)
    assert JobSerializer.loads(data) == rqs.loads(data) == value
    assert JobSerializer.loads(rqs.dumps(value)) == value


def test_text_is_written_as_utf_8() -> None:
    assert JobSerializer.dumps(["\u00e9", "\U0001f600"]) == '["\u00e9","\U0001f600"]'.encode()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [-float("inf")], "\ud800"])
def test_what_others_could_not_read_is_not_written(value: Any) -> None:
    with pytest.raises(ValueError, match="JSON compliant|surrogates"):
        JobSerializer.dumps(value)


@pytest.mark.parametrize("value", [b"bytes", {1, 2}, object()])
def test_what_json_lacks_is_not_written(value: Any) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        JobSerializer.dumps(value)


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_refused_and_not_executed(protocol: int, tmp_path: Path) -> None:
    target = tmp_path / "executed"
    with pytest.raises(ValueError, match="pickle|JSON|Expecting|utf-8"):
        JobSerializer.loads(pickle.dumps(Payload(target), protocol=protocol))
    assert not target.exists()


def test_rqs_default_pickle_is_named_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"pickle.*serializer=rq\.serializers\.JSONSerializer"):
        JobSerializer.loads(pickle.dumps([1], protocol=pickle.HIGHEST_PROTOCOL))


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"nope"])
def test_what_is_no_json_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="Expecting|utf-8|decode"):
        JobSerializer.loads(data)


def test_the_bytes_are_one_line_without_spaces() -> None:
    assert json.loads(JobSerializer.dumps({"a": [1, 2]})) == {"a": [1, 2]}
    assert JobSerializer.dumps({"a": [1, 2]}) == b'{"a":[1,2]}'
