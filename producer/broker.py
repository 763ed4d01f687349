"""One Redis client per server, from a URL or from the caller's client; its errors in our words. Knows no job."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Final
from weakref import WeakKeyDictionary

from redis import Redis
from redis import exceptions as errors
from redis.backoff import NoBackoff
from redis.connection import ConnectionPool
from redis.retry import Retry
from redis.sentinel import SentinelConnectionPool

from common.errors import BrokerUnavailable, InvalidRequest
from common.settings import Settings, hide_password

SLICE_S: Final = 5.0
"""No read or connect blocks longer than this."""

# How the caller's client reads is not how ours does; where and as whom it connects is kept.
_NOT_OURS: Final = frozenset(
    {"decode_responses", "encoding", "encoding_errors", "health_check_interval", "max_connections", "protocol", "retry"}
    | {"retry_on_error", "retry_on_timeout", "socket_connect_timeout", "socket_read_size", "socket_timeout"}
)
_by_url: dict[str, Broker] = {}
_by_pool: WeakKeyDictionary[ConnectionPool, Broker] = WeakKeyDictionary()


class Broker:
    """A server as the producer uses it; shared by all threads, and by forked children (pools notice a fork).

    Attributes:
        client: answers in bytes; never repeats a command by itself, since a repeated write may count twice.
        answered: whether this process ever had an answer from the server.
        warned: queues for which the absence of a worker was already reported.
    """

    def __init__(self, client: Redis) -> None:
        self.client = client
        self.answered = False
        self.warned: set[str] = set()
        self._ahead_s: float | None = None

    @property
    def url(self) -> str:
        """A URL of the server without credentials, for messages."""
        where = self.client.connection_pool.connection_kwargs
        return f"unix://{where['path']}" if "path" in where else f"redis://{self.address}/{where.get('db', 0)}"

    @property
    def address(self) -> str:
        """Host and port, socket path or Sentinel service, for messages."""
        pool = self.client.connection_pool
        where = pool.connection_kwargs
        if isinstance(pool, SentinelConnectionPool):
            return f"the service {pool.service_name!r} of Sentinel"
        return str(where.get("path") or f"{where.get('host', 'localhost')}:{where.get('port', 6379)}")

    def now_s(self) -> float:
        """Return Unix time by the server's clock; asks the server once per process."""
        if self._ahead_s is None:
            with self.speaking():
                seconds, micros = self.client.time()
                self._ahead_s = seconds + micros / 1e6 - time.time()
        return time.time() + self._ahead_s

    def now(self) -> str:
        """Return the time by the server's clock as it is written on the wire."""
        at = datetime.fromtimestamp(self.now_s(), UTC)
        return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")

    @contextmanager
    def speaking(self) -> Iterator[Redis]:
        """Turn what redis-py raises inside the block into `BrokerUnavailable`, one sentence each."""
        try:
            yield self.client
            self.answered = True
        except errors.AuthenticationError as error:
            raise BrokerUnavailable(
                f"Redis at {self.address} refuses the credentials ({error}); put the right ones into the Redis URL"
            ) from error
        except errors.BusyLoadingError as error:
            raise BrokerUnavailable(f"Redis at {self.address} is still loading its data; try again soon") from error
        except errors.OutOfMemoryError as error:
            raise BrokerUnavailable(
                f"Redis at {self.address} is full (maxmemory) and takes no more jobs or results; "
                "give it more (CONFIG SET maxmemory), or submit fewer jobs at a time"
            ) from error
        except (errors.ConnectionError, errors.TimeoutError) as error:
            raise BrokerUnavailable(
                f"cannot reach Redis at {self.address} ({_first_line(error)}); "
                "start it there, or name another with RADIXQ_REDIS_URL or redis="
            ) from error
        except errors.RedisError as error:
            raise BrokerUnavailable(f"Redis at {self.address} refuses the command: {_first_line(error)}") from error


def is_outage(error: BrokerUnavailable) -> bool:
    """Return whether waiting may help: the server is away, as opposed to refusing us."""
    cause = error.__cause__
    away = isinstance(cause, (errors.ConnectionError, errors.TimeoutError))
    return away and not isinstance(cause, errors.AuthenticationError)


def connect(redis: str | Redis | None, settings: Settings) -> Broker:
    """Return this process's broker for a URL, for the server of the caller's client, or for the settings' URL.

    Does not speak to the server yet.

    Raises:
        InvalidRequest: `redis` is neither a URL nor a client of the `redis` package.
    """
    if isinstance(redis, Redis):
        pool = redis.connection_pool
        if pool not in _by_pool:
            _by_pool[pool] = Broker(Redis(connection_pool=_own_pool(pool)))
        return _by_pool[pool]
    url = settings.url if redis is None else redis
    if not isinstance(url, str):
        raise InvalidRequest(
            f"redis is a {type(url).__module__}.{type(url).__name__}; give a URL or a redis.Redis client", field="redis"
        )
    if url not in _by_url:
        try:
            pool = ConnectionPool.from_url(url)
        except ValueError as error:
            raise InvalidRequest(f"Redis URL {hide_password(url)!r}: {error}", field="redis") from error
        _by_url[url] = Broker(Redis(connection_pool=_own_pool(pool)))
    return _by_url[url]


def _own_pool(pool: ConnectionPool) -> ConnectionPool:
    kwargs: dict[str, Any] = {k: v for k, v in pool.connection_kwargs.items() if k not in _NOT_OURS}
    kwargs |= {"socket_timeout": SLICE_S, "socket_connect_timeout": SLICE_S, "retry": Retry(NoBackoff(), 0)}
    if isinstance(pool, SentinelConnectionPool):
        kwargs.pop("connection_pool", None)
        return SentinelConnectionPool(  # type: ignore[no-untyped-call]
            pool.service_name, pool.sentinel_manager, connection_class=pool.connection_class, **kwargs
        )
    return ConnectionPool(connection_class=pool.connection_class, **kwargs)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".")[:200] if lines else type(error).__name__
