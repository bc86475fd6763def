"""The server process: settings, runtimes, signals, exit status."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import Iterable, Sequence
from types import FrameType

import torch
import uvicorn

from engines.bundle import open_bundle
from engines.errors import ConfigError, PidError
from engines.runtime.open import open_runtime
from engines.runtime.protocol import Runtime
from server import logs
from server.http.app import create_app
from server.http.connections import http_config
from server.metrics import Gpu
from server.service import DecodeService
from server.settings import Settings, read_settings

log = logging.getLogger("server")


class Server(uvicorn.Server):
    """Drains on the first SIGTERM or SIGINT, ends at once on the second, and after a while when a device failed."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.service: DecodeService
        self.status = 0
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        loop = asyncio.get_running_loop()
        if self._draining is None:
            self._draining = loop.create_task(self._drain())
        else:
            loop.call_soon(self._end_at_once)

    def fail(self) -> None:
        """From any thread. The grace lets answers and probes get through."""
        self.status = 1
        timer = threading.Timer(self.service.settings.fail_grace, self._end)
        timer.daemon = True
        timer.start()

    async def _drain(self) -> None:
        log.info("draining: not ready any more, finishing what was admitted")
        await self.service.drain()
        self._end()

    def _end_at_once(self) -> None:
        log.warning("told twice to end: giving up what was admitted")
        self.status = 1
        self.config.timeout_graceful_shutdown = 1
        self.service.give_up()
        self._end()

    def _end(self) -> None:
        self.should_exit = True


def main(arguments: Sequence[str]) -> int:
    try:
        settings = read_settings(arguments)
        logs.configure(settings.log_level)
        return serve(settings, load_runtimes(settings))
    except PidError as error:
        print(f"server: {error}", file=sys.stderr)
        return 2


def serve(settings: Settings, runtimes: dict[str, Runtime]) -> int:
    """Serve until told to stop; the process's exit status, which is 1 if a device failed."""
    if settings.api_keys is None and not settings.is_local:
        log.warning("whoever reaches %s may decode; --api-keys would ask for a key", settings.host)
    service = DecodeService(settings, runtimes, _gpus(runtimes), lambda: server.fail())
    server = Server(http_config(create_app(service), settings))
    server.service = service
    server.run()
    return server.status


def load_runtimes(settings: Settings) -> dict[str, Runtime]:
    """One runtime a device. Raises BundleError, ConfigError or DeviceMemoryError."""
    if settings.cpu_threads is not None:
        torch.set_num_threads(settings.cpu_threads)
    bundle = open_bundle(settings.bundle)
    return {
        device: open_runtime(bundle, device, settings.slots, settings.max_batch, settings.compile)
        for device in device_names(settings.devices)
    }


def device_names(devices: str) -> list[str]:
    """Device names as PyTorch has them. Raises ConfigError for one that is not there."""
    available = torch.cuda.device_count()
    if devices == "auto":
        return ["cuda:0" if available else "cpu"]
    names = [name.strip() for name in devices.split(",")]
    known = {"cpu", *(f"cuda:{index}" for index in range(available))}
    unknown = [name for name in names if name not in known]
    if unknown or len(set(names)) < len(names):
        raise ConfigError(f"--devices {devices} cannot be; this machine has {', '.join(sorted(known))}.")
    return names


def _gpus(runtimes: Iterable[str]) -> dict[str, Gpu]:
    return {name: Gpu(int(name.removeprefix("cuda:"))) for name in runtimes if name.startswith("cuda:")}
