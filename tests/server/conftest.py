"""Fixtures: a real server on a free port, with the runtimes that a test passes in."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Mapping

import httpx
import numpy as np
import pytest
import torch
import uvicorn
from safetensors.torch import save
from starlette.types import ASGIApp

from engines.captions.protocol import TextEncoder
from engines.runtime.protocol import Runtime
from engines.runtime.simulated import SimulatedCost, SimulatedRuntime
from engines.size import Size
from server.decoders import Runtimes
from server.gpus import Gpu
from server.http.app import create_app
from server.http.connections import http_config
from server.lifecycle import State
from server.process.listen import Listener, listening
from server.scheduling.costs import Output
from server.service import DecodeService
from server.settings import Settings
from server.swaps import DecoderSource, FixedDecoders, Swaps
from tests.waiting import until

SIZE, LARGER = Size(64, 64), Size(64, 128)  # latents of 2x2 and 2x4 cells
OUTPUT = Output("simulated", SIZE)
IMAGE = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)  # the simulated image of SIZE

Serve = Callable[..., contextlib.AbstractContextManager["Running"]]


class Running:
    """A running server, its service and a client."""

    def __init__(self, service: DecodeService, server: uvicorn.Server, url: str, swaps: Swaps) -> None:
        self.service, self.server, self.url, self.swaps = service, server, url, swaps
        self.client = httpx.Client(base_url=url, timeout=60)

    def decode(self, latent: torch.Tensor | None = None, **options: object) -> httpx.Response:
        body = save({"latent": make_latent() if latent is None else latent})
        headers = {"Content-Type": "application/x-safetensors"}
        return self.client.post("/decode", content=body, headers=headers, params=options)


def connect_and_disconnect(running: Running, after: Callable[[], object], query: str = "") -> None:
    """Send a decode and close the connection once `after` has returned."""
    body = save({"latent": make_latent()})
    with socket.create_connection(("127.0.0.1", int(running.url.rsplit(":", 1)[1]))) as connection:
        connection.sendall(
            b"POST /decode%s HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-safetensors\r\n"
            b"Content-Length: %d\r\n\r\n" % (query.encode(), len(body)) + body
        )
        after()


def make_latent(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (16, 2, 2)), generator=torch.Generator().manual_seed(0))


def simulated(**changes: object) -> SimulatedRuntime:
    defaults = {"costs": {SIZE: SimulatedCost(), LARGER: SimulatedCost()}, "images": {SIZE: IMAGE}}
    return SimulatedRuntime(**{**defaults, **changes})  # type: ignore[arg-type]


@contextlib.contextmanager
def run_server(
    runtimes: Mapping[str, Runtime] | Runtime | None = None,
    decoders: Runtimes | None = None,
    source: DecoderSource | None = None,
    wait: bool = True,
    gpus: Mapping[str, Gpu] | None = None,
    text_encoder: TextEncoder | None = None,
    **settings: object,
) -> Iterator[Running]:
    """Run a server for the decoder "simulated" of `runtimes`, one or one per device, or for those of `decoders`.

    The decoders of `source` can be replaced.
    """
    if source is None:
        if decoders is None:
            runtimes = simulated() if runtimes is None else runtimes
            decoders = {"simulated": runtimes if isinstance(runtimes, Mapping) else {"device": runtimes}}
        source = FixedDecoders(decoders)
    candidates = source.find_all()
    settings = {"stall_seconds": 60, **settings}  # tests let steps wait, and a busy machine makes them wait longer
    chosen = Settings(bundle=".", port=0, encoder_threads=2, **settings)  # type: ignore[arg-type]
    opened = {name: candidate.open() for name, candidate in candidates.items()}
    service = DecodeService(chosen, opened, gpus, text_encoder=text_encoder)
    del opened  # otherwise it would keep decoders in memory after their replacement
    application = create_app(service, swaps := Swaps(service, source, candidates))
    with listening(chosen.address) as listener, run_application(application, service, listener) as server:
        name = listener.sockets[0].getsockname()
        scheme = "http" if listener.tls is None else "https"
        url = f"{scheme}://localhost" if isinstance(name, str) else f"{scheme}://127.0.0.1:{name[1]}"
        running = Running(service, server, url, swaps)
        until(lambda: not wait or service.lifecycle.state is not State.STARTING)
        with contextlib.closing(running.client):
            yield running


@contextlib.contextmanager
def run_application(app: ASGIApp, service: DecodeService, listener: Listener) -> Iterator[uvicorn.Server]:
    """Serve `app` with the settings of `service` on a thread."""
    server = uvicorn.Server(http_config(app, service, listener.tls))
    thread = threading.Thread(target=server.run, kwargs={"sockets": listener.sockets}, daemon=True)
    thread.start()
    try:
        until(lambda: server.started)
        yield server
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def serve() -> Serve:
    return run_server


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """A server on the simulated runtime, shared by the tests of a module that do not change its state."""
    with run_server(max_body_bytes=200_000, max_images=3) as running:
        yield running
