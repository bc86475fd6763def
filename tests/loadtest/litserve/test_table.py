"""The comparison with LitServe: how its numbers are told, and the machine that they were measured on."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from engines.errors import ConfigError
from loadtest.litserve import __main__ as compare_litserve
from loadtest.litserve import machine
from loadtest.litserve.table import FLOOR, OURS, Measured, table
from loadtest.processes import Process, free_port


def measured(server: str, throughput: float, p99: float, answers: str = "encoded") -> Measured:
    return Measured(
        server, answers, 3, throughput, (throughput, throughput), 1.0, 1.0, 12.6, 100, 1.0, p99, p99 - 10.0, 0
    )


def test_ratios_are_taken_against_the_better_litserve_and_the_floor():
    rows = [measured(OURS, 90, 40), measured("LitServe", 30, 100), measured("fast", 45, 90), measured(FLOOR, 100, 30)]
    text = table([*rows, *(measured(m.server, m.throughput, m.p99_ms, "pre-encoded") for m in rows)])
    assert text.count("2.00 times LitServe's throughput") == 2
    assert "p99 at half load 30.0 ms beyond one encoding, +10.0 ms beside" in text
    assert "LitServe's 80.0 ms" in text


def test_a_held_process_and_its_children_do_nothing_until_they_are_let_go():
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"
    process = subprocess.Popen([sys.executable, "-c", child])
    try:
        limit = time.monotonic() + 20
        while machine.cpu_seconds(process.pid) < 0.2:
            assert time.monotonic() < limit, "waited too long"
            time.sleep(0.01)
        machine.hold(process.pid, True)
        members = list(machine.tree(process.pid))
        assert len(members) == 2
        while any(member.status() != psutil.STATUS_STOPPED for member in members):
            assert time.monotonic() < limit, "waited too long"
        before = machine.cpu_seconds(process.pid)
        assert machine.cpu_seconds(process.pid) == before
        machine.hold(process.pid, False)
        while machine.cpu_seconds(process.pid) <= before:
            assert time.monotonic() < limit, "waited too long"
            time.sleep(0.01)
    finally:
        for member in list(machine.tree(process.pid)):
            member.kill()
        process.wait()
    assert machine.cpu_seconds(process.pid) == 0.0


@pytest.mark.parametrize("flags", [[], ["--bytes", "1500000"]])
def test_the_floor_answers_with_a_whole_picture(flags: list[str], tmp_path: Path):
    async def ask() -> tuple[int, int, bytes]:
        port = free_port()
        process = Process(
            [sys.executable, "-m", "loadtest.litserve.bytes_server", *flags, "--port", str(port)],
            port,
            tmp_path / "log",
        )
        await process.start("/health")
        client = compare_litserve.Client(process.url)
        try:
            connection = await client.connect()
            exchange = await connection.exchange(client.request("POST", "/decode", body=b"latent"), keep_body=True)
            return exchange.status, exchange.size, exchange.tail
        finally:
            client.close()
            await process.stop()

    status, size, body = asyncio.run(ask())
    assert status == 200
    assert size == len(body) == (1_500_000 if flags else size)
    assert body.endswith(b"IEND\xaeB`\x82")
    if not flags:
        assert body.startswith(b"\x89PNG")


def test_without_litserve_there_is_a_sentence(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(compare_litserve, "find_spec", lambda name: None)
    assert compare_litserve.main(["--output", str(tmp_path)]) == 2
    assert "LitServe is not installed" in capsys.readouterr().err


def test_a_machine_with_one_core_has_none_to_pin_to(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0}, raising=False)
    with pytest.raises(ConfigError, match="one core"):
        compare_litserve._pin()
