"""Writing to slow clients, with a clock and a transport of the test."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable

import pytest

from server.http.http1.writer import Writer
from server.settings import READ_RATE_WINDOW

TIMEOUT, RATE = 60.0, 1000.0


class Clock:
    """Time and timers of an event loop."""

    def __init__(self) -> None:
        self.now, self.timers = 0.0, []

    def time(self) -> float:
        return self.now

    def call_later(self, delay: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(self.now + delay, callback, (), asyncio.new_event_loop())
        heapq.heappush(self.timers, handle)
        return handle


class Client:
    """Transport whose client reads `rate` bytes per second."""

    def __init__(self, rate: float = 0.0) -> None:
        self.clock, self.rate = Clock(), rate
        self.unread = 0.0
        self.limits: list[str] = []
        self.writer = Writer(self, self.clock, TIMEOUT, RATE, self.limits.append)  # type: ignore[arg-type]

    def write(self, data: bytes) -> None:
        self.unread += len(data)

    def get_write_buffer_size(self) -> int:
        return round(self.unread)

    def wait(self, seconds: float) -> None:
        """Let time pass, in steps of a second."""
        end = self.clock.now + seconds
        while self.clock.now < end:
            self.clock.now += 1
            self.unread = max(0.0, self.unread - self.rate)
            while self.clock.timers and self.clock.timers[0].when() <= self.clock.now:
                handle = heapq.heappop(self.clock.timers)
                if not handle.cancelled():
                    handle._run()


def test_a_client_that_does_not_read_exceeds_the_rate_after_one_window():
    client = Client()
    client.writer.write(b"a" * 100)
    client.wait(READ_RATE_WINDOW - 1)
    assert client.limits == []
    client.wait(2)
    assert client.limits == ["read-rate"]


@pytest.mark.parametrize(("rate", "limits"), [(RATE / 2, ["read-rate"]), (2 * RATE, [])])
def test_the_rate_decides_on_a_long_response(rate: float, limits: list[str]):
    client = Client(rate)
    client.writer.write(b"a" * 40_000)
    client.wait(50)
    assert client.limits == limits


def test_a_client_that_stops_in_the_middle_exceeds_the_rate():
    client = Client(rate=10 * RATE)
    client.writer.write(b"a" * 500_000)
    client.wait(20)
    client.rate = 0.0
    client.wait(2 * READ_RATE_WINDOW)
    assert client.limits == ["read-rate"]


def test_a_response_that_waits_for_longer_than_the_timeout_exceeds_it():
    client = Client(rate=2 * RATE)
    client.writer.write(b"a" * 1_000_000)
    client.wait(TIMEOUT - 2)
    assert client.limits == []
    client.wait(3)
    assert client.limits == ["response-timeout"]


def test_time_without_unread_bytes_does_not_count():
    client = Client(rate=10 * RATE)
    for _ in range(10):  # 4 s to read, 6 s without anything to read
        client.writer.write(b"a" * 40_000)
        client.wait(10)
    assert client.limits == []


def test_small_writes_with_pauses_do_not_count_as_a_slow_client():
    client = Client(rate=10 * RATE)
    for _ in range(100):
        client.writer.write(b"a")
        client.wait(1)
    assert client.limits == []


def test_each_response_has_its_own_timeout():
    client = Client(rate=10 * RATE)
    for _ in range(3):
        client.writer.begin_response()
        client.writer.write(b"a" * 400_000)
        client.wait(40)
    assert client.limits == []


def test_after_close_nothing_is_reported():
    client = Client()
    client.writer.write(b"a" * 100)
    client.writer.close()
    client.wait(1000)
    assert client.limits == []
