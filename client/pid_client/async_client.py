"""The asynchronous client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import httpx

from pid_client import operations
from pid_client.defaults import READY_SECONDS, Defaults, http_arguments
from pid_client.effects import Emit, Operation, Send, Show, Wait
from pid_client.errors import PidError
from pid_client.image import Image, ImageInfo, Preview
from pid_client.requests import Options
from pid_client.server_info import ServerInfo


class AsyncImageStream:
    """An image that is received in chunks. Iterate over it once."""

    def __init__(self, info: ImageInfo, chunks: AsyncIterator[bytes]) -> None:
        self.info = info
        self._chunks = chunks

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._chunks


class AsyncPidClient:
    """Decodes latents on a PiD decode server, as `PidClient` does, for use with asyncio in one event loop."""

    def __init__(
        self, url: str, api_key: str | None = None, *, deadline: float = 60.0, retry: bool = True, **httpx_options: Any
    ) -> None:
        """Open a client. Arguments and errors are those of `PidClient`; `httpx_options` are of `httpx.AsyncClient`."""
        self._defaults = Defaults(deadline, retry)
        self._http = httpx.AsyncClient(**http_arguments(url, api_key, httpx_options))

    @property
    def deadline(self) -> float:
        """Seconds that a call may last unless it has its own deadline."""
        return self._defaults.deadline

    async def decode(
        self,
        latent: Any,
        *,
        on_preview: Callable[[Preview], Awaitable[None]] | None = None,
        **options: Unpack[Options],
    ) -> Image:
        """Decode one latent, as `PidClient.decode`. `on_preview` is an async function."""
        call, request = self._defaults.single(latent, options)
        return await self._only(operations.decode(call, request, on_preview))

    def decode_batch(
        self,
        latents: Any,
        *,
        on_preview: Callable[[Preview], Awaitable[None]] | None = None,
        **options: Unpack[Options],
    ) -> AsyncGenerator[Image | PidError, None]:
        """Decode latents [B, c, h, w] of one size and yield images, as `PidClient.decode_batch`.

        `on_preview` is an async function.
        """
        call, request = self._defaults.batch(latents, options)
        return self._run(operations.decode_batch(call, request, on_preview))

    @asynccontextmanager
    async def stream(self, latent: Any, **options: Unpack[Options]) -> AsyncIterator[AsyncImageStream]:
        """Decode one latent and receive the image in chunks, as `PidClient.stream`."""
        emitted = self._run(operations.stream(*self._defaults.single(latent, options)))
        try:
            yield AsyncImageStream(await anext(emitted), emitted)
        finally:
            await emitted.aclose()

    async def decode_to_file(self, latent: Any, path: str | PathLike[str], **options: Unpack[Options]) -> ImageInfo:
        """Decode one latent into a file, as `PidClient.decode_to_file`. Writing does not yield to the event loop."""
        call, request = self._defaults.single(latent, options)
        return await self._only(operations.decode_to_file(call, request, Path(path)))

    async def info(self, deadline: float | None = None) -> ServerInfo:
        """Return the description of the server and its decoders, as `PidClient.info`."""
        return await self._only(operations.get_info(self._defaults.call(deadline)))

    async def ready(self) -> bool:
        """Return whether the server accepts requests now."""
        try:
            return (await self._http.get("health/ready", timeout=READY_SECONDS)).is_success
        except httpx.RequestError:
            return False

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _only(self, operation: Operation[None]) -> Any:
        """Perform the effects of an operation; return the one value that it emits."""
        (value,) = [value async for value in self._run(operation)]
        return value

    async def _run(self, operation: Operation[None]) -> AsyncGenerator[Any, None]:
        """Perform the effects of an operation; yield what it emits."""
        response: httpx.Response | None = None
        chunks: Any = None  # of the response
        result: Any = None
        failure: httpx.RequestError | None = None
        try:
            while True:
                try:
                    effect = operation.send(result) if failure is None else operation.throw(failure)
                except StopIteration:
                    return
                result = failure = None
                if isinstance(effect, Emit):
                    yield effect.value
                elif isinstance(effect, Show):
                    await effect.function(effect.preview)
                elif isinstance(effect, Wait):
                    await asyncio.sleep(effect.seconds)
                else:
                    try:
                        if isinstance(effect, Send):
                            if response is not None:
                                await response.aclose()
                            request = self._http.build_request(effect.method, effect.path, **effect.arguments)
                            result = response = await self._http.send(request, stream=True)
                            chunks = response.aiter_bytes()
                        else:
                            result = await anext(chunks, None)
                    except httpx.RequestError as error:
                        failure = error
        finally:
            operation.close()
            if response is not None:
                await response.aclose()
