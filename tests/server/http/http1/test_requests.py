"""Requests on a connection: what belongs to which request, and how responses are framed."""

from __future__ import annotations

import asyncio
import itertools
import json
import re

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from starlette.types import Receive, Scope, Send

from tests.server.http.http1.conftest import Echo, Local, eventually, read_all, reject, respond, run

INNER = b"GET /inner HTTP/1.1\r\nHost: x\r\n\r\n"
LAST = b"GET /last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def post(body: bytes, *lines: bytes, path: bytes = b"/outer") -> bytes:
    head = [b"POST %b HTTP/1.1" % path, b"Host: x", b"Content-Length: %d" % len(body), *lines]
    return b"\r\n".join(head) + b"\r\n\r\n" + body


def chunked(body: bytes, *lines: bytes, size: int = 7) -> bytes:
    head = [b"POST /outer HTTP/1.1", b"Host: x", b"Transfer-Encoding: chunked", *lines]
    chunks = [body[i : i + size] for i in range(0, len(body), size)]
    framed = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    return b"\r\n".join(head) + b"\r\n\r\n" + framed + b"0\r\n\r\n"


def statuses(data: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1.1 (\d+) ", data)]


class TestBodies:
    @pytest.mark.parametrize("token", [b"h2c", b"websocket", b"TLS/1.0", b"x", b"HTTP/2.0, h2c"])
    @pytest.mark.parametrize("encode", [post, chunked])
    @pytest.mark.parametrize("cut", [0, 1, 80, 10**6])
    def test_a_body_after_an_upgrade_is_never_a_request(self, token: bytes, encode, cut: int):
        app = Echo()
        data = encode(INNER, b"Connection: Upgrade", b"Upgrade: " + token)
        cut = len(data) - len(INNER) if cut == 80 else cut

        async def test(local: Local) -> None:
            response = await local.exchange(data[:cut], data[cut:], LAST)
            assert statuses(response) == [200, 200]
            assert app.seen == [("POST", "/outer", INNER), ("GET", "/last", b"")]

        run(app, test)

    @hypothesis_settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.lists(
            st.tuples(st.sampled_from([post, chunked]), st.sampled_from([b"", b"a", INNER, INNER * 3])),
            min_size=1,
            max_size=4,
        ),
        st.sets(st.integers(1, 900), max_size=5),
        st.sampled_from([(), (b"Connection: Upgrade", b"Upgrade: h2c"), (b"Expect: 100-continue",)]),
    )
    def test_pipelined_requests_are_served_in_order_however_they_are_split(self, requests, cuts: set[int], lines):
        app = Echo()
        data = b"".join(encode(body, *lines) for encode, body in requests) + LAST
        bounds = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]

        async def test(local: Local) -> None:
            await local.exchange(*[data[start:end] for start, end in itertools.pairwise(bounds)])
            assert app.seen == [("POST", "/outer", body) for _, body in requests] + [("GET", "/last", b"")]

        run(app, test)

    def test_a_thousand_pipelined_requests_are_served(self):
        app = Echo()

        async def test(local: Local) -> None:
            assert statuses(await local.exchange(INNER * 1000 + LAST)) == [200] * 1001

        run(app, test)

    def test_trailers_are_not_headers(self):
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await Echo()(scope, receive, send)
            assert {name for name, _ in scope["headers"]} == {b"host", b"transfer-encoding"}

        data = chunked(b"abc")[:-2] + b"Host: y\r\nX-Trailer: z\r\n\r\n"

        async def test(local: Local) -> None:
            assert statuses(await local.exchange(data + LAST.replace(b"/last", b"*"))) == [200, 200]

        run(app, test)

    @pytest.mark.parametrize(
        ("body", "status", "code"),
        [
            (b"5\r\nhello0\r\n\r\n", 400, "malformed-request"),
            (b"0\r\n" + b"A: b\r\n" * 100 + b"\r\n", 431, "headers-too-large"),
            (b"5;" + b"a" * 2**21 + b"\r\nhello\r\n0\r\n\r\n", 413, "body-too-large"),
        ],
    )
    def test_a_malformed_body_is_rejected_and_ends_the_connection(self, body: bytes, status: int, code: str):
        app = Echo()

        async def test(local: Local) -> None:
            head = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
            response = await local.exchange(head, body)
            assert statuses(response) == [status]
            assert json.loads(response.partition(b"\r\n\r\n")[2])["code"] == code
            assert response.lower().count(b"connection: close") == 1
            assert local.metrics.registry.get_sample_value("pid_refusals_total", {"code": code}) == 1
            assert app.seen == []

        run(app, test)


class TestResponses:
    @pytest.mark.parametrize("framed", [True, False])
    def test_an_http_1_0_client_gets_no_chunks(self, framed: bool):
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await respond(send, b"hello", framed=framed)

        async def test(local: Local) -> None:
            head, _, body = (await local.exchange(b"GET / HTTP/1.0\r\n\r\n")).partition(b"\r\n\r\n")
            assert body == b"hello"
            assert b"transfer-encoding" not in head
            assert b"connection: close" in head

        run(app, test)

    def test_an_http_1_1_client_gets_chunks_without_a_content_length(self):
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"hello", "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        async def test(local: Local) -> None:
            head, _, body = (await local.exchange(LAST)).partition(b"\r\n\r\n")
            assert head == b"HTTP/1.1 200 OK\r\ndate: today\r\ntransfer-encoding: chunked\r\nconnection: close"
            assert body == b"5\r\nhello\r\n0\r\n\r\n"

        run(app, test)

    @pytest.mark.parametrize("framed", [True, False])
    def test_a_response_to_head_has_no_body(self, framed: bool):
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await respond(send, b"hello", framed=framed)

        async def test(local: Local) -> None:
            response = await local.exchange(LAST.replace(b"GET", b"HEAD"))
            assert response.endswith(b"\r\n\r\n")
            assert (b"content-length: 5" in response) is framed

        run(app, test)

    @pytest.mark.parametrize("status", [204, 304])
    def test_a_status_without_a_body_has_no_framing(self, status: int):
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await respond(send, b"", status, framed=False)

        async def test(local: Local) -> None:
            response = await local.exchange(INNER + LAST)
            assert statuses(response) == [status, status]
            assert b"transfer-encoding" not in response

        run(app, test)

    def test_the_body_is_requested_once_the_application_reads_it(self):
        async def test(local: Local) -> None:
            reader, writer = await local.connect()
            writer.write(post(b"", b"Expect: 100-continue").replace(b"Length: 0", b"Length: 5"))
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(b"hello" + LAST)
            assert statuses(await read_all(reader)) == [200, 200]

        run(Echo(), test)

    def test_an_early_response_does_not_request_the_body(self):
        async def test(local: Local) -> None:
            head = post(b"", b"Expect: 100-continue").replace(b"Length: 0", b"Length: 5")
            response = await local.exchange(head)
            assert statuses(response) == [401]
            assert b"connection: close" in response

        run(reject, test)

    def test_a_body_that_has_begun_is_not_requested(self):
        async def test(local: Local) -> None:
            response = await local.exchange(post(b"hello", b"Expect: 100-continue") + LAST)
            assert statuses(response) == [200, 200]

        run(Echo(), test)


class TestFailures:
    @pytest.mark.parametrize("read", [False, True])
    def test_an_exception_is_a_problem_document_and_logged_once(self, read: bool, caplog: pytest.LogCaptureFixture):
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if read:
                await receive()
            raise ValueError("secret")

        async def test(local: Local) -> None:
            response = await local.exchange(post(b"hello"))
            assert statuses(response) == [500]
            assert json.loads(response.partition(b"\r\n\r\n")[2])["code"] == "internal-error"
            assert b"secret" not in response

        run(app, test)
        assert [record.exc_info is not None for record in caplog.records if record.levelname == "ERROR"] == [True]

    @pytest.mark.parametrize("request_line", [b"GET / HTTP/1.1", b"GET / HTTP/1.0"])
    def test_a_client_can_tell_that_a_response_is_incomplete(self, request_line: bytes):
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"hello", "more_body": True})
            await asyncio.sleep(0.05)

        async def test(local: Local) -> None:
            reader, writer = await local.connect()
            writer.write(request_line + b"\r\nHost: x\r\n\r\n")
            if b"1.0" in request_line:
                with pytest.raises(ConnectionResetError):
                    await reader.read(-1)
            else:
                assert not (await reader.read(-1)).endswith(b"0\r\n\r\n")

        run(app, test)

    def test_a_request_cancelled_by_the_end_of_the_server_gets_503(self, caplog: pytest.LogCaptureFixture):
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await asyncio.Event().wait()

        async def test(local: Local) -> None:
            reader, writer = await local.connect()
            writer.write(INNER)
            await eventually(lambda: local.state.tasks)
            for task in local.state.tasks:
                task.cancel()
            response = await read_all(reader)
            assert statuses(response) == [503]
            assert json.loads(response.partition(b"\r\n\r\n")[2])["code"] == "unavailable"

        run(app, test)
        assert caplog.records == []

    @pytest.mark.parametrize(
        "headers",
        [[(b"a b", b"c")], [(b"a", b"b\r\nc: d")], [(b"transfer-encoding", b"gzip")], [(b"content-length", b"9")]],
    )
    def test_an_invalid_response_is_not_sent(self, headers: list[tuple[bytes, bytes]]):
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"hello"})

        async def test(local: Local) -> None:
            response = await local.exchange(INNER)
            assert b"hello" not in response
            assert b"\r\nc: d" not in response

        run(app, test)
