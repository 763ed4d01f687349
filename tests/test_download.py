"""`producer.download`: bounds of size, time and redirects, no address but public ones; from a server on loopback."""

from __future__ import annotations

import contextlib
import http.server
import ipaddress
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from common.errors import ImageTooLarge, ImageUnreadable
from producer import submit
from producer.download import MAX_REDIRECTS, Address, fetch, is_public

BODY = bytes(range(256)) * 1024
GENEROUS_S = 60.0


class _Answers(http.server.BaseHTTPRequestHandler):
    """What the tests fetch, by path."""

    asked: list[str] = []  # one list for one server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.asked.append(self.path)
        name, _, rest = self.path.partition("?")[0].strip("/").partition("/")
        getattr(self, f"_{name}")(rest)

    def _whole(self, _: str) -> None:
        self._head(200, {"Content-Length": str(len(BODY))})
        self.wfile.write(BODY)

    def _endless(self, _: str) -> None:
        self._head(200, {"Connection": "close"})
        while True:
            self.wfile.write(BODY)

    def _broken(self, _: str) -> None:
        self._head(200, {"Content-Length": str(2 * len(BODY)), "Connection": "close"})
        self.wfile.write(BODY)
        self.close_connection = True

    def _drip(self, what: str) -> None:
        if what == "body":
            self._head(200, {"Content-Length": str(len(BODY))})
        while True:
            self.wfile.write(b"x")
            time.sleep(0.01)

    def _redirect(self, rest: str) -> None:
        left = int(rest)
        self._head(302, {"Location": f"/redirect/{left - 1}" if left else "/whole", "Content-Length": "0"})

    def _to(self, url: str) -> None:
        self._head(301, {"Location": url, "Content-Length": "0"})

    def _missing(self, _: str) -> None:
        self._head(404, {"Content-Length": "0"})

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Say nothing: that the other side goes away is what is tested."""


@contextlib.contextmanager
def serving(certificate: Path | None = None) -> Iterator[int]:
    """Serve on a port of loopback; by https with a certificate, which has its key beside it."""
    _Answers.asked = []
    with _Server(("127.0.0.1", 0), _Answers) as server:
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate, certificate.with_suffix(".key"))
            server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@pytest.fixture
def url() -> Iterator[str]:
    with serving() as port:
        yield f"http://127.0.0.1:{port}"


def anywhere(_: Address) -> bool:
    return True


def get(url: str, *, max_bytes: int = len(BODY), within_s: float = GENEROUS_S) -> bytes:
    return fetch(url, max_bytes=max_bytes, within_s=within_s, allowed=anywhere)


def test_a_file_of_exactly_the_allowed_size_is_fetched(url: str) -> None:
    assert get(f"{url}/whole") == BODY
    assert get(f"{url}/whole?a=b c&d=\u00e9#fragment") == BODY
    assert _Answers.asked == ["/whole", "/whole?a=b%20c&d=%C3%A9"]


def test_a_file_that_says_it_is_too_large_is_refused_before_it_is_read(url: str) -> None:
    with pytest.raises(ImageTooLarge, match=rf"{len(BODY):,} bytes or more, over the {len(BODY) - 1:,}"):
        get(f"{url}/whole", max_bytes=len(BODY) - 1)


def test_a_file_without_an_end_is_refused_at_the_limit(url: str) -> None:
    with pytest.raises(ImageTooLarge):
        get(f"{url}/endless", max_bytes=10 * len(BODY))


def test_a_file_that_breaks_off_is_no_file(url: str) -> None:
    with pytest.raises(ImageUnreadable, match="does not give the file"):
        get(f"{url}/broken", max_bytes=10 * len(BODY))


@pytest.mark.parametrize("what", ["head", "body"])
def test_a_server_that_drips_byte_by_byte_is_cut_off_when_the_time_is_over(url: str, what: str) -> None:
    with pytest.raises(ImageUnreadable, match="within RADIXQ_IMAGE_FETCH_S"):
        get(f"{url}/drip/{what}", within_s=0.5)


def test_a_server_that_never_answers_is_given_up(url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(ImageUnreadable, match="RADIXQ_IMAGE_FETCH_S"):
        get(f"http://127.0.0.1:{silent.getsockname()[1]}/", within_s=0.3)


def test_a_few_redirects_are_followed_and_no_more(url: str) -> None:
    assert get(f"{url}/redirect/{MAX_REDIRECTS - 1}") == BODY
    with pytest.raises(ImageUnreadable, match=f"more than {MAX_REDIRECTS} redirects"):
        get(f"{url}/redirect/{MAX_REDIRECTS}")


@pytest.mark.parametrize("where", ["file:///etc/passwd", "gopher://x/", "http://user:pw@localhost/", "http://:80/"])
def test_a_redirect_leads_nowhere_but_to_http(url: str, where: str) -> None:
    with pytest.raises(ImageUnreadable, match=r"no http\(s\) URL|no URL|has credentials"):
        get(f"{url}/to/{where}")


def test_every_redirect_is_checked_for_where_it_leads(url: str) -> None:
    seen: list[str] = []

    def only_the_first(address: Address) -> bool:
        seen.append(str(address))
        return str(address) == "127.0.0.1"

    with pytest.raises(ImageUnreadable, match=r"127\.0\.0\.2, which is no public address"):
        fetch(f"{url}/to/http://127.0.0.2/x", max_bytes=9, within_s=GENEROUS_S, allowed=only_the_first)
    assert seen == ["127.0.0.1", "127.0.0.2"]


def test_a_name_is_resolved_once_and_the_checked_address_is_the_one_that_is_asked(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = socket.getaddrinfo, []

    def rebinding(host: Any, *arguments: Any, **options: Any) -> Any:
        asked.append(host)
        return real("127.0.0.1" if len(asked) == 1 else "127.0.0.9", *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    assert get(url.replace("127.0.0.1", "pictures.example") + "/whole") == BODY
    assert asked == ["pictures.example"]


def test_a_name_with_one_private_address_among_its_own_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def mixed(*_: Any, **__: Any) -> Any:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 80)) for host in ("93.184.216.34", "10.0.0.1")]

    monkeypatch.setattr(socket, "getaddrinfo", mixed)
    with pytest.raises(ImageUnreadable, match=r"pictures\.example is 10\.0\.0\.1, which is no public address"):
        fetch("http://pictures.example/", max_bytes=9, within_s=GENEROUS_S)


NOT_PUBLIC = [
    "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
    "192.0.2.1", "198.18.0.1", "224.0.0.1", "224.0.1.1", "240.0.0.1", "255.255.255.255", "::", "::1", "fe80::1",
    "ff02::1", "ff0e::1", "2001:db8::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "2002:7f00:1::", "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2001:0:5ef5:79fb::f5ff:fffe", "::127.0.0.1", "fec0::1", "fc00::1",
]  # fmt: skip


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_an_address_that_is_not_on_the_public_internet_is_refused(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address", ["93.184.216.34", "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_an_address_on_the_public_internet_is_allowed(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


HOSTS = ["127.0.0.1", "localhost", "2130706433", "0x7f000001", "127.1", "[::1]", "[::ffff:127.0.0.1]", "0"]


@pytest.mark.parametrize("host", HOSTS)
def test_no_spelling_of_this_machine_is_fetched_even_where_urls_are_allowed(
    host: str, url: str, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RADIXQ_IMAGE_URLS", "1")
    with pytest.raises(ImageUnreadable, match=r"^images\[0\]: .*no public address|does not give the file"):
        submit("What?", images=[url.replace("127.0.0.1", host) + "/whole"], redis=redis)
    assert _Answers.asked == []
    assert redis.dbsize() == 0


def test_https_is_spoken_and_what_is_no_https_is_refused(url: str) -> None:
    with pytest.raises(ImageUnreadable, match="^https://127.0.0.1 does not give the file"):
        get(url.replace("http:", "https:"))
    assert _Answers.asked == []


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a certificate for `pictures.example` that signs itself."""
    path = tmp_path_factory.mktemp("tls") / "pictures.pem"
    words = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=pictures.example", "-addext"]
    more = ["subjectAltName=DNS:pictures.example", "-keyout", str(path.with_suffix(".key")), "-out", str(path)]
    subprocess.run(["openssl", *words, *more], check=True, capture_output=True)
    return path


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every name lead to loopback."""
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda _, *more, **options: real("127.0.0.1", *more, **options))


@pytest.mark.usefixtures("here")
def test_a_file_comes_by_https_from_a_host_whose_certificate_is_trusted(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with serving(certificate) as port:
        assert get(f"https://pictures.example:{port}/whole") == BODY
        assert get(f"https://pictures.example:{port}/redirect/1") == BODY


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("host", "trusted"), [("pictures.example", False), ("other.example", True)])
def test_by_https_nothing_is_asked_of_a_host_that_cannot_prove_its_name(
    host: str, trusted: bool, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with serving(certificate) as port, pytest.raises(ImageUnreadable, match="certificate verify failed"):
        get(f"https://{host}:{port}/whole")
    assert _Answers.asked == []


@pytest.mark.parametrize("path", ["missing", "nowhere"])
def test_an_answer_that_is_not_the_file_is_reported(path: str, url: str) -> None:
    with pytest.raises(ImageUnreadable, match="answers 404|does not give the file"):
        get(f"{url}/{path}")


def test_a_port_where_nobody_listens_is_reported() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with pytest.raises(ImageUnreadable, match="does not give the file: .*refused"):
        get(f"http://127.0.0.1:{port}/")
