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
from server.gauges import Gpu
from server.http.app import create_app
from server.http.connections import http_config
from server.images.encoder import Encoder
from server.service import DecodeService, EncoderFactory
from server.settings import Settings, read_settings, warn_about_unknown_variables

log = logging.getLogger("server")


class Server(uvicorn.Server):
    """Uvicorn server that drains on the first SIGTERM or SIGINT and aborts on the second.

    After a device failure it exits with status 1, with a delay that lets responses and probes get through.
    """

    def __init__(self, config: uvicorn.Config) -> None:
        """Create the server; `service` must be set before `run`."""
        super().__init__(config)
        self.service: DecodeService
        self.status = 0
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle SIGTERM and SIGINT."""
        loop = asyncio.get_running_loop()
        if self._draining is None:
            self._draining = loop.create_task(self._drain())
        else:
            loop.call_soon(self._abort)

    def fail(self) -> None:
        """Exit with status 1 after the failure delay. May be called from any thread."""
        self.status = 1
        timer = threading.Timer(self.service.settings.failure_exit_delay, self._exit)
        timer.daemon = True
        timer.start()

    async def _drain(self) -> None:
        log.info("draining: readiness off, finishing admitted requests")
        await self.service.drain()
        self._exit()

    def _abort(self) -> None:
        log.warning("second signal received: aborting admitted requests")
        self.status = 1
        self.config.timeout_graceful_shutdown = 1
        self.service.abort()
        self._exit()

    def _exit(self) -> None:
        self.should_exit = True


def main(arguments: Sequence[str]) -> int:
    """Run the server with these command-line arguments; return the exit status."""
    try:
        settings = read_settings(arguments)
        logs.configure(settings.log_level)
        warn_about_unknown_variables()
        return serve(settings, load_runtimes(settings))
    except PidError as error:
        print(f"server: {error}", file=sys.stderr)
        return 2


def serve(settings: Settings, runtimes: dict[str, Runtime], encoder_factory: EncoderFactory = Encoder) -> int:
    """Serve until a signal or a device failure; return the exit status, 1 after a failure."""
    if settings.api_keys is None and not settings.is_local:
        log.warning("listening on %s without authentication; use --api-keys to require a key", settings.host)
    service = DecodeService(
        settings, runtimes, gpus_of(runtimes), on_failure=lambda: server.fail(), encoder_factory=encoder_factory
    )
    server = Server(http_config(create_app(service), service))
    server.service = service
    server.run()
    return server.status


def load_runtimes(settings: Settings) -> dict[str, Runtime]:
    """Open the bundle on each device. Raises BundleError, ConfigError or DeviceMemoryError."""
    if settings.cpu_threads is not None:
        torch.set_num_threads(settings.cpu_threads)
    bundle = open_bundle(settings.bundle)
    return {
        device: open_runtime(bundle, device, settings.device_slots, settings.max_batch, settings.compile)
        for device in device_names(settings.devices)
    }


def device_names(devices: str) -> list[str]:
    """Return the PyTorch names of the devices that --devices selects. Raises ConfigError for an unavailable one."""
    available = torch.cuda.device_count()
    if devices == "auto":
        return ["cuda:0" if available else "cpu"]
    names = [name.strip() for name in devices.split(",")]
    known = {"cpu", *(f"cuda:{index}" for index in range(available))}
    unknown = [name for name in names if name not in known]
    if unknown or len(set(names)) < len(names):
        raise ConfigError(f"--devices {devices} is not available; this machine has {', '.join(sorted(known))}.")
    return names


def gpus_of(devices: Iterable[str]) -> dict[str, Gpu]:
    """Open the GPUs among these device names."""
    return {name: Gpu(int(name.removeprefix("cuda:"))) for name in devices if name.startswith("cuda:")}
