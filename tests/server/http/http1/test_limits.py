"""Limits of time, bytes and number on connections, in every phase."""

from __future__ import annotations

import asyncio
import socket
import struct

import pytest
from starlette.types import Receive, Scope, Send

from server.http.http1.connection import READ_AHEAD
from server.http.http1.connections import RESERVE
from tests.server.http.http1.conftest import Echo, Local, eventually, read_all, reject, respond, run
from tests.server.http.http1.test_requests import INNER, LAST, post, statuses


class Waiting:
    """Application that responds once it is released, and notices that the client has disconnected."""

    def __init__(self) -> None:
        self.release = asyncio.Event()
        self.running = self.disconnected = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        self.running += 1
        released = asyncio.ensure_future(self.release.wait())
        gone = asyncio.ensure_future(receive())
        await asyncio.wait({released, gone}, return_when=asyncio.FIRST_COMPLETED)
        self.running -= 1
        if gone.done():
            assert gone.result()["type"] == "http.disconnect"
            self.disconnected += 1
        gone.cancel()
        await respond(send, b"released")


async def flood(writer: asyncio.StreamWriter, total: int, piece: bytes) -> None:
    """Send `total` bytes, more than fit into the buffers of the kernel."""
    for _ in range(0, total, len(piece)):
        writer.write(piece)
        await writer.drain()


EARLY = {
    "unread body": post(b"a")[:-1].replace(b"Length: 1", b"Length: 1000000"),
    "body in a GET": b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n",
    "endless chunks": b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n",
    "expected body": post(b"", b"Expect: 100-continue").replace(b"Length: 0", b"Length: 1000000"),
}


class TestEarlyResponses:
    @pytest.mark.parametrize("name", EARLY)
    def test_a_connection_with_an_unread_body_is_closed(self, name: str):
        async def test(local: Local) -> None:
            reader, writer = await local.connect()
            writer.write(EARLY[name])
            response = await reader.readuntil(b"rejected")
            assert b"connection: close" in response
            writer.write(b"5" if "chunks" in name else b"a")  # then nothing more
            assert await reader.read() == b""
            await eventually(lambda: not local.state.connections)
            assert local.aborted("linger-timeout") == 1

        run(reject, test)

    @pytest.mark.parametrize("name", EARLY)
    def test_an_endless_body_is_discarded_up_to_a_limit(self, name: str):
        async def test(local: Local) -> None:
            reader, writer = await local.connect()
            writer.write(EARLY[name])
            assert statuses(await reader.readuntil(b"rejected")) == [401]
            with pytest.raises(ConnectionError):
                await flood(writer, 64 * 2**20, b"4000\r\n" + b"a" * 0x4000 + b"\r\n")
            assert not local.state.connections

        run(reject, test)

    def test_a_client_that_sends_its_whole_body_first_receives_the_response(self):
        async def test(local: Local) -> None:
            response = await local.exchange(EARLY["unread body"], b"a" * 200_000)
            assert statuses(response) == [401]

        run(reject, test)

    def test_a_body_that_has_arrived_is_dropped_and_the_connection_kept(self):
        async def test(local: Local) -> None:
            assert statuses(await local.exchange(post(b"hello") + LAST)) == [401, 401]

        run(reject, test)


class TestTimeouts:
    @pytest.mark.parametrize("beginning", [b"", b"GET / HT", INNER[:-2], b"\r\n"])
    def test_a_head_that_does_not_arrive(self, beginning: bytes):
        async def test(local: Local) -> None:
            assert await local.exchange(beginning) == b""
            assert local.aborted("header-timeout") == 1

        run(Echo(), test, header_timeout=0.1)

    def test_the_head_of_a_later_request_that_does_not_arrive(self):
        async def test(local: Local) -> None:
            assert statuses(await local.exchange(INNER, b"GET / HT")) == [200]
            assert local.aborted("header-timeout") == 1

        run(Echo(), test, header_timeout=0.1)

    def test_an_idle_connection(self):
        async def test(local: Local) -> None:
            assert statuses(await local.exchange(INNER)) == [200]
            assert local.aborted("keep-alive-timeout") == 1

        run(Echo(), test, keep_alive_timeout=0.1)

    def test_a_body_that_the_application_does_not_read(self):
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await asyncio.Event().wait()

        async def test(local: Local) -> None:
            assert await local.exchange(EARLY["unread body"], b"a") == b""
            assert local.aborted("body-timeout") == 1

        run(app, test, body_timeout=0.1)

    @pytest.mark.parametrize("complete", [True, False])
    def test_a_response_that_the_client_does_not_read(self, complete: bool):
        disconnected = asyncio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": bytes(2**25), "more_body": not complete})
            assert (await receive())["type"] == "http.disconnect"
            disconnected.set()

        async def test(local: Local) -> None:
            _, writer = await local.connect()
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            writer.write(INNER)
            await disconnected.wait()
            await eventually(lambda: not local.state.connections)
            assert local.aborted("response-timeout") == 1

        run(app, test, response_timeout=0.3)


class TestDisconnects:
    @pytest.mark.parametrize("pipelined", [b"", INNER, INNER[:10], INNER * 100, post(b"a" * (READ_AHEAD // 2))])
    @pytest.mark.parametrize("reset", [True, False])
    def test_a_client_that_disconnects_during_its_request_is_noticed(self, pipelined: bytes, reset: bool):
        app = Waiting()

        async def test(local: Local) -> None:
            _, writer = await local.connect()
            writer.write(INNER + pipelined)
            await eventually(lambda: app.running)
            if reset:
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.close()
            await eventually(lambda: app.disconnected)
            await eventually(lambda: not local.state.connections)
            assert (app.running, app.disconnected) == (0, 1)

        run(app, test)

    def test_little_is_read_ahead_of_a_response(self):
        app = Waiting()

        async def test(local: Local) -> None:
            _, writer = await local.connect()
            writer.write(INNER)
            await eventually(lambda: app.running)
            writer.transport.set_write_buffer_limits(high=0)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(flood(writer, 64 * 2**20, bytes(2**20)), 1)

        run(app, test)


class TestLastRequests:
    @pytest.mark.parametrize(
        ("settings", "expected"),
        [({"max_requests_per_connection": 3}, 3), ({"max_connection_age": 1e-9}, 1)],
    )
    def test_a_connection_ends_politely_at_its_limit(self, settings: dict, expected: int):
        async def test(local: Local) -> None:
            response = await local.exchange(INNER * 10)
            assert statuses(response) == [200] * expected
            assert response.count(b"connection: close") == 1
            assert b"connection: close" in response.rpartition(b"HTTP/1.1")[2]

        run(Echo(), test, **settings)

    def test_a_draining_server_ends_connections_with_their_response(self):
        async def test(local: Local) -> None:
            reader, writer = await local.connect()
            writer.write(INNER)
            assert b"connection" not in await reader.readuntil(b"/inner ")
            local.draining = True
            writer.write(INNER)
            assert b"connection: close" in await read_all(reader)

        run(Echo(), test)

    def test_a_shutdown_closes_idle_connections_and_finishes_requests(self):
        app = Waiting()

        async def test(local: Local) -> None:
            idle, _ = await local.connect()
            busy, writer = await local.connect()
            writer.write(INNER)
            await eventually(lambda: app.running)
            for connection in list(local.state.connections):
                connection.shutdown()
            assert await idle.read() == b""
            app.release.set()
            response = await read_all(busy)
            assert statuses(response) == [200]
            assert b"connection: close" in response

        run(app, test)


class TestConnectionLimit:
    def test_the_connection_that_has_been_idle_longest_is_evicted(self):
        async def test(local: Local) -> None:
            clients = []
            for _ in range(3):
                clients.append(await local.connect())
                await eventually(lambda: len(local.state.connections) == len(clients))
            clients[0][1].write(INNER)  # the others have been idle for longer now
            await clients[0][0].readuntil(b"/inner ")
            newest, writer = await local.connect()
            assert await clients[1][0].read() == b""
            writer.write(LAST)
            assert statuses(await read_all(newest)) == [200]
            for reader, writer in (clients[0], clients[2]):
                writer.write(LAST)
                assert statuses(await read_all(reader)) == [200]
            assert local.aborted("evicted") == 1

        run(Echo(), test, max_connections=3)

    def test_a_reserve_is_served_if_no_connection_is_idle_and_the_rest_refused(self):
        app, over_limit = Waiting(), []

        async def probe(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["path"] == "/last":
                over_limit.append(scope["state"]["over_limit"])
                await respond(send, b"probe")
            else:
                await app(scope, receive, send)

        async def test(local: Local) -> None:
            clients = []
            for _ in range(2 + RESERVE):
                clients.append(await local.connect())
                clients[-1][1].write(INNER)
                await eventually(lambda: app.running == len(clients))
            assert await local.exchange(LAST) == b""
            assert local.aborted("refused") == 1
            assert not over_limit
            for connection in list(local.state.connections)[:3]:
                connection.abort("evicted")  # type: ignore[attr-defined]
            await eventually(lambda: app.disconnected == 3)
            response = await local.exchange(LAST.replace(b"Connection: close\r\n", b""))
            assert statuses(response) == [200]
            assert b"connection: close" in response
            assert over_limit == [True]

        run(probe, test, max_connections=2)

    def test_many_idle_connections_leave_room_for_a_request(self):
        async def test(local: Local) -> None:
            clients = [await local.connect() for _ in range(100)]
            assert statuses(await local.exchange(LAST)) == [200]
            assert len(local.state.connections) <= 10
            assert local.context.connections.idle() + local.context.connections.active() <= 10
            assert local.aborted("evicted") == len(clients) - 9

        run(Echo(), test, max_connections=10)
