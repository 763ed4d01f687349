"""The connection to Redis that RQ gives a worker: how it is to behave, where it leads, and whether it can be used.

Knows no job and no queue.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final
from urllib.parse import quote, urlencode

import redis.exceptions
from redis.backoff import NoBackoff
from redis.connection import SSLConnection
from redis.retry import Retry
from redis.sentinel import SentinelConnectionPool

from common.errors import BrokerUnavailable, SettingsError

if TYPE_CHECKING:
    from redis import Redis

SOCKET_TIMEOUT_S: Final = 5.0


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
        used = connection.connection_pool.connection_kwargs
        at = used.get("path") or f"{used.get('host')}:{used.get('port')}"
        raise BrokerUnavailable(f"Redis at {at} cannot be used: {error}") from error


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
