"""Servers and nginx as child processes: started on free ports, waited for, drained and ended."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from engines.errors import ConfigError
from loadtest.http_client import Client

START_SECONDS = 90.0  # until a server has to be ready
STOP_SECONDS = 90.0  # until a drained server has to be gone


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


class Process:
    """A child process with an HTTP port; its output goes to a file."""

    def __init__(self, command: Sequence[str], port: int, log: Path) -> None:
        self._command, self.port, self._log = tuple(command), port, log
        self.url = f"http://127.0.0.1:{port}"
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, ready_path: str = "/health/ready") -> None:
        """Raises ConfigError if it ends or is not ready in time."""
        with self._log.open("ab") as log:
            process = await asyncio.create_subprocess_exec(*self._command, stdout=log, stderr=log)
        self._process = process
        limit = time.monotonic() + START_SECONDS
        client = Client(self.url)
        while time.monotonic() < limit:
            if process.returncode is not None:
                raise ConfigError(f"{self._command[0]} ended with {process.returncode}; see {self._log}.")
            with contextlib.suppress(OSError):
                status, _ = await client.get(ready_path)
                if status == 200:
                    client.close()
                    return
            await asyncio.sleep(0.1)
        raise ConfigError(f"{self.url}{ready_path} was not ready within {START_SECONDS:g} s; see {self._log}.")

    @property
    def pid(self) -> int:
        if self._process is None:
            raise RuntimeError("The process was never started.")
        return self._process.pid

    async def wait(self) -> int:
        """Its exit status, once it has ended."""
        if self._process is None:
            raise RuntimeError("The process was never started.")
        return await self._process.wait()

    async def stop(self, signum: int = signal.SIGTERM) -> int:
        """Ask it to end and wait; kill it if it does not. Its exit status, 0 if it was never started."""
        process = self._process
        if process is None:
            return 0
        if process.returncode is None:
            process.send_signal(signum)
        try:
            return await asyncio.wait_for(process.wait(), STOP_SECONDS)
        except TimeoutError:
            process.kill()
            return await process.wait()


def simulated_process(table: str, devices: int, flags: Sequence[str], log: Path, port: int | None = None) -> Process:
    """A server on simulated devices, not started yet; on a free port if none is given."""
    port = port or free_port()
    command = [sys.executable, "-m", "loadtest.simulated_server", "--table", table]
    command += ["--simulated-devices", str(devices), "--port", str(port), *flags]
    return Process(command, port, log)


@contextlib.asynccontextmanager
async def simulated_server(
    table: str, devices: int, flags: Sequence[str], folder: Path, name: str = "server"
) -> AsyncIterator[Process]:
    """A server on simulated devices, ready to serve."""
    process = simulated_process(table, devices, flags, folder / f"{name}.log")
    await process.start()
    try:
        yield process
    finally:
        await process.stop(signal.SIGKILL)  # nobody is left to answer; a test of draining has ended it itself


_NGINX = """\
daemon off;
pid {folder}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    client_max_body_size 64m;
    client_body_buffer_size 8m;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    upstream decoders {{
        least_conn;
        {servers}
        keepalive 64;
    }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://decoders;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_read_timeout 300s;
            # A server that drains answers 503, one that is gone refuses; decodes can be sent twice without harm.
            proxy_next_upstream error timeout http_503 non_idempotent;
        }}
    }}
}}
"""


@contextlib.asynccontextmanager
async def nginx(servers: Sequence[Process], folder: Path) -> AsyncIterator[Process]:
    """nginx before `servers`, least connections first; `folder` is absolute. Raises ConfigError where there is none."""
    program = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin:/opt/homebrew/bin")
    if program is None:
        raise ConfigError("This scenario needs nginx, which is not installed; on Debian: apt-get install nginx-light.")
    port = free_port()
    upstream = "\n        ".join(f"server 127.0.0.1:{server.port} max_fails=1 fail_timeout=1s;" for server in servers)
    config = folder / "nginx.conf"
    config.write_text(_NGINX.format(folder=folder, port=port, servers=upstream))
    process = Process([program, "-c", str(config), "-e", "stderr"], port, folder / "nginx.log")
    await process.start()
    try:
        yield process
    finally:
        await process.stop(signal.SIGQUIT)


async def restart_in_turn(servers: Sequence[Process], at: Sequence[float]) -> list[int]:
    """Drain and replace one server after the other, at these seconds; exit statuses of the drained ones."""
    began, statuses = time.monotonic(), []
    for number, moment in enumerate(at):
        await asyncio.sleep(max(0.0, began + moment - time.monotonic()))
        server = servers[number % len(servers)]
        statuses.append(await server.stop(signal.SIGTERM))
        await server.start()
    return statuses
