"""Fetch one file by http(s) from a public address, within bounds. Knows no picture.

A URL may come from anybody, so it must not reach what only this machine can: every name is resolved once, every address
is checked, and the connection is made to the address that was checked. Redirects are followed the same way. Proxies
that the environment names are not used.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Final
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from common.errors import ImageTooLarge, ImageUnreadable

MAX_REDIRECTS: Final = 3
_PIECE: Final = 64 * 1024
_REDIRECTS: Final = (301, 302, 303, 307, 308)
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
_ASSIGNED: Final = ipaddress.IPv6Network("2000::/3")  # the only part of IPv6 from which public addresses come

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def fetch(url: str, *, max_bytes: int, within_s: float, allowed: Callable[[Address], bool] | None = None) -> bytes:
    """Return the body of the answer, which took less than `within_s` from the first connect to the last byte.

    `allowed` says which addresses may be connected to; public ones, unless the caller knows better.

    Raises:
        ImageUnreadable: not there, not in time, not 200, too many redirects, or an address that is not allowed.
        ImageTooLarge: more than `max_bytes`; the rest was not read.
    """
    deadline = time.monotonic() + within_s
    for _ in range(MAX_REDIRECTS + 1):
        answer = _ask(url, max_bytes, deadline, allowed or is_public)
        if isinstance(answer, bytes):
            return answer
        url = urljoin(url, answer)
    raise ImageUnreadable(f"more than {MAX_REDIRECTS} redirects, the last to {url[:80]!r}")


def is_public(address: Address) -> bool:
    """Return whether the address, or the one of version 4 that a gateway makes of it, is on the public internet."""
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global and not address.is_multicast
    inner = _inner(address)
    return is_public(inner) if inner is not None else address in _ASSIGNED and address.is_global


def too_many_bytes(num_bytes: int, max_bytes: int) -> ImageTooLarge:
    """Return the refusal of a file that is over `RADIXQ_MAX_IMAGE_BYTES`."""
    return ImageTooLarge(
        f"{num_bytes:,} bytes or more, over the {max_bytes:,} of RADIXQ_MAX_IMAGE_BYTES; send a smaller file, or raise "
        "the setting"
    )


def _inner(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """Return the address inside this one, where it is mapped, 6to4, Teredo or NAT64."""
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)


def _ask(url: str, max_bytes: int, deadline: float, allowed: Callable[[Address], bool]) -> bytes | str:
    """Return the body, or where to look instead."""
    parts = _split(url)
    host = str(parts.hostname)
    where = f"{parts.scheme}://{host}"
    try:
        with _connect(parts, deadline, allowed) as sock:
            answer = _exchange(sock, parts, max_bytes, deadline)
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        if time.monotonic() < deadline:
            raise ImageUnreadable(f"{where} does not give the file: {_reason(error)}") from error
        answer = b""
    if time.monotonic() >= deadline:
        raise ImageUnreadable(f"{where} did not give the file within RADIXQ_IMAGE_FETCH_S")
    return answer


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  # raises ValueError where it is none
    except ValueError as error:
        raise ImageUnreadable(f"{url[:80]!r} is no URL: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ImageUnreadable(f"{url[:80]!r} is no http(s) URL with a host")
    if parts.username is not None or parts.password is not None:
        raise ImageUnreadable(f"the URL of {parts.hostname} has credentials in it, which are not sent")
    return parts


def _connect(parts: SplitResult, deadline: float, allowed: Callable[[Address], bool]) -> socket.socket:
    found = socket.getaddrinfo(parts.hostname, _port(parts), type=socket.SOCK_STREAM)
    for *_, name in found:
        address = ipaddress.ip_address(str(name[0]).partition("%")[0])
        if not allowed(address):
            raise ImageUnreadable(f"{parts.hostname} is {address}, which is no public address")
    family, kind, protocol, _, name = found[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.settimeout(max(deadline - time.monotonic(), 0.001))
        sock.connect(name)
    except BaseException:
        sock.close()
        raise
    return sock


def _exchange(sock: socket.socket, parts: SplitResult, max_bytes: int, deadline: float) -> bytes | str:
    """Speak http, or https, on a connection, which is cut at the deadline."""
    host = str(parts.hostname)
    with sock.dup() as other:  # a socket's own timeout counts from byte to byte: a server that drips would never end
        cut = threading.Timer(deadline - time.monotonic(), _cut, [other])
        cut.daemon = True
        cut.start()
        try:
            if parts.scheme == "https":
                with ssl.create_default_context().wrap_socket(sock, server_hostname=host) as secured:
                    return _get(secured, host, parts, max_bytes)
            return _get(sock, host, parts, max_bytes)
        finally:
            cut.cancel()
            cut.join()


def _cut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed by the other side
        sock.shutdown(socket.SHUT_RDWR)


def _get(sock: socket.socket, host: str, parts: SplitResult, max_bytes: int) -> bytes | str:
    connection = http.client.HTTPConnection(host, _port(parts))
    connection.sock = sock  # connected already: it will not resolve the name again
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~")
    query = f"?{quote(parts.query, safe='/%:@!$&()*+,;=~?')}" if parts.query else ""
    connection.request("GET", path + query, headers={"Accept": "image/*", "User-Agent": "radixq"})
    with connection.getresponse() as response:
        if response.status in _REDIRECTS and (location := response.getheader("Location")):
            return location
        if response.status != 200:
            raise ImageUnreadable(f"{host} answers {response.status} {response.reason}")
        if (response.length or 0) > max_bytes:
            raise too_many_bytes(response.length or 0, max_bytes)
        return _body(response, max_bytes)


def _body(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    body = bytearray()
    while piece := response.read(_PIECE):
        body += piece
        if len(body) > max_bytes:
            raise too_many_bytes(len(body), max_bytes)
    if response.length:
        raise http.client.IncompleteRead(b"", response.length)
    return bytes(body)


def _port(parts: SplitResult) -> int:
    return parts.port or (443 if parts.scheme == "https" else 80)


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__)[:200]
