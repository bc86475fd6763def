"""Child processes of a load test: decode servers and nginx, on free ports."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

from engines.errors import ConfigError
from loadtest.http_client import Client

START_SECONDS = 300.0  # limit for becoming ready; the first start compiles the PNG encoder
STOP_SECONDS = 90.0  # limit for exiting after a signal


def free_port() -> int:
    """Return a TCP port on 127.0.0.1 that is not in use."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


class Process:
    """A child process that listens for HTTP on 127.0.0.1."""

    def __init__(self, command: Sequence[str], port: int, log: Path | None = None) -> None:
        """Describe a process without starting it.

        Args:
            command: Program and arguments; they must make it listen on `port`.
            port: TCP port.
            log: File that its output is appended to; None shares this process's output.
        """
        self._command, self.port, self._log = tuple(command), port, log
        self.url = f"http://127.0.0.1:{port}"
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, ready_path: str = "/health/ready") -> None:
        """Start the process and wait until `ready_path` returns 200.

        Raises:
            ConfigError: The process exits first or is not ready within `START_SECONDS`.
        """
        if self._log is None:
            self._process = await asyncio.create_subprocess_exec(*self._command)
        else:
            with self._log.open("ab") as log:
                self._process = await asyncio.create_subprocess_exec(*self._command, stdout=log, stderr=log)
        await self._wait_until_ready(self._process, ready_path)

    async def _wait_until_ready(self, process: asyncio.subprocess.Process, path: str) -> None:
        output = f"see {self._log}" if self._log else "see its output above"
        limit, client = time.monotonic() + START_SECONDS, Client(self.url)
        while time.monotonic() < limit:
            if process.returncode is not None:
                raise ConfigError(f"{self._command[0]} exited with status {process.returncode}; {output}.")
            with contextlib.suppress(OSError):
                status, _ = await client.get(path)
                if status == 200:
                    client.close()
                    return
            await asyncio.sleep(0.1)
        raise ConfigError(f"{self.url}{path} was not ready within {START_SECONDS:g} s; {output}.")

    @property
    def pid(self) -> int:
        """Process id."""
        return self._running().pid

    @property
    def started(self) -> bool:
        """True if the process was ever started."""
        return self._process is not None

    async def wait(self) -> int:
        """Wait until the process exits and return its exit status."""
        return await self._running().wait()

    async def stop(self, signum: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit status, or 0 if the process was never started.

        A process that does not exit within `STOP_SECONDS` is killed.
        """
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

    async def pause(self, seconds: float) -> None:
        """Stop the process (SIGSTOP) and continue it after `seconds`; no effect if it has exited."""
        process = self._running()
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGSTOP)
            try:
                await asyncio.sleep(seconds)
            finally:
                process.send_signal(signal.SIGCONT)

    def _running(self) -> asyncio.subprocess.Process:
        if self._process is None:
            raise RuntimeError("The process was never started.")
        return self._process


@contextlib.contextmanager
def running(process: Process, ready_path: str = "/health/ready") -> Iterator[Process]:
    """Run `process` for the duration of the block. For callers outside an event loop."""
    with asyncio.Runner() as runner:
        try:
            runner.run(process.start(ready_path))
            yield process
        finally:
            runner.run(process.stop())


def decode_server(bundle: Path, flags: Sequence[str] = (), log: Path | None = None) -> Process:
    """Return a decode server on a free port, not started yet."""
    port = free_port()
    command = [sys.executable, "-m", "server", "--bundle", str(bundle), "--port", str(port), *flags]
    return Process(command, port, log)


def simulated_server(table: str, devices: int, flags: Sequence[str], log: Path, port: int | None = None) -> Process:
    """Return a decode server on simulated devices, not started yet; on a free port by default."""
    port = port or free_port()
    command = [sys.executable, "-m", "loadtest.simulated_server", "--table", table]
    command += ["--simulated-devices", str(devices), "--port", str(port), *flags]
    return Process(command, port, log)


@contextlib.asynccontextmanager
async def started(server: Process) -> AsyncIterator[Process]:
    """Run a server for the duration of the block and kill it at the end, without draining it."""
    try:
        await server.start()
        yield server
    finally:
        await server.stop(signal.SIGKILL)


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
            # Retry 503 (draining) and refused connections on the next server; a decode is safe to repeat.
            proxy_next_upstream error timeout http_503 non_idempotent;
        }}
    }}
}}
"""


@contextlib.asynccontextmanager
async def nginx(servers: Sequence[Process], folder: Path) -> AsyncIterator[Process]:
    """Run nginx in front of `servers`, with least-connections balancing, for the duration of the block.

    Args:
        servers: The upstream servers.
        folder: Absolute path of the directory for its configuration, log and temporary files.

    Raises:
        ConfigError: nginx is not installed or does not start.
    """
    program = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin:/opt/homebrew/bin")
    if program is None:
        raise ConfigError("nginx is not installed. Install it, on Debian with: apt-get install nginx-light.")
    port = free_port()
    upstream = "\n        ".join(f"server 127.0.0.1:{server.port} max_fails=1 fail_timeout=1s;" for server in servers)
    config = folder / "nginx.conf"
    config.write_text(_NGINX.format(folder=folder, port=port, servers=upstream))
    process = Process([program, "-c", str(config), "-e", "stderr"], port, folder / "nginx.log")
    try:
        await process.start()
        yield process
    finally:
        await process.stop(signal.SIGQUIT)


async def restart_in_turn(servers: Sequence[Process], at: Sequence[float]) -> list[int]:
    """Drain and replace the servers in turn and return the exit statuses of the drained processes.

    Args:
        servers: Started servers.
        at: Seconds from now at which to restart one.
    """
    began, statuses = time.monotonic(), []
    for number, moment in enumerate(at):
        await asyncio.sleep(max(0.0, began + moment - time.monotonic()))
        server = servers[number % len(servers)]
        statuses.append(await server.stop(signal.SIGTERM))
        await server.start()
    return statuses
