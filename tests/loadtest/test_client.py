"""The client and the generator against servers that misbehave; nothing here depends on how fast the machine is."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from engines.errors import ConfigError
from engines.runtime.simulated import SimulatedCost
from loadtest.generator import Generator, Run
from loadtest.http_client import Client, HttpExchange
from loadtest.scenario import RequestClass
from loadtest.schedule import Arrival, Capacity, Schedule

SIZE = (64, 64)
KIND = RequestClass(name="a", size=SIZE)
PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[Client]:
    """`handler` is called for each request, once its head and body have been read."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                await reader.readexactly(int(head.partition("content-length: ")[2].partition("\r")[0]))
                await handler(reader, writer)
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    client = Client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    try:
        yield client
    finally:
        client.close()
        server.close()


def answer(body: bytes = PNG_END, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def answering(reply: bytes, close: bool = False) -> Handler:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(reply)
        if close:
            writer.close()

    return handler


async def exchange(handler: Handler, **options: object) -> HttpExchange:
    async with serving(handler) as client, asyncio.timeout(10):
        connection = await client.connect()
        return await connection.exchange(client.request("POST", "/decode", body=b"latent"), **options)  # type: ignore[arg-type]


async def run(handler: Handler, *arrivals: Arrival, give_up: float = 10.0, retry: bool = False) -> Run:
    async with serving(handler) as client:
        generator = Generator(client, Capacity({SIZE: SimulatedCost(step=0.1)}), {SIZE: (16, 2, 2)}, retry)
        return await generator.run(Schedule(arrivals, 1.0), give_up)


class TestClient:
    def test_a_whole_answer(self):
        result = asyncio.run(exchange(answering(answer())))
        assert (result.status, result.complete, result.size, result.tail) == (200, True, 12, PNG_END)

    def test_a_chunked_answer_and_its_failed_parts(self):
        body = b"4\r\nX-St\r\n1b\r\n--x\r\nX-Status: 500\r\n\r\n--x--\r\n0\r\n\r\n"
        head = b"HTTP/1.1 200 OK\r\nContent-Type: multipart/mixed; boundary=x\r\nTransfer-Encoding: chunked\r\n\r\n"
        result = asyncio.run(exchange(answering(head + body)))
        assert (result.complete, result.size, result.failed_parts) == (True, 31, 1)

    @pytest.mark.parametrize("reply", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nhalf"])
    def test_a_connection_that_ends_early_is_no_answer(self, reply: bytes):
        result = asyncio.run(exchange(answering(reply, close=True)))
        assert not result.complete
        assert "connection lost" in result.reason

    def test_what_is_not_http_is_no_answer(self):
        assert "not HTTP" in asyncio.run(exchange(answering(b"SSH-2.0 hello\r\n\r\n"))).reason

    def test_one_that_leaves_while_streaming_has_read_some(self):
        result = asyncio.run(exchange(answering(answer(bytes(10_000_000))), leave_streaming=True))
        assert result.left
        assert 0 < result.size < 10_000_000

    def test_a_slow_reader_takes_its_time_and_reads_all(self):
        result = asyncio.run(exchange(answering(answer(bytes(300_000))), read_rate=1e6))
        assert (result.complete, result.size) == (True, 300_000)
        assert result.first_byte is not None
        assert result.done is not None
        assert result.done - result.first_byte >= 0.03

    def test_connections_are_kept_alive(self):
        outcomes = asyncio.run(run(answering(answer()), *(Arrival(0.05 * i, KIND) for i in range(5))))
        assert [outcome.kind for outcome in outcomes.outcomes] == ["in time"] * 5
        assert outcomes.connections < 5

    @pytest.mark.parametrize("url", ["ftp://x", "localhost:8000", "https://x"])
    def test_a_url_of_another_kind_is_refused(self, url: str):
        with pytest.raises(ConfigError, match="looks like"):
            Client(url)


class TestGenerator:
    def test_a_stalled_server_shows_in_the_latency_of_all_who_wanted_an_answer_meanwhile(self):
        """Coordinated omission: a client that waited for each answer would report one slow request, not five."""
        arrivals = [Arrival(0.1 * i, KIND) for i in range(5)]
        stalled = asyncio.Event()

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            asyncio.get_running_loop().call_later(0.6, stalled.set)
            await stalled.wait()
            writer.write(answer())

        latencies = [outcome.latency or 0.0 for outcome in asyncio.run(run(handler, *arrivals)).outcomes]
        assert all(latency >= 0.59 - 0.1 * i for i, latency in enumerate(latencies))

    def test_a_generator_that_falls_behind_says_so_and_does_not_flatter(self):
        late = asyncio.run(run(answering(answer()), Arrival(-0.5, KIND))).outcomes[0]
        assert late.lag >= 0.5
        assert (late.latency or 0.0) >= 0.5

    def test_an_answer_that_never_comes_is_an_error(self):
        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()

        outcome = asyncio.run(run(silent, Arrival(0.0, KIND), give_up=0.2)).outcomes[0]
        assert (outcome.kind, outcome.error) == ("error", "no whole answer within 0.2 s")

    def test_one_that_retries_waits_as_long_as_it_was_told_and_is_charged_for_all_of_it(self):
        replies = [
            b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n",
            b"",
            b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 0\r\nContent-Length: 0\r\n\r\n",
            answer(),
        ]
        left = iter(replies)

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            reply = next(left)
            writer.write(reply)
            if not reply:
                writer.close()

        outcome = asyncio.run(run(handler, Arrival(0.0, KIND), retry=True)).outcomes[0]
        assert outcome.kind == "in time"
        assert [failure.status for failure in outcome.failures] == [503, 0, 429]
        assert "connection lost" in outcome.failures[1].reason
        assert outcome.failures[1].sent - outcome.failures[0].ended >= 1.0
        assert (outcome.latency or 0.0) >= 1.5  # the second wait is the client's own
        assert outcome.lag == pytest.approx(max(0.0, outcome.failures[0].sent))

    def test_one_that_retries_does_not_repeat_what_can_never_be_served(self):
        outcome = asyncio.run(run(answering(answer(b"", "422 No")), Arrival(0.0, KIND), retry=True)).outcomes[0]
        assert (outcome.kind, outcome.error, outcome.failures) == ("error", "status 422", ())

    def test_one_that_leaves_while_waiting_is_no_error(self):
        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()

        assert asyncio.run(run(silent, Arrival(0.0, KIND, leaves_after=0.1))).outcomes[0].kind == "left"

    def test_no_server_is_an_error_of_each_request(self):
        async def refused() -> Run:
            async with serving(answering(b"")) as client:
                pass
            generator = Generator(client, Capacity({SIZE: SimulatedCost()}), {SIZE: (16, 2, 2)})
            return await generator.run(Schedule((Arrival(0.0, KIND),), 1.0), 5.0)

        assert "no connection" in asyncio.run(refused()).outcomes[0].error

    def test_requests_carry_their_options(self):
        kind = RequestClass(name="b", size=SIZE, priority="batch", deadline_ms=1500, steps=2)
        generator = Generator(Client("http://127.0.0.1:1"), Capacity({SIZE: SimulatedCost()}), {SIZE: (16, 2, 2)})
        request = generator._request(kind)
        assert b"steps=2" in request
        assert b"priority=batch" in request
        assert b"X-Deadline-Ms: 1500\r\n" in request
