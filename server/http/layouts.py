"""How the images of a response are arranged. Containers of several images are in containers.py."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import asdict
from typing import NamedTuple, TypeVar

from server.stream import ImageStream

T = TypeVar("T")
Streams = Sequence[ImageStream]


class Extra(bytes):
    """Chunk of a body that is not a part of an image, such as a preview. It does not count as delivered."""


class Begun(NamedTuple):
    """A response that can begin: its headers, and its body in chunks."""

    headers: dict[str, str]
    body: AsyncIterator[bytes]


class Layout(ABC):
    """Arrangement of the images of a response.

    Attributes:
        has_previews: Whether the response has previews as well.
        expansion: Bytes of the body per byte of an encoded image: 1, or 4/3 in base64.
    """

    has_previews = False
    expansion = 1.0

    @abstractmethod
    async def begin(self, streams: Streams, request_id: str) -> Begun:
        """Wait until the status and the headers of the response are known.

        Raises:
            PidError: the response is this error, because an image failed and the layout has no place for its error.
        """


class SingleImage(Layout):
    """One image as the body, sent while it is encoded."""

    async def begin(self, streams: Streams, request_id: str) -> Begun:
        """Wait for the first bytes of the image."""
        (stream,) = streams
        first = await stream.chunk()
        headers = {"Content-Type": stream.media_type, **image_headers(stream)}
        if stream.content_length is not None:
            headers["Content-Length"] = str(stream.content_length)
        return Begun(headers, chunks(first, stream))


async def complete(stream: ImageStream) -> list[bytes]:
    """Wait for all of an image; return its chunks. Raises the error that the image ended with."""
    return [chunk async for chunk in chunks(await stream.chunk(), stream)]


async def chunks(first: bytes | None, stream: ImageStream) -> AsyncIterator[bytes]:
    """Yield `first`, which was read from `stream` already, and the rest of it."""
    chunk = first
    while chunk is not None:
        yield chunk
        chunk = await stream.chunk()


async def iterate(items: Iterable[T]) -> AsyncIterator[T]:
    """Yield `items`, each of which is computed when the one before has been sent."""
    for item in items:
        yield item


def seeds(streams: Streams) -> str:
    """Return the X-Seed header of a response with several images."""
    return ", ".join(str(stream.seed) for stream in streams)


def image_headers(stream: ImageStream) -> dict[str, str]:
    """Return the headers that describe an image, apart from its media type and length."""
    headers = {"X-Seed": str(stream.seed), "Server-Timing": timing(stream)}
    if stream.shape is not None:
        headers |= {"X-Shape": ",".join(map(str, stream.shape)), "X-Dtype": str(stream.dtype)}
    return headers


def timing(stream: ImageStream) -> str:
    """Return the Server-Timing header: the stages that have ended so far, in milliseconds."""
    return ", ".join(f"{name};dur={1000 * seconds:.1f}" for name, seconds in asdict(stream.timings).items() if seconds)
