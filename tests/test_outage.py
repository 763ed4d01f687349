"""Which errors of Redis are waited out, and what is said of them."""

from __future__ import annotations

import pytest
from redis import exceptions

from worker.outage import Absence, explain, is_outage

BEFORE_7 = "Error running script (call to f_ab12): @user_script:7: @user_script: 7:"
"""How Redis 6.2 begins what a script's command was refused with."""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (exceptions.BusyLoadingError("Redis is loading the dataset in memory"), "loading"),
        (exceptions.AuthenticationError("HELLO must be called with the client already authenticated"), "credentials"),
        (exceptions.NoPermissionError("this user has no permissions to run the 'hset' command"), "ACL"),
        (exceptions.OutOfMemoryError("command not allowed when used memory > 'maxmemory'."), "memory is full"),
        (exceptions.ReadOnlyError("You can't write against a read only replica."), "read-only"),
        (exceptions.TimeoutError("Timeout reading from socket"), "in time"),
        (exceptions.ConnectionError("Error 111 connecting to 127.0.0.1:1. Connection refused."), "Error 111"),
        (exceptions.ResponseError("MISCONF Errors writing to the AOF file: No space left on device"), "disk full"),
        (
            exceptions.ResponseError(f"{BEFORE_7} -OOM command not allowed when used memory > 'maxmemory'."),
            "memory is full",
        ),
        (exceptions.ResponseError(f"{BEFORE_7} -READONLY You can't write against a read only replica."), "read-only"),
    ],
)
def test_an_outage_is_waited_for_and_named(error: exceptions.RedisError, words: str) -> None:
    assert is_outage(error)
    assert words in str(explain(error))


def test_what_is_said_does_not_quote_the_command_that_failed() -> None:
    where = "Command # 1 (HSET radixq:result:x text secret) of pipeline caused error: "
    for error in (
        exceptions.OutOfMemoryError(f"{where}command not allowed"),
        exceptions.ResponseError(f"{where}MISCONF Errors"),
    ):
        assert "secret" not in str(explain(error))


def test_damage_and_defects_are_not_waited_for() -> None:
    assert not is_outage(exceptions.ResponseError("WRONGTYPE Operation against a key"))
    assert not is_outage(exceptions.ResponseError(f"{BEFORE_7} -WRONGTYPE Operation against a key"))
    assert not is_outage(exceptions.WatchError("Watched variable changed."))


def test_an_absence_is_told_once_per_kind_of_error_and_anew_after_the_server_was_back() -> None:
    absence = Absence()
    gone, closed = exceptions.ConnectionError("Error 111"), exceptions.ConnectionError("Connection closed by server.")
    assert not absence
    assert [absence.prolong(error) for error in (closed, gone, gone)] == [True, False, False]
    assert absence
    assert absence.pausing
    refused = exceptions.AuthenticationError("invalid password")
    assert [absence.prolong(error) for error in (refused, gone, refused)] == [True, False, False]
    absence.end()
    assert not absence
    assert not absence.pausing
    assert absence.prolong(gone)
