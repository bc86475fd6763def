"""`python -m server --bundle DIR`: serve decodes until told to stop."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Sequence
from types import FrameType

import torch
import uvicorn

from engines.bundle import open_bundle
from engines.errors import ConfigError, PidError
from engines.runtime.protocol import Runtime
from engines.runtime.torch_runtime import open_torch_runtime
from server import logs, png
from server.app import create_app
from server.metrics import Gpu
from server.service import DecodeService
from server.settings import Settings, read_settings

log = logging.getLogger("server")


class Server(uvicorn.Server):
    """Drains on the first SIGTERM or SIGINT and ends at once on the second."""

    service: DecodeService
    _draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._draining is not None or sig == signal.SIGINT:
            super().handle_exit(sig, frame)
            return
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        log.info("draining: not ready any more, finishing what was admitted")
        await self.service.drain()
        self.should_exit = True


def main(arguments: Sequence[str]) -> int:
    try:
        settings = read_settings(arguments)
        logs.configure(settings.log_level)
        runtimes = load_runtimes(settings)
    except PidError as error:
        print(f"server: {error}", file=sys.stderr)
        return 2
    return serve(settings, runtimes)


def serve(settings: Settings, runtimes: dict[str, Runtime]) -> int:
    """Serve until told to stop; the process's exit status, which is 1 if a device failed."""
    png.warm_up()
    failed = False

    def on_fatal() -> None:
        nonlocal failed
        failed = server.should_exit = True

    service = DecodeService(settings, runtimes, _gpu(runtimes), on_fatal)
    config = uvicorn.Config(
        create_app(service),
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=10,
    )
    server = Server(config)
    server.service = service
    server.run()
    return 1 if failed else 0


def load_runtimes(settings: Settings) -> dict[str, Runtime]:
    """One runtime a device. Raises BundleError, ConfigError or DeviceMemoryError."""
    if settings.cpu_threads is not None:
        torch.set_num_threads(settings.cpu_threads)
    bundle = open_bundle(settings.bundle)
    return {
        device: open_torch_runtime(bundle, device, settings.slots, settings.max_batch)
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


def _gpu(runtimes: dict[str, Runtime]) -> Gpu | None:
    name = next(iter(runtimes))
    return Gpu(int(name.removeprefix("cuda:"))) if name.startswith("cuda:") else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
