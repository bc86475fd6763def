"""Servers, and both clients behind one synchronous interface, so that the same tests run on both."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from pid_client import AsyncPidClient, Image, ImageInfo, PidClient, PidError, Preview, ServerInfo
from tests.clients.latent_server import LatentRuntime, text_encoder
from tests.server.conftest import Running, run_server

OnPreview = Callable[[Preview], None]


class BlockingClient:
    """`AsyncPidClient` with the interface of `PidClient`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._runner = asyncio.Runner()
        self._client = AsyncPidClient(*args, **kwargs)

    def decode(self, latent: Any, on_preview: OnPreview | None = None, **options: Any) -> Image:
        return self._runner.run(self._client.decode(latent, on_preview=_asynchronous(on_preview), **options))

    def decode_batch(
        self, latents: Any, on_preview: OnPreview | None = None, **options: Any
    ) -> Iterator[Image | PidError]:
        results = self._client.decode_batch(latents, on_preview=_asynchronous(on_preview), **options)
        try:
            while (result := self._runner.run(_next(results))) is not None:
                yield result
        finally:
            self._runner.run(results.aclose())

    @contextmanager
    def stream(self, latent: Any, **options: Any) -> Iterator[Any]:
        context = self._client.stream(latent, **options)
        stream = self._runner.run(context.__aenter__())
        try:
            yield BlockingStream(stream.info, self._runner, stream)
        finally:
            self._runner.run(context.__aexit__(None, None, None))

    def decode_to_file(self, latent: Any, path: Path, **options: Any) -> ImageInfo:
        return self._runner.run(self._client.decode_to_file(latent, path, **options))

    def info(self) -> ServerInfo:
        return self._runner.run(self._client.info())

    def ready(self) -> bool:
        return self._runner.run(self._client.ready())

    def close(self) -> None:
        self._runner.run(self._client.aclose())
        self._runner.close()


class BlockingStream:
    def __init__(self, info: ImageInfo, runner: asyncio.Runner, stream: Any) -> None:
        self.info, self._runner, self._chunks = info, runner, aiter(stream)

    def __iter__(self) -> Iterator[bytes]:
        while (chunk := self._runner.run(_next(self._chunks))) is not None:
            yield chunk


async def _next(iterator: Any) -> Any:
    """Return the next value, or None at the end."""
    return await anext(iterator, None)


def _asynchronous(function: OnPreview | None) -> Callable[[Preview], Awaitable[None]] | None:
    async def call(preview: Preview) -> None:
        assert function is not None
        function(preview)

    return None if function is None else call


Connect = Callable[..., Any]


@pytest.fixture(params=[PidClient, BlockingClient], ids=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """Return a function that opens a client: `connect(url, …)`."""
    with ExitStack() as stack:

        def open_client(*args: Any, **kwargs: Any) -> Any:
            client = request.param(*args, **kwargs)
            stack.callback(client.close)
            return client

        yield open_client


@pytest.fixture(scope="session")
def flux() -> Iterator[Running]:
    """A server with the latent space of FLUX.1, whose images show the latent, the seed and the caption."""
    runtime = LatentRuntime("flux")
    with run_server(runtime, text_encoder=text_encoder({"simulated": runtime.info})) as server:
        yield server


@pytest.fixture(scope="session")
def flux_and_sd3() -> Iterator[Running]:
    """A server with the decoders Flux and SD3, which support latents of the same shapes, otherwise as `flux`."""
    with run_server(decoders={name: {"device": LatentRuntime(name.lower())} for name in ("Flux", "SD3")}) as server:
        yield server
