"""The synchronous client."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
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


class ImageStream:
    """An image that is received in chunks. Iterate over it once."""

    def __init__(self, info: ImageInfo, chunks: Iterator[bytes]) -> None:
        self.info = info
        self._chunks = chunks

    def __iter__(self) -> Iterator[bytes]:
        return self._chunks


class PidClient:
    """Decodes latents on a PiD decode server. It reuses connections, and threads may share it.

    A call that gets 429 or 503, or loses its connection, is retried until its deadline, after the time in the server's
    Retry-After. Each attempt sends the remaining time and the same seed.

    Every method raises `PidError`, and `TypeError` or `ValueError` for arguments that are never valid.
    """

    def __init__(
        self, url: str, api_key: str | None = None, *, deadline: float = 60.0, retry: bool = True, **httpx_options: Any
    ) -> None:
        """Open a client. Nothing is sent yet.

        Args:
            url: Address of the server, such as `http://127.0.0.1:8000`, perhaps with a path before its endpoints.
            api_key: API key, if the server requires one.
            deadline: Seconds that a call may last, retries included, unless it has its own deadline.
            retry: Whether to retry.
            httpx_options: Further arguments of `httpx.Client`, such as `verify`, `proxy` or `limits`.

        Raises:
            ValueError: the URL, the API key or the deadline is invalid.
        """
        self._defaults = Defaults(deadline, retry)
        self._http = httpx.Client(**http_arguments(url, api_key, httpx_options))

    @property
    def deadline(self) -> float:
        """Seconds that a call may last unless it has its own deadline."""
        return self._defaults.deadline

    def decode(
        self, latent: Any, *, on_preview: Callable[[Preview], None] | None = None, **options: Unpack[Options]
    ) -> Image:
        """Decode one latent.

        Args:
            latent: Tensor [c, h, w] or [1, c, h, w], normalised as in the diffusion model: of NumPy, PyTorch, JAX or
                another library that supports DLPack, on any device; float16, bfloat16 or float32. Convert packed
                latents with `pid_client.frames`.
            on_preview: Function that is called with a preview after each step. Its time delays the image and counts
                towards the deadline. If it raises an error, the call ends with it. After a retry, the steps begin
                again. Previews that the client does not read in time are missing.
            options: See `Options`.
        """
        call, request = self._defaults.single(latent, options)
        (image,) = self._run(operations.decode(call, request, on_preview))
        return image

    def decode_batch(
        self, latents: Any, *, on_preview: Callable[[Preview], None] | None = None, **options: Unpack[Options]
    ) -> Generator[Image | PidError, None, None]:
        """Decode latents [B, c, h, w] of one size; yield each image as soon as it is complete.

        If an image fails, its error is yielded, with its index, and the others are not affected. If the request as a
        whole fails, the error is raised, and images that have not been yielded are missing. A temporary failure is
        retried for the missing images only; their indices may then be out of order. Closing the generator cancels what
        is not complete. `on_preview` is as for `decode`; it is called while the generator waits for the next image.
        """
        call, request = self._defaults.batch(latents, options)
        return self._run(operations.decode_batch(call, request, on_preview))

    @contextmanager
    def stream(self, latent: Any, **options: Unpack[Options]) -> Iterator[ImageStream]:
        """Decode one latent; receive the image in chunks, while the server still encodes its lower rows.

        The decode is cancelled at the end of the block if the image is not complete. Once chunks have been received, a
        lost connection is an error. The time between chunks counts towards the deadline.
        """
        emitted = self._run(operations.stream(*self._defaults.single(latent, options)))
        try:
            yield ImageStream(next(emitted), emitted)
        finally:
            emitted.close()

    def decode_to_file(self, latent: Any, path: str | PathLike[str], **options: Unpack[Options]) -> ImageInfo:
        """Decode one latent into a file, without holding the image in memory. The file appears when it is complete.

        Raises:
            OSError: the file cannot be written.
        """
        call, request = self._defaults.single(latent, options)
        (info,) = self._run(operations.decode_to_file(call, request, Path(path)))
        return info

    def info(self, deadline: float | None = None) -> ServerInfo:
        """Return the description of the server and its decoders.

        Args:
            deadline: Seconds that the call may last, retries included; by default, that of the client.
        """
        (info,) = self._run(operations.get_info(self._defaults.call(deadline)))
        return info

    def ready(self) -> bool:
        """Return whether the server accepts requests now."""
        try:
            return self._http.get("health/ready", timeout=READY_SECONDS).is_success
        except httpx.RequestError:
            return False

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, operation: Operation[None]) -> Generator[Any, None, None]:
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
                    effect.function(effect.preview)
                elif isinstance(effect, Wait):
                    time.sleep(effect.seconds)
                else:
                    try:
                        if isinstance(effect, Send):
                            if response is not None:
                                response.close()
                            request = self._http.build_request(effect.method, effect.path, **effect.arguments)
                            result = response = self._http.send(request, stream=True)
                            chunks = response.iter_bytes()
                        else:
                            result = next(chunks, None)
                    except httpx.RequestError as error:
                        failure = error
        finally:
            operation.close()
            if response is not None:
                response.close()
