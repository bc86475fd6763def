"""The server process: runtimes, signals, exit status."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import FrameType
from typing import Any

import torch
import uvicorn

from engines.captions.encoder import open_text_encoder
from engines.captions.prefix import read_prefix
from engines.captions.protocol import TextEncoder
from engines.code_cache import choose_code_cache
from engines.errors import ConfigError
from engines.runtime.protocol import RuntimeInfo
from server.bundles import Bundles
from server.gpus import Gpu
from server.http.app import create_app
from server.http.connections import http_config
from server.images.encoder import Encoder
from server.process.descriptors import RESERVE, descriptors_in_use, raise_descriptor_limit
from server.process.failure import FailureExit
from server.process.listen import Listener, allow_restart, describe
from server.service import DecodeService, EncoderFactory
from server.settings import Settings
from server.swaps import DecoderSource, Swaps

log = logging.getLogger("server")

OpenCaptions = Callable[[Mapping[str, RuntimeInfo]], TextEncoder | None]

BACKLOG = 2048  # connections that wait to be accepted


class Server(uvicorn.Server):
    """Uvicorn server that drains on the first SIGTERM or SIGINT, aborts on the second, and reloads bundles on SIGHUP.

    After a failure it exits with status 1, with a delay that lets responses and probes get through.
    """

    def __init__(self, config: uvicorn.Config, service: DecodeService, swaps: Swaps) -> None:
        """Create the server of `service`, whose bundles `swaps` replaces."""
        super().__init__(config)
        self.service, self.swaps, self.status = service, swaps, 0
        self._draining: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until an exit is requested."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._handle_loop_error)
        if threading.current_thread() is threading.main_thread():  # no other thread can handle signals
            loop.add_signal_handler(signal.SIGHUP, self.swaps.request)
        await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen. asyncio uses one number for both; connections may wait for more than it accepts at once."""
        for listener in sockets or ():
            if listener.family != socket.AF_UNIX:
                allow_restart(listener)
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(BACKLOG)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle SIGTERM and SIGINT."""
        loop = asyncio.get_running_loop()
        if self._draining is None:
            self._draining = loop.create_task(self._drain())
        else:
            loop.call_soon(self._abort)

    def exit_after_failure(self) -> None:
        """Exit with status 1. May be called from any thread; allocates nothing."""
        self.status = 1
        self.should_exit = True

    def _handle_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log an exception that no task or callback has handled; without memory the server cannot continue."""
        if isinstance(context.get("exception"), MemoryError):
            self.service.out_of_memory()
        loop.default_exception_handler(context)

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


def serve_bundle(settings: Settings, listener: Listener) -> int:
    """Serve the bundle of the settings; return the exit status. Raises PidError as `serve`."""
    text_encoder = partial(load_text_encoder, settings)
    return serve(settings, listener, Bundles(settings), open_captions=text_encoder)


def gpus_of(devices: Iterable[str]) -> dict[str, Gpu]:
    """Return the GPUs among these device names."""
    return {name: Gpu(name) for name in devices if name.startswith("cuda:")}


def serve(
    settings: Settings,
    listener: Listener,
    source: DecoderSource,
    encoder_factory: EncoderFactory = Encoder,
    find_gpus: Callable[[Iterable[str]], Mapping[str, Gpu]] = gpus_of,
    open_captions: OpenCaptions = lambda decoders: None,
) -> int:
    """Serve until a signal or a failure; return the exit status, 1 after a failure.

    Args:
        settings: The settings.
        listener: Sockets to listen on.
        source: Opens the decoders, and replaces them on SIGHUP and when they are moved.
        encoder_factory: Makes the encoder.
        find_gpus: Returns the GPUs among the devices, for their metrics.
        open_captions: Opens the text encoder for these decoders, or returns None if requests may not have prompts.

    Raises:
        PidError: The server cannot start.
    """
    try:
        choose_code_cache(settings.cache_dir)
        server = _prepare(settings, source, find_gpus, encoder_factory, open_captions, listener.tls)
    except MemoryError as error:
        raise ConfigError("There is not enough memory to start; free some, or raise this process's limit.") from error
    except OSError as error:
        raise ConfigError(f"The server cannot start: {error}.") from error
    except RuntimeError as error:
        if "can't start new thread" not in str(error):
            raise
        raise ConfigError("The server cannot start its threads; raise the limit of processes (ulimit -u).") from error
    for each in listener.sockets:
        log.info("listening on %s", describe(each, tls=listener.tls is not None))
    with contextlib.suppress(SystemExit):  # uvicorn has logged why the service could not start
        server.run(listener.sockets)
    if server.service.start_error is not None:
        raise server.service.start_error
    return server.status if server.started else 1


def _prepare(
    settings: Settings,
    source: DecoderSource,
    find_gpus: Callable[[Iterable[str]], Mapping[str, Gpu]],
    encoder_factory: EncoderFactory,
    open_captions: OpenCaptions,
    tls: ssl.SSLContext | None,
) -> Server:
    decoders = source.find_all()
    runtimes = {name: decoder.open() for name, decoder in decoders.items()}
    infos = {name: next(iter(by_device.values())).info for name, by_device in runtimes.items()}
    text_encoder = open_captions(infos)
    if settings.api_keys is None and not settings.is_local:
        log.warning("listening on %s without authentication; use --api-keys to require a key", settings.host)
    settings = limit_connections(settings, raise_descriptor_limit(), descriptors_in_use())
    failure_exit = FailureExit(settings.failure_exit_delay, lambda: server.exit_after_failure())
    service = DecodeService(
        settings,
        runtimes,
        find_gpus(next(iter(runtimes.values()))),
        on_failure=failure_exit.trigger,
        encoder_factory=encoder_factory,
        text_encoder=text_encoder,
    )
    swaps = Swaps(service, source, decoders)
    torch.set_num_threads(1)  # of this thread, the event loop: it must not start threads while it serves
    server = Server(http_config(create_app(service, swaps), service, tls), service, swaps)
    return server


def limit_connections(settings: Settings, descriptors: int, in_use: int) -> Settings:
    """Lower --max-connections, with a warning, so that a reserve of file descriptors remains.

    Args:
        settings: The settings.
        descriptors: Limit of open files.
        in_use: Descriptors that are open already.

    Raises:
        ConfigError: The limit of open files leaves no connections.
    """
    available = descriptors - in_use - RESERVE
    if settings.max_connections <= available:
        return settings
    advice = "raise the limit of open files (ulimit -n)"
    if available < 1:
        raise ConfigError(f"The limit of {descriptors} open files leaves none for connections; {advice}.")
    log.warning(
        "--max-connections is lowered from %d to %d, because the limit of open files is %d; %s",
        *(settings.max_connections, available, descriptors, advice),
    )
    return settings.model_copy(update={"max_connections": available})


def load_text_encoder(settings: Settings, decoders: Mapping[str, RuntimeInfo]) -> TextEncoder | None:
    """Open the text encoder that --text-encoder names, for captions of those of `decoders` that have them.

    Raises:
        ConfigError: It cannot be used, or its embeddings do not fit a decoder.
        CheckpointError, DeviceMemoryError: as `open_text_encoder`.
    """
    if settings.text_encoder is None:
        for flag, path in (("--caption-prefix", settings.caption_prefix), ("--caption-cache", settings.caption_cache)):
            if path is not None:
                raise ConfigError(f"{flag} needs --text-encoder, which encodes the prompts.")
        return None
    captioned = {name: info for name, info in decoders.items() if info.caption_tokens}
    if not captioned:
        names = ", ".join(info.decoder for info in decoders.values())
        raise ConfigError(f"--text-encoder cannot be used: {names} has no captions.")
    lengths = {name: info.caption_tokens for name, info in captioned.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} {tokens}" for name, tokens in lengths.items())
        raise ConfigError(
            f"--text-encoder needs decoders with captions of the same number of tokens; they have: {found}."
        )
    prefix = "" if settings.caption_prefix is None else read_prefix(settings.caption_prefix)
    encoder = open_text_encoder(settings.text_encoder, prefix, settings.text_encoder_device, *set(lengths.values()))
    for info in captioned.values():
        if encoder.info.width != info.caption_width:
            raise ConfigError(
                f"--text-encoder {settings.text_encoder} has embeddings of width {encoder.info.width}, but the decoder "
                f"{info.decoder} needs {info.caption_width}."
            )
    if not prefix:
        log.warning("prompts are encoded without an instruction text; the released decoders need --caption-prefix")
    return encoder
