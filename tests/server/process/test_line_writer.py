"""Output that never blocks, whatever is at the other end of the descriptor."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.process.writer import LineWriter
from tests.waiting import until

LINE = b"x" * 99 + b"\n"


def report(count: int) -> bytes:
    return b"%d dropped\n" % count


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        with contextlib.suppress(OSError):
            os.close(end)


def read_all(descriptor: int) -> list[bytes]:
    """Read what is in the pipe without waiting for more."""
    os.set_blocking(descriptor, False)
    data = b""
    with contextlib.suppress(BlockingIOError):
        while chunk := os.read(descriptor, 1 << 20):
            data += chunk
    return data.splitlines(keepends=True)


def test_lines_are_written_in_order(tmp_path: Path):
    lines = [b"%d\n" % number for number in range(50_000)]
    with (tmp_path / "log").open("wb") as file:
        writer = LineWriter(file.fileno(), report)
        for line in lines:
            writer.write(line)
        writer.flush(60)
    assert (tmp_path / "log").read_bytes() == b"".join(lines)
    assert writer.dropped == 0


def test_lines_that_nobody_reads_are_dropped_and_reported_later(pipe: tuple[int, int]):
    reading, writing = pipe
    writer = LineWriter(writing, report, max_bytes=10_000)
    for _ in range(5000):  # far more than the pipe and the queue hold
        writer.write(LINE)
    assert writer.dropped > 0
    lines: list[bytes] = []
    while not writer.idle:
        lines += read_all(reading)
    writer.write(b"later\n")
    until(lambda: bool(lines.extend(read_all(reading)) or lines[-1] == b"later\n"))
    reported = sum(int(line.split()[0]) for line in lines if line.endswith(b"dropped\n"))
    assert reported == writer.dropped
    assert lines.count(LINE) == 5000 - writer.dropped


def test_flush_waits_only_for_a_limited_time(pipe: tuple[int, int]):
    writer = LineWriter(pipe[1], report)
    writer.write(b"x" * 1_000_000)
    writer.flush(0.01)
    assert not writer.idle
    while not writer.idle:
        read_all(pipe[0])
    writer.flush(60)


def test_a_closed_pipe_drops_lines(pipe: tuple[int, int]):
    writer = LineWriter(pipe[1], report)
    os.close(pipe[0])
    for _ in range(3):
        writer.write(LINE)
        writer.flush(60)
    assert writer.dropped == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_drops_lines():
    with Path("/dev/full").open("wb", buffering=0) as full:
        writer = LineWriter(full.fileno(), report)
        for _ in range(3):
            writer.write(LINE)
            writer.flush(60)
    assert writer.dropped == 3


def test_a_pipe_that_another_process_made_non_blocking_loses_nothing(pipe: tuple[int, int]):
    reading, writing = pipe
    os.set_blocking(writing, False)
    writer = LineWriter(writing, report)
    for _ in range(5000):
        writer.write(LINE)
    lines: list[bytes] = []
    while len(b"".join(lines)) < 5000 * len(LINE):
        lines += read_all(reading)
    assert b"".join(lines) == LINE * 5000
    assert writer.dropped == 0
