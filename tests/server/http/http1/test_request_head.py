"""Heads of requests: what is accepted, and what is rejected in whatever pieces it arrives."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from engines.errors import PidError
from server.errors import HeadersTooLargeError, MalformedRequestError
from server.http.http1.head import HeadReader, RequestHead


def read(data: bytes, cuts: tuple[int, ...] = (), max_bytes: int = 4096, max_headers: int = 16) -> RequestHead | None:
    """Read a head that arrives in pieces; the bytes after it must be left alone."""
    reader, buffer, rest = HeadReader(max_bytes, max_headers), bytearray(), b"rest"
    bounds = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
    for start, end in itertools.pairwise(bounds):
        buffer += data[start:end]
        if end == len(data):
            buffer += rest
        head = reader.feed(buffer)
        if head is not None:
            assert buffer == rest
            return head
    return None


def request(*lines: str, start: str = "GET /a HTTP/1.1", host: str = "Host: x") -> bytes:
    return "\r\n".join([start, *([host] if host else []), *lines, "", ""]).encode("latin-1")


class TestAccepted:
    @given(st.sets(st.integers(1, 100), max_size=8))
    def test_a_head_is_the_same_in_any_pieces(self, cuts: set[int]):
        data = b"\r\n\r\n" + request(
            "X-Name:  some value \t", "Content-Length: 5", "Expect: 100-Continue", start="POST /a%20b?c=%20d HTTP/1.1"
        )
        assert read(data, tuple(cuts)) == RequestHead(
            method="POST",
            path="/a b",
            raw_path=b"/a%20b",
            query=b"c=%20d",
            http_version="1.1",
            headers=[
                (b"host", b"x"),
                (b"x-name", b"some value"),
                (b"content-length", b"5"),
                (b"expect", b"100-Continue"),
            ],
            content_length=5,
            chunked=False,
            keep_alive=True,
            expects_continue=True,
        )

    @pytest.mark.parametrize(
        ("target", "path", "query"),
        [
            ("/", "/", b""),
            ("//a/../b", "//a/../b", b""),
            ("*", "*", b""),
            ("http://x:80/a?b", "/a", b"b"),
            ("/a?b?c", "/a", b"b?c"),
        ],
    )
    def test_a_target_is_split_into_path_and_query(self, target: str, path: str, query: bytes):
        head = read(request(start=f"GET {target} HTTP/1.1"))
        assert head is not None
        assert (head.path, head.query) == (path, query)

    @pytest.mark.parametrize("token", ["h2c", "websocket", "TLS/1.0", "unknown"])
    def test_an_upgrade_is_ignored_and_its_body_kept(self, token: str):
        head = read(request("Connection: keep-alive, Upgrade", f"Upgrade: {token}", "Content-Length: 7"))
        assert head is not None
        assert (head.content_length, head.keep_alive) == (7, True)

    @pytest.mark.parametrize(
        ("start", "lines", "keep_alive"),
        [
            ("GET / HTTP/1.1", (), True),
            ("GET / HTTP/1.1", ("Connection: keep-alive, CLOSE",), False),
            ("GET / HTTP/1.1", ("Connection: a", "Connection: close"), False),
            ("GET / HTTP/1.0", ("Connection: keep-alive",), False),
        ],
    )
    def test_the_connection_header_and_the_version_decide_on_keep_alive(
        self, start: str, lines: tuple[str, ...], keep_alive: bool
    ):
        head = read(request(*lines, start=start))
        assert head is not None
        assert head.keep_alive is keep_alive

    def test_http_1_0_needs_no_host_and_knows_no_100_continue(self):
        head = read(request("Expect: 100-continue", start="GET / HTTP/1.0", host=""))
        assert head is not None
        assert (head.http_version, head.expects_continue) == ("1.0", False)


MALFORMED = {
    "no host": request(host=""),
    "two hosts": request("Host: x"),
    "two different hosts": request("Host: y"),
    "two hosts in HTTP/1.0": request("Host: x", start="GET / HTTP/1.0"),
    "no host, absolute target": request(start="GET http://x/ HTTP/1.1", host=""),
    "two hosts, absolute target": request("Host: x", start="GET http://x/ HTTP/1.1"),
    "host with user": request(host="Host: u@x"),
    "host with a path": request(host="Host: x/y"),
    "host with a space": request(host="Host: x y"),
    **{
        f"version {version}": request(start=f"GET / {version}")
        for version in ("HTTP/0.9", "HTTP/1.2", "HTTP/1.9", "HTTP/2.0", "HTTP/3", "http/1.1", "HTTP/1.10", "RTSP/1.0")
    },
    "no version": b"GET /\r\n\r\n",
    "RTSP": request(start="DESCRIBE / RTSP/1.0"),
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": bytes.fromhex("16030100a5010000a10303") + b"a" * 100 + b"\r\n\r\n",
    **{
        f"target {target}": request(start=f"GET {target} HTTP/1.1")
        for target in ("a", "?a", "/a#b", "http://x", "http://u:p@x/", "ftp://x/", "/\x80", "/a b", "", "x:443")
    },
    "connect": request(start="CONNECT x:443 HTTP/1.1"),
    "unknown method": request(start="FOO / HTTP/1.1"),
    "lower-case method": request(start="get / HTTP/1.1"),
    "two spaces": request(start="GET  / HTTP/1.1"),
    "space at the end": request(start="GET / HTTP/1.1 "),
    "bare LF after the request line": b"GET / HTTP/1.1\nHost: x\r\n\r\n",
    "bare LF after a header": b"GET / HTTP/1.1\r\nHost: x\nA: b\r\n\r\n",
    "bare LF at the end": b"GET / HTTP/1.1\r\nHost: x\r\n\n\r\n\r\n",
    "bare CR": request("A: a\rb"),
    "NUL": request("A: a\0b"),
    "folded line": request("A: b", " c"),
    "space before the first header": b"GET / HTTP/1.1\r\n Host: x\r\n\r\n",
    "no colon": request("A"),
    "no name": request(": a"),
    "space before the colon": request("Transfer-Encoding : chunked"),
    "invalid name": request("A(b): c"),
    **{
        f"Content-Length {value!r}": request(f"Content-Length: {value}")
        for value in ("", "+5", "-5", "5, 5", "5 5", "0x5", "5.0", "\xb2", "9" * 20, "5\r\nContent-Length: 5")
    },
    **{
        f"Transfer-Encoding {value!r}": request(f"Transfer-Encoding: {value}")
        for value in (
            "", "gzip", "identity", "gzip, chunked", "chunked, gzip", "chunked, chunked", "xchunked", "\x0bchunked",
            '"chunked"', "chunked;q=1", "chunked\r\nTransfer-Encoding: chunked", "chunked\r\nContent-Length: 5",
        )
    },
    "chunked after a length": request("Content-Length: 5", "Transfer-Encoding: chunked"),
    "chunked in HTTP/1.0": request("Transfer-Encoding: chunked", start="GET / HTTP/1.0"),
    "upgrade with an ambiguous body": request(
        "Connection: Upgrade", "Upgrade: h2c", "Content-Length: 5", "Transfer-Encoding: chunked"
    ),
}  # fmt: skip


class TestRejected:
    @pytest.mark.parametrize("name", MALFORMED)
    def test_a_malformed_head_is_rejected(self, name: str):
        with pytest.raises(MalformedRequestError):
            read(MALFORMED[name])

    @pytest.mark.parametrize("name", MALFORMED)
    def test_a_malformed_head_is_rejected_byte_by_byte(self, name: str):
        with pytest.raises(MalformedRequestError):
            read(MALFORMED[name], tuple(range(1, len(MALFORMED[name]))))

    @pytest.mark.parametrize(
        "data",
        [
            request("A: " + "b" * 4096),
            request(*["A: b"] * 16),
            request(start="GET /" + "a" * 4096 + " HTTP/1.1"),
            b"GET / HTTP/1.1\r\nA: " + b"b" * 5000,
            b"\r\n" * 3000,
        ],
    )
    @pytest.mark.parametrize("step", [1, 100, 10_000])
    def test_a_head_over_a_limit_is_rejected(self, data: bytes, step: int):
        with pytest.raises(HeadersTooLargeError):
            read(data, tuple(range(step, len(data), step)))

    @given(st.binary(max_size=200), st.sets(st.integers(1, 200), max_size=4))
    def test_random_bytes_are_rejected_or_have_one_host_and_one_framing(self, garbage: bytes, cuts: set[int]):
        data = b"POST / HTTP/1.1\r\nHost: x\r\n" + garbage + b"\r\n\r\n"
        assume(data.index(b"\r\n\r\n") == len(data) - 4)
        try:
            head = read(data, tuple(cuts))
        except PidError:
            return
        assert head is not None
        names = [name for name, _ in head.headers]
        assert names.count(b"host") == 1
        assert names.count(b"content-length") + names.count(b"transfer-encoding") <= 1
