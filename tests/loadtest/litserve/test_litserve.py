"""The comparison with LitServe: its table, the bare server, and the processes that it suspends."""

from __future__ import annotations

import http.client
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from engines.errors import ConfigError
from loadtest.documents import to_document
from loadtest.litserve import machine
from loadtest.litserve.__main__ import main
from loadtest.litserve.compare import pin_client
from loadtest.litserve.table import BARE, KEYS, OURS, Measured, table
from loadtest.outcome import PNG_END
from loadtest.processes import Process, free_port, running
from tests.waiting import until


def measured(server: str, throughput: float, p99: float, response: str = "encoded") -> Measured:
    return Measured(
        server, response, 3, throughput, (throughput, throughput), 1.0, 1.0, 12.6, 100, 1.0, p99, p99 - 10.0, 0
    )


def test_ratios_are_relative_to_the_better_litserve_and_the_bare_server():
    rows = [measured(OURS, 90, 40), measured("LitServe", 30, 100), measured("fast", 45, 90), measured(BARE, 100, 30)]
    text = table([*rows, *(measured(m.server, m.throughput, m.p99_ms, "pre-encoded") for m in rows)])
    assert text.count("2.00 times LitServe's throughput") == 2
    assert "p99 at half load 30.0 ms beyond one encoding, +10.0 ms compared with the bare server" in text
    assert "LitServe's 80.0 ms" in text


def test_the_document_keeps_the_published_keys():
    document = to_document(measured(OURS, 90, 40), KEYS)
    assert list(document)[:3] == ["server", "answers", "rounds"]
    assert document["throughput_range"] == [90, 90]


@pytest.fixture
def busy_process() -> Iterator[int]:
    """A process whose child uses a core."""
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"
    with subprocess.Popen([sys.executable, "-c", child]) as process:
        yield process.pid
        machine.kill(process.pid)


def test_a_suspended_process_and_its_children_use_no_cpu_until_they_are_resumed(busy_process: int):
    until(lambda: machine.cpu_seconds(busy_process) >= 0.2)
    machine.suspend(busy_process)
    members = list(machine.tree(busy_process))
    assert len(members) == 2
    until(lambda: all(member.status() == psutil.STATUS_STOPPED for member in members))
    before = machine.cpu_seconds(busy_process)
    assert machine.cpu_seconds(busy_process) == before
    machine.resume(busy_process)
    until(lambda: machine.cpu_seconds(busy_process) > before)


def test_a_process_that_has_exited_used_no_cpu():
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert machine.cpu_seconds(process.pid) == 0.0


@pytest.mark.parametrize("flags", [[], ["--bytes", "1500000"]])
def test_the_bare_server_sends_a_complete_image(flags: list[str], tmp_path: Path):
    port = free_port()
    command = [sys.executable, "-m", "loadtest.litserve.bare_server", *flags, "--port", str(port)]
    with running(Process(command, port, tmp_path / "log"), "/health"):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("POST", "/decode", b"latent")
        response = connection.getresponse()
        body = response.read()
        connection.close()
    assert response.status == 200
    assert body.endswith(PNG_END)
    if flags:
        assert len(body) == 1_500_000
    else:
        assert body.startswith(b"\x89PNG")


def test_a_missing_litserve_is_explained(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr("loadtest.litserve.__main__.find_spec", lambda name: None)
    assert main(["--output", str(tmp_path)]) == 2
    assert "LitServe is not installed" in capsys.readouterr().err


def test_pinning_needs_two_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0}, raising=False)
    with pytest.raises(ConfigError, match="only one is available"):
        pin_client()
