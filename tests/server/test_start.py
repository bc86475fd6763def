"""The start of the server process: mistakes end it before PyTorch is imported."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest


def start(*arguments: str) -> tuple[int, str, set[str]]:
    """Return exit status, output and imported modules of a server process that ends by itself."""
    command = [sys.executable, "-X", "importtime", "-m", "server", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    imported = re.compile(r"import time: .*\| +([\w.]+)")
    lines = [*done.stdout.splitlines(), *done.stderr.splitlines()]
    modules = {match[1] for line in lines if (match := imported.fullmatch(line))}
    output = "\n".join(line for line in lines if not line.startswith("import time:"))
    return done.returncode, output, modules


@pytest.fixture
def used_port() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield str(other.getsockname()[1])


def test_a_port_in_use_is_one_sentence_before_pytorch_is_imported(used_port: str):
    status, output, modules = start("--bundle", "missing", "--port", used_port)
    assert status == 2
    assert output == (
        f"server: Cannot listen on 127.0.0.1 port {used_port}: the port is in use; "
        "stop the program that uses it, or choose another --port."
    )
    assert "server.settings" in modules
    assert not modules & {"torch", "numpy", "fastapi", "uvicorn"}


@pytest.mark.parametrize(
    ("arguments", "expected", "output"),
    [
        (["--help"], 0, "--bundle [NAME=]DIR"),
        (["--version"], 0, "pid-decode-server"),
        ([], 2, "--bundle (or PID_BUNDLE) is required"),
        (["--bundel", "x"], 2, "Did you mean --bundle?"),
        (["--bundle", ".", "--uds", __file__], 2, "exists and is not a socket"),
        (["--bundle", ".", "--ssl-certfile", "missing.pem"], 2, "Cannot read --ssl-certfile missing.pem: No such file"),
        (["--bundle", ".", "--ssl-keyfile", "key.pem"], 2, "--ssl-keyfile needs --ssl-certfile"),
        (["--bundle", ".", "--port", "x"], 2, "--port (or PID_PORT) should be a valid integer, not 'x'."),
    ],
)
def test_the_command_line_is_checked_before_pytorch_is_imported(arguments: list[str], expected: int, output: str):
    status, printed, modules = start(*arguments)
    assert status == expected
    assert output in printed
    assert "Traceback" not in printed
    assert "torch" not in modules
