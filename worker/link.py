"""The connection to Redis that RQ gives a worker: how it is to behave, where it leads, and whether it can be used.

Knows no job and no queue.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final
from urllib.parse import quote, urlencode

import redis.exceptions
from redis import Redis
from redis.backoff import NoBackoff
from redis.connection import SSLConnection
from redis.retry import Retry
from redis.sentinel import SentinelConnectionPool

from common.errors import BrokerUnavailable, SettingsError
from worker.flight import Clock

SOCKET_TIMEOUT_S: Final = 5.0
SKEW_S: Final = 5.0
"""Clocks that differ by more are said to be wrong."""
BY_NTP: Final = "set both by NTP (a Mac: System Settings, General, Date & Time; Linux: timedatectl set-ntp true)"
_OTHER_S: Final = 2.0  # for the server that the environment names


def tame(connection: Redis) -> Redis:
    """Never repeat a command by itself: a transaction whose answer was lost must not be sent twice."""
    connection.set_retry(Retry(NoBackoff(), 0))
    connection.connection_pool.connection_kwargs["socket_timeout"] = SOCKET_TIMEOUT_S
    return connection


def check(connection: Redis) -> None:
    """Ask the server for a sign of life.

    Raises:
        BrokerUnavailable: none came; the message says where it was looked for.
    """
    try:
        connection.ping()
    except redis.exceptions.RedisError as error:
        raise BrokerUnavailable(f"Redis at {_at(connection)} cannot be used: {error}") from error


def url(connection: Redis) -> str:
    """Write the connection as a URL, for the scout's process: RQ tells us only what it made of the user's.

    Its options for TLS go with it.

    Raises:
        SettingsError: it is one through Sentinel.
    """
    pool = connection.connection_pool
    if isinstance(pool, SentinelConnectionPool):
        raise SettingsError("a worker cannot follow Redis Sentinel yet; give it the URL of the master (-u)")
    used = pool.connection_kwargs
    user, password = (quote(used.get(name) or "", safe="") for name in ("username", "password"))
    credentials = f"{user}:{password}@" if password else ""
    if used.get("path"):
        return f"unix://{credentials}{used['path']}?db={used.get('db') or 0}"
    scheme = "rediss" if issubclass(pool.connection_class, SSLConnection) else "redis"
    host = f"[{used['host']}]" if ":" in used["host"] else used["host"]
    given = {name: value for name, value in used.items() if name.startswith("ssl_") and isinstance(value, str | int)}
    options = {name: value for name, value in given.items() if value or name == "ssl_check_hostname"}  # "False" is true
    query = f"?{urlencode(options)}" if scheme == "rediss" and options else ""
    return f"{scheme}://{credentials}{host}:{used['port']}/{used.get('db') or 0}{query}"


def skew(clock: Clock) -> str:
    """Say how this machine's clock stands to the server's."""
    off_s = -clock.ahead_s
    return f"this machine's clock is {abs(off_s):.1f} s {'ahead of' if off_s > 0 else 'behind'} the Redis server's"


def doubts(connection: Redis, environment: str | None, clock: Clock) -> Iterator[str]:
    """Yield a sentence for whatever will go wrong though the server answers: what, where, and what to do.

    `environment` is the URL that producers with our environment use.
    """
    named = environment and _elsewhere(connection, environment)
    if named:
        yield (
            f"this worker uses Redis at {_place(connection)}, and RADIXQ_REDIS_URL or RQ_REDIS_URL names {named}: what "
            "is submitted with this environment waits there; give -u the same URL, or use `radixq-worker run`"
        )
    if abs(clock.ahead_s) > SKEW_S:
        yield f"{skew(clock)}; {BY_NTP}: `rq info` and plain workers take jobs from the living by their own clocks"


def _elsewhere(connection: Redis, environment: str) -> str | None:
    """Return the place that a URL names, without credentials, if it is not that of the connection."""
    retry = Retry(NoBackoff(), 0)
    try:
        other = Redis.from_url(environment, socket_timeout=_OTHER_S, socket_connect_timeout=_OTHER_S, retry=retry)
    except ValueError:  # producers are told
        return None
    with other:
        return None if _is_same(connection, other) else _place(other)


def _is_same(one: Redis, other: Redis) -> bool:
    """Whether both are the same database of the same server, whatever it is called."""
    if _place(one) == _place(other):
        return True
    if _database(one) != _database(other):
        return False
    try:
        return str(one.info("server")["run_id"]) == str(other.info("server")["run_id"])
    except (redis.exceptions.RedisError, KeyError):
        return False


def _at(connection: Redis) -> str:
    used = connection.connection_pool.connection_kwargs
    return str(used.get("path") or f"{used.get('host', 'localhost')}:{used.get('port', 6379)}")


def _place(connection: Redis) -> str:
    return f"{_at(connection)}/{_database(connection)}"


def _database(connection: Redis) -> int:
    return int(connection.connection_pool.connection_kwargs.get("db") or 0)
