"""Arrangement of the images of a response: one image as the body, or several in a container."""

from __future__ import annotations

import json
import secrets
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from engines.errors import PidError
from server.http.problem import PROBLEM_MEDIA_TYPE, Problem, problem
from server.stream import ImageStream

Streams = Sequence[ImageStream]


class Begun(NamedTuple):
    """A response that can begin: its headers, and its body in chunks."""

    headers: dict[str, str]
    body: AsyncIterator[bytes]


class Layout(ABC):
    """Arrangement of the images of a response."""

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
        headers = {"Content-Type": stream.media_type, "X-Seed": str(stream.seed), "Server-Timing": timing(stream)}
        return Begun(headers, chunks(first, stream))


@dataclass(frozen=True)
class Finished:
    """An image that is encoded in full, or has failed."""

    index: int
    stream: ImageStream
    content: list[bytes]  # in chunks
    problem: Problem | None


class Container(Layout):
    """Layout with one part per image, in order, and a problem document in place of an image that failed.

    A part is sent when its image is complete: a truncated part would look complete to the client. If the only image of
    a request fails, the response is its error.
    """

    media_type: str

    async def begin(self, streams: Streams, request_id: str) -> Begun:
        """Begin at once, or after the only image has ended."""
        headers = {"Content-Type": self.media_type, "X-Seed": ", ".join(str(stream.seed) for stream in streams)}
        if len(streams) > 1:
            return Begun(headers, self._body(finished(streams, request_id)))
        content = await complete(streams[0])
        image = Finished(0, streams[0], content, None)
        return Begun(headers | {"Server-Timing": timing(streams[0])}, self._body(_only(image)))

    @abstractmethod
    def _body(self, images: AsyncIterator[Finished]) -> AsyncIterator[bytes]:
        """Yield the body in chunks."""


class Multipart(Container):
    """A multipart/mixed body (RFC 2046)."""

    def __init__(self) -> None:
        """Choose a boundary."""
        self._boundary = secrets.token_hex(16)
        self.media_type = f"multipart/mixed; boundary={self._boundary}"

    async def _body(self, images: AsyncIterator[Finished]) -> AsyncIterator[bytes]:
        async for image in images:
            if image.problem is not None:
                yield self._head(image.index, PROBLEM_MEDIA_TYPE, {"X-Status": str(image.problem.status)})
                yield json.dumps(image.problem.document).encode()
            else:
                stream = image.stream
                headers = {"X-Seed": str(stream.seed), "Server-Timing": timing(stream)}
                yield self._head(image.index, stream.media_type, headers)
                for chunk in image.content:
                    yield chunk
            yield b"\r\n"
        yield f"--{self._boundary}--\r\n".encode()

    def _head(self, index: int, media_type: str, headers: dict[str, str]) -> bytes:
        lines = {"Content-Type": media_type, "X-Index": str(index), **headers}
        text = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        return f"--{self._boundary}\r\n{text}\r\n".encode()


async def complete(stream: ImageStream) -> list[bytes]:
    """Wait for all of an image; return its chunks. Raises the error that the image ended with."""
    return [chunk async for chunk in chunks(await stream.chunk(), stream)]


async def finished(streams: Streams, request_id: str) -> AsyncIterator[Finished]:
    """Yield the images in order, each as soon as it has ended."""
    for index, stream in enumerate(streams):
        try:
            yield Finished(index, stream, await complete(stream), None)
        except PidError as error:
            yield Finished(index, stream, [], problem(error, request_id))


async def chunks(first: bytes | None, stream: ImageStream) -> AsyncIterator[bytes]:
    """Yield `first`, which was read from `stream` already, and the rest of it."""
    chunk = first
    while chunk is not None:
        yield chunk
        chunk = await stream.chunk()


async def _only(image: Finished) -> AsyncIterator[Finished]:
    yield image


def timing(stream: ImageStream) -> str:
    """Return the Server-Timing header: the stages that have ended so far, in milliseconds."""
    return ", ".join(f"{name};dur={1000 * seconds:.1f}" for name, seconds in asdict(stream.timings).items() if seconds)
