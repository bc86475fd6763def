"""The HTTP client and the generator against misbehaving servers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from urllib.parse import parse_qs, urlsplit

import pytest

from engines.errors import ConfigError
from engines.runtime.simulated import SimulatedCost
from engines.size import Size
from loadtest.generator import Generator, Run
from loadtest.http_client import Client, HttpExchange
from loadtest.outcome import PNG_END, OutcomeKind
from loadtest.scenario import RequestClass
from loadtest.schedule import Arrival, Capacity, Schedule
from server.scheduling.costs import Output

SIZE = Size(64, 64)
OUTPUT = Output("simulated", SIZE)
KIND = RequestClass(name="a", size=SIZE)
LATENTS = {OUTPUT: (16, 2, 2)}

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def serving(handler: Handler, heads: list[str] | None = None) -> AsyncIterator[Client]:
    """Call `handler` for each request once its head and body have been read; collect the heads in `heads`."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                await reader.readexactly(int(head.partition("Content-Length: ")[2].partition("\r")[0]))
                if heads is not None:
                    heads.append(head)
                await handler(reader, writer)
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    client = Client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    try:
        yield client
    finally:
        client.close()
        server.close()


def response(body: bytes = PNG_END, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def replying(reply: bytes, close: bool = False) -> Handler:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(reply)
        if close:
            writer.close()

    return handler


async def exchange(handler: Handler, **options: object) -> HttpExchange:
    async with serving(handler) as client, asyncio.timeout(10):
        connection = await client.connect()
        return await connection.exchange(client.request("POST", "/decode", body=b"latent"), **options)  # type: ignore[arg-type]


async def run(
    handler: Handler,
    *arrivals: Arrival,
    time_limit: float = 10.0,
    retry: bool = False,
    heads: list[str] | None = None,
) -> Run:
    async with serving(handler, heads) as client:
        generator = Generator(client, Capacity({OUTPUT: SimulatedCost(step=0.1)}), LATENTS, retry)
        return await generator.run(Schedule(arrivals, 1.0), time_limit)


class TestClient:
    def test_a_complete_response_is_counted(self):
        result = asyncio.run(exchange(replying(response())))
        assert (result.status, result.complete, result.size, result.tail) == (200, True, 12, PNG_END)

    def test_failed_parts_of_a_chunked_response_are_counted(self):
        body = b"4\r\nX-St\r\n1b\r\n--x\r\nX-Status: 500\r\n\r\n--x--\r\n0\r\n\r\n"
        head = b"HTTP/1.1 200 OK\r\nContent-Type: multipart/mixed; boundary=x\r\nTransfer-Encoding: chunked\r\n\r\n"
        result = asyncio.run(exchange(replying(head + body)))
        assert (result.complete, result.size, result.failed_parts) == (True, 31, 1)

    @pytest.mark.parametrize("reply", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nhalf"])
    def test_a_connection_that_closes_early_gives_an_incomplete_response(self, reply: bytes):
        result = asyncio.run(exchange(replying(reply, close=True)))
        assert not result.complete
        assert "connection lost" in result.reason

    def test_a_response_that_is_not_http_is_incomplete(self):
        assert "invalid HTTP" in asyncio.run(exchange(replying(b"SSH-2.0 hello\r\n\r\n"))).reason

    def test_a_client_that_disconnects_while_streaming_has_read_part_of_the_body(self):
        result = asyncio.run(exchange(replying(response(bytes(10_000_000))), disconnect_streaming=True))
        assert result.disconnected
        assert 0 < result.size < 10_000_000

    def test_a_slow_reader_reads_everything_at_its_own_rate(self):
        result = asyncio.run(exchange(replying(response(bytes(300_000))), read_rate=1e6))
        assert (result.complete, result.size) == (True, 300_000)
        assert result.first_byte is not None
        assert result.done is not None
        assert result.done - result.first_byte >= 0.03

    def test_a_client_that_reads_late_leaves_the_response_in_the_buffers_until_then(self):
        written = asyncio.Event()

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(response(bytes(20_000_000)))
            await writer.drain()
            written.set()

        async def read_late() -> tuple[bool, HttpExchange]:
            async with serving(handler) as client, asyncio.timeout(20):
                connection = await client.connect(slow=True)
                exchange = asyncio.create_task(connection.exchange(client.request("POST", "/"), read_after=0.5))
                await asyncio.wait({exchange}, timeout=0.25)
                written_early = written.is_set()
                return written_early, await exchange

        written_early, result = asyncio.run(read_late())
        assert not written_early
        assert (result.complete, result.size) == (True, 20_000_000)

    def test_connections_are_kept_alive(self):
        outcomes = asyncio.run(run(replying(response()), *(Arrival(0.05 * i, KIND) for i in range(5))))
        assert [outcome.kind for outcome in outcomes.outcomes] == [OutcomeKind.IN_TIME] * 5
        assert outcomes.connections < 5

    @pytest.mark.parametrize("url", ["ftp://x", "localhost:8000", "https://x"])
    def test_an_invalid_url_is_rejected(self, url: str):
        with pytest.raises(ConfigError, match="use the form"):
            Client(url)


class TestGenerator:
    def test_a_stall_is_part_of_the_latency_of_every_request_scheduled_during_it(self):
        """Without coordinated omission: a closed-loop client would report one slow request instead of five."""
        arrivals = [Arrival(0.1 * i, KIND) for i in range(5)]
        stalled = asyncio.Event()

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            asyncio.get_running_loop().call_later(0.6, stalled.set)
            await stalled.wait()
            writer.write(response())

        latencies = [outcome.latency or 0.0 for outcome in asyncio.run(run(handler, *arrivals)).outcomes]
        assert all(latency >= 0.59 - 0.1 * i for i, latency in enumerate(latencies))

    def test_the_lag_of_the_generator_is_reported_and_part_of_the_latency(self):
        late = asyncio.run(run(replying(response()), Arrival(-0.5, KIND))).outcomes[0]
        assert late.lag >= 0.5
        assert (late.latency or 0.0) >= 0.5

    def test_a_request_without_a_response_is_an_error(self):
        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()

        outcome = asyncio.run(run(silent, Arrival(0.0, KIND), time_limit=0.2)).outcomes[0]
        assert (outcome.kind, outcome.error) == (OutcomeKind.ERROR, "no complete response within 0.2 s")

    def test_retries_wait_for_retry_after_and_count_towards_the_latency(self):
        replies = [
            b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n",
            b"",
            b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 0\r\nContent-Length: 0\r\n\r\n",
            response(),
        ]
        remaining = iter(replies)

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            reply = next(remaining)
            writer.write(reply)
            if not reply:
                writer.close()

        outcome = asyncio.run(run(handler, Arrival(0.0, KIND), retry=True)).outcomes[0]
        assert outcome.kind is OutcomeKind.IN_TIME
        assert [failure.status for failure in outcome.failures] == [503, 0, 429]
        assert "connection lost" in outcome.failures[1].reason
        assert outcome.failures[1].sent - outcome.failures[0].ended >= 1.0
        assert (outcome.latency or 0.0) >= 1.5  # 1 s from Retry-After, 0.5 s without one
        assert outcome.lag == pytest.approx(max(0.0, outcome.failures[0].sent))

    def test_a_client_error_is_not_retried(self):
        outcome = asyncio.run(run(replying(response(b"", "422 No")), Arrival(0.0, KIND), retry=True)).outcomes[0]
        assert (outcome.kind, outcome.error, outcome.failures) == (OutcomeKind.ERROR, "status 422", ())

    def test_a_disconnect_while_waiting_is_not_an_error(self):
        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()

        outcome = asyncio.run(run(silent, Arrival(0.0, KIND, disconnect_after=0.1))).outcomes[0]
        assert outcome.kind is OutcomeKind.DISCONNECTED

    def test_without_a_server_each_request_is_an_error(self):
        async def run_without_server() -> Run:
            async with serving(replying(b"")) as client:
                pass
            generator = Generator(client, Capacity({OUTPUT: SimulatedCost()}), LATENTS)
            return await generator.run(Schedule((Arrival(0.0, KIND),), 1.0), 5.0)

        assert "no connection" in asyncio.run(run_without_server()).outcomes[0].error

    @pytest.mark.parametrize("status", ["200 OK", "429 Too Many Requests"])
    def test_clients_of_a_closed_loop_send_one_request_after_another(self, status: str):
        open_now, most = 0, 0

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal open_now, most
            open_now += 1
            most = max(most, open_now)
            await asyncio.sleep(0.02)
            open_now -= 1
            writer.write(response(status=status))

        async def run_loop() -> Run:
            async with serving(handler) as client:
                generator = Generator(client, Capacity({OUTPUT: SimulatedCost(step=0.1)}), LATENTS)
                loop = RequestClass(name="loop", size=SIZE, clients=3)
                return await generator.run(Schedule((), 0.6, loops=(loop,)), 10.0)

        outcomes = asyncio.run(run_loop()).outcomes
        assert most == 3
        assert len(outcomes) >= 6
        assert {outcome.name for outcome in outcomes} == {"loop"}

    def test_an_unknown_api_key_is_named_before_anything_is_sent(self):
        heads: list[str] = []
        kind = RequestClass(name="b", key="nobody", size=SIZE)
        with pytest.raises(ConfigError, match="API key nobody"):
            asyncio.run(run(replying(response()), Arrival(0.0, kind), heads=heads))
        assert not heads

    def test_requests_carry_the_key_of_their_class(self):
        heads: list[str] = []

        async def run_keys() -> None:
            async with serving(replying(response()), heads) as client:
                keys = {"one": "1111", "two": "2222"}
                generator = Generator(client, Capacity({OUTPUT: SimulatedCost()}), LATENTS, keys=keys)
                kind = RequestClass(name="b", key="two", size=SIZE)
                await generator.run(Schedule((Arrival(0.0, kind), Arrival(0.1, KIND)), 1.0), 10.0)

        asyncio.run(run_keys())
        assert ["Bearer 2222" in heads[0], "Bearer 1111" in heads[1]] == [True, True]

    def test_requests_carry_their_options(self):
        kind = RequestClass(name="b", size=SIZE, priority="batch", deadline_ms=1500, steps=2, format="jpeg", quality=80)
        heads: list[str] = []
        asyncio.run(run(replying(response()), Arrival(0.0, kind), heads=heads))
        (head,) = heads
        assert "steps=2" in head
        assert "priority=batch" in head
        assert "format=jpeg" in head
        assert "quality=80" in head
        assert "compression" not in head
        assert "X-Deadline-Ms: 1500\r\n" in head
        assert "prompt" not in head

    def test_new_prompts_differ_between_requests_and_between_runs(self):
        """A server may remember the prompts of earlier runs."""
        kind = RequestClass(name="b & c", size=SIZE, new_prompts=0.5)
        arrivals = [Arrival(0.05 * number, kind, new_prompt=new) for number, new in enumerate((0, 1, 0, 2))]
        prompts = []
        for _ in range(2):
            heads: list[str] = []
            asyncio.run(run(replying(response()), *arrivals, heads=heads))
            queries = [parse_qs(urlsplit(head.split()[1]).query) for head in heads]
            prompts.append([query["prompt"][0] for query in queries])
        (first, new, again, other), (first_later, new_later, *_) = prompts
        assert first == again == first_later
        assert first.endswith("b & c")
        assert len({first, new, other, new_later}) == 4
