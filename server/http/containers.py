"""Containers: several images in one response, with a problem document in place of an image that failed."""

from __future__ import annotations

import base64
import io
import json
import secrets
import zipfile
from abc import abstractmethod
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from engines.errors import PidError
from server.body.media import JSON
from server.body.negotiation import MULTIPART, ZIP
from server.http.layouts import Begun, Layout, Streams, complete, image_headers, iterate, seeds, timing
from server.http.problem import PROBLEM_MEDIA_TYPE, Problem, problem
from server.stream import ImageStream

BASE64_EXPANSION = 4 / 3  # characters per byte
BASE64_PIECE = 3 * 2**16  # bytes encoded at once; a multiple of 3, so that there is no padding in between


@dataclass(frozen=True)
class Finished:
    """An image that is encoded in full, or has failed."""

    index: int
    stream: ImageStream
    content: list[bytes]  # in chunks
    problem: Problem | None = None


class Container(Layout):
    """Layout with one part per image, in order.

    A part is sent when its image is complete: a truncated part would look complete to the client. If the only image of
    a request fails, the response is its error.
    """

    media_type: str

    async def begin(self, streams: Streams, request_id: str) -> Begun:
        """Begin at once, or after the only image has ended."""
        headers = {"Content-Type": self.media_type, "X-Seed": seeds(streams)}
        if len(streams) > 1:
            return Begun(headers, self._body(_finished(streams, request_id)))
        image = Finished(0, streams[0], await complete(streams[0]))
        return Begun(headers | {"Server-Timing": timing(streams[0])}, self._body(iterate([image])))

    @abstractmethod
    def _body(self, images: AsyncIterator[Finished]) -> AsyncIterator[bytes]:
        """Yield the body in chunks."""


class Multipart(Container):
    """A multipart/mixed body (RFC 2046)."""

    def __init__(self) -> None:
        """Choose a boundary."""
        self._boundary = secrets.token_hex(16)
        self.media_type = f"{MULTIPART}; boundary={self._boundary}"

    def _body(self, images: AsyncIterator[Finished]) -> AsyncIterator[bytes]:
        return multipart_body(self._boundary, (image_part(image) async for image in images))


class JsonDocument(Container):
    """A JSON object with the list `images`; each item has `index`, and either `data` in base64 or `problem`."""

    media_type = JSON
    expansion = BASE64_EXPANSION

    async def _body(self, images: AsyncIterator[Finished]) -> AsyncIterator[bytes]:
        separator = b'{"images": ['
        async for image in images:
            yield separator
            separator = b", "
            if image.problem is not None:
                yield json.dumps({"index": image.index, "problem": image.problem.document}).encode()
                continue
            for piece in json_with_data(image_description(image), image.content):
                yield piece
        yield b"]}\n"


class ZipArchive(Container):
    """A zip archive with the files `image-0.png`, … without further compression; `image-1.json` is a problem."""

    media_type = ZIP

    async def _body(self, images: AsyncIterator[Finished]) -> AsyncIterator[bytes]:
        output = _Drained()
        with zipfile.ZipFile(output, "w") as archive:
            async for image in images:
                if image.problem is not None:
                    name, content = f"image-{image.index}.json", json.dumps(image.problem.document).encode()
                else:
                    name, content = f"image-{image.index}.{_suffix(image.stream)}", b"".join(image.content)
                archive.writestr(zipfile.ZipInfo(name), content)  # without a time: the same images, the same bytes
                yield output.drain()
        yield output.drain()


class _Drained:
    """File that passes on what has been written. Only what has not been passed on yet can be changed."""

    def __init__(self) -> None:
        self._start = 0  # bytes passed on
        self._rest = io.BytesIO()

    def drain(self) -> bytes:
        content = self._rest.getvalue()
        self._start += len(content)
        self._rest = io.BytesIO()
        return content

    def write(self, data: bytes) -> int:
        return self._rest.write(data)

    def tell(self) -> int:
        return self._start + self._rest.tell()

    def seek(self, offset: int) -> int:
        return self._start + self._rest.seek(offset - self._start)

    def seekable(self) -> bool:
        return True

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def _suffix(stream: ImageStream) -> str:
    """Return the suffix of a file with the encoded image."""
    subtype = stream.media_type.partition("/")[2].removeprefix("x-")
    return {"jpeg": "jpg", "octet-stream": "raw"}.get(subtype, subtype)


class Part(NamedTuple):
    """Part of a multipart body."""

    headers: dict[str, str]
    content: list[bytes]  # in chunks


def image_part(image: Finished) -> Part:
    """Return the part for an image, or for the problem in its place."""
    headers = {"X-Index": str(image.index)}
    if image.problem is None:
        headers = {"Content-Type": image.stream.media_type, **image_headers(image.stream), **headers}
        return Part(headers, image.content)
    headers = {"Content-Type": PROBLEM_MEDIA_TYPE, "X-Status": str(image.problem.status), **headers}
    return Part(headers, [json.dumps(image.problem.document).encode()])


async def multipart_body(boundary: str, parts: AsyncIterator[Part]) -> AsyncIterator[bytes]:
    """Yield a multipart body in chunks (RFC 2046).

    The boundary after a part is sent together with it, so that browsers know that the part is complete.
    """
    yield f"--{boundary}".encode()
    async for headers, content in parts:
        headers |= {"Content-Length": str(sum(map(len, content)))}
        text = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        yield f"\r\n{text}\r\n".encode()
        for chunk in content:
            yield chunk
        yield f"\r\n--{boundary}".encode()
    yield b"--\r\n"


def image_description(image: Finished) -> dict[str, object]:
    """Return the members of a JSON object about an image, apart from its data."""
    stream = image.stream
    members: dict[str, object] = {"index": image.index, "seed": stream.seed, "media_type": stream.media_type}
    if stream.shape is not None:
        members |= {"shape": stream.shape, "dtype": stream.dtype}
    return members


def json_with_data(members: Mapping[str, object], content: Iterable[bytes]) -> Iterator[bytes]:
    """Yield a JSON object on one line in pieces: `members`, and `data` with `content` in base64."""
    yield json.dumps(members).encode()[:-1] + b', "data": "'
    yield from base64_pieces(content)
    yield b'"}'


def base64_pieces(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the base64 of concatenated chunks in pieces, each of which holds the GIL for less than a millisecond."""
    rest = b""
    for chunk in chunks:
        data = rest + chunk
        whole = len(data) - len(data) % 3
        for start in range(0, whole, BASE64_PIECE):
            yield base64.b64encode(data[start : min(start + BASE64_PIECE, whole)])
        rest = data[whole:]
    if rest:
        yield base64.b64encode(rest)


async def _finished(streams: Streams, request_id: str) -> AsyncIterator[Finished]:
    """Yield the images in order, each as soon as it has ended."""
    for index, stream in enumerate(streams):
        yield await finished(index, stream, request_id)


async def finished(index: int, stream: ImageStream, request_id: str) -> Finished:
    """Wait for all of an image or for its error."""
    try:
        return Finished(index, stream, await complete(stream))
    except PidError as error:
        return Finished(index, stream, [], problem(error, request_id))
