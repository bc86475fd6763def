"""Client operations without I/O, which the synchronous and the asynchronous client share.

An operation is a generator. It yields effects, which the client performs, and receives their results.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, TypeVar

import httpx

from pid_client.call import Call
from pid_client.errors import ConnectionLostError, DeadlineError, PidError, ResponseError
from pid_client.image import Image, ImageInfo
from pid_client.multipart import MultipartParser, Part
from pid_client.requests import DecodeRequest
from pid_client.responses import not_a_decode_server, read_error, read_info
from pid_client.server_info import ServerInfo


@dataclass(frozen=True)
class Send:
    """Send a request; the result is the response, whose body is not read yet.

    Failures are thrown into the operation as `httpx.RequestError`, as are those of `Receive`.
    """

    method: str
    path: str  # relative to the address of the server
    arguments: dict[str, Any]  # of `httpx.Client.build_request`


@dataclass(frozen=True)
class Receive:
    """Receive more of the response's body; the result is None at its end."""


@dataclass(frozen=True)
class Wait:
    """Wait this number of seconds."""

    seconds: float


@dataclass(frozen=True)
class Emit:
    """Hand a value to the caller."""

    value: Any


Effect: TypeAlias = Send | Receive | Wait | Emit
T = TypeVar("T")
Operation: TypeAlias = Generator[Effect, Any, T]

_ERRORS_OF_IMAGES = ("decode-failed", "extreme-values", "deadline-exceeded")


def get_info(call: Call) -> Operation[None]:
    """Emit the `ServerInfo`."""

    def attempt() -> Operation[bytes]:
        yield from _open(call, "GET", "info", {})
        return (yield from _receive_all(call))

    document = yield from _repeat(call, attempt)
    with _expecting("is not a description of a server", call):
        info = ServerInfo.read(json.loads(document))
    yield Emit(info)


def decode(call: Call, request: DecodeRequest) -> Operation[None]:
    """Emit the `Image` of one latent."""

    def attempt() -> Operation[Image]:
        info = yield from _open_image(call, request)
        return Image(**vars(info), data=(yield from _receive_all(call)))

    image = yield from _repeat(call, attempt)
    yield Emit(image)


def stream(call: Call, request: DecodeRequest) -> Operation[None]:
    """Emit the `ImageInfo` of one latent, then the image in chunks. Retry only until the first chunk."""

    def attempt() -> Operation[tuple[ImageInfo, bytes | None]]:
        info = yield from _open_image(call, request)
        return info, (yield from _receive(call))

    info, chunk = yield from _repeat(call, attempt)
    yield Emit(info)
    with _connection_errors(call):
        while chunk is not None:
            yield Emit(chunk)
            chunk = yield from _receive(call)


def decode_to_file(call: Call, request: DecodeRequest, path: Path) -> Operation[None]:
    """Write the image of one latent to a file and emit its `ImageInfo`. The file appears when the image is complete."""
    path = path.resolve()  # a symbolic link stays one
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a regular file; use stream for pipes and devices.")
    partial_path = path.with_name(f".{secrets.token_hex(8)}.partial")

    def attempt(file: BinaryIO) -> Operation[ImageInfo]:
        info = yield from _open_image(call, request)
        file.seek(0)
        file.truncate()
        while (chunk := (yield from _receive(call))) is not None:
            file.write(chunk)
        return info

    try:
        with partial_path.open("wb") as opened:  # before the decode, which an invalid path would waste
            info = yield from _repeat(call, partial(attempt, opened))
        partial_path.replace(path)
    finally:
        partial_path.unlink(missing_ok=True)
    yield Emit(info)


def decode_batch(call: Call, request: DecodeRequest) -> Operation[None]:
    """Emit the `Image` of each latent of a batch as soon as it is complete, or the `PidError` that it ended with.

    Later attempts send only the latents whose images are missing. An error of the request as a whole is raised.
    """
    missing = list(range(request.batch or 1))
    while missing:
        try:
            yield from _repeat(call, partial(_decode_missing, call, request, missing))
        except PidError as error:
            if error.index is None:
                raise
            missing.remove(error.index)
            yield Emit(error)


def _decode_missing(call: Call, request: DecodeRequest, missing: list[int]) -> Operation[None]:
    """Send the first consecutive latents of `missing`; emit results and remove their indices from it.

    Raises:
        PidError: of the request; or, with its index, of an image that another attempt may decode.
    """
    start = missing[0]
    count = next((i for i, index in enumerate(missing) if index != start + i), len(missing))
    arguments = request.only(start, start + count).arguments()
    arguments["headers"] = {**arguments.get("headers", {}), "Accept": "multipart/mixed"}
    try:
        response = yield from _open(call, "POST", "decode", arguments)
    except PidError as error:
        if count == 1 and _is_of_image(error):
            error.index = start  # the response to a single latent is its error
        raise
    failed = None
    with _expecting("is not a valid multipart/mixed body", call):
        parser, received = MultipartParser(response.headers.get("Content-Type", "")), 0
        while received < count:
            chunk = yield from _receive(call)
            if chunk is None:
                raise ConnectionLostError("The response ended before its last part.", call.request_id)
            for part in parser.feed(chunk):
                received += 1
                index, result = _read_part(part, start, call.request_id)
                if index not in missing:
                    raise ValueError(f"The response has the index {index}, which was not requested.")
                if isinstance(result, PidError) and call.pause(result) is not None:
                    failed = failed or result
                else:
                    missing.remove(index)
                    yield Emit(result)
    with contextlib.suppress(httpx.RequestError, PidError):
        while (yield from _receive(call)) is not None:  # the end of the body, so that the connection can be reused
            pass
    if failed is not None:
        raise failed


def _read_part(part: Part, start: int, request_id: str) -> tuple[int, Image | PidError]:
    """Return the index and the image, or its error, in a part of the response for the latents from `start`."""
    index = start + int(part.headers["X-Index"])
    if "X-Status" in part.headers:
        return index, read_error(int(part.headers["X-Status"]), part.headers, part.content, request_id, index)
    return index, Image(**vars(read_info(part.headers, index, request_id)), data=part.content)


def _is_of_image(error: PidError) -> bool:
    """Return whether the response to a single latent is an error of its image, rather than of the request."""
    reported = error.__cause__ if isinstance(error, DeadlineError) else error
    return isinstance(reported, ResponseError) and reported.code in _ERRORS_OF_IMAGES


def _open_image(call: Call, request: DecodeRequest) -> Operation[ImageInfo]:
    """Send a request for one image; return what the headers of the response report, with the body to be received."""
    response = yield from _open(call, "POST", "decode", request.arguments())
    with _expecting("has invalid headers", call):
        return read_info(response.headers, 0, call.request_id)


def _open(call: Call, method: str, path: str, arguments: dict[str, Any]) -> Operation[httpx.Response]:
    """Send a request once; return its response, with the body to be received, if it is not an error.

    Raises:
        PidError: the error in the response.
        httpx.RequestError: the request failed without a response.
    """
    headers, timeout = call.begin_attempt()
    headers |= arguments.get("headers", {})
    response = yield Send(method, path, {**arguments, "headers": headers, "timeout": timeout})
    if not response.is_success:
        body = yield from _receive_all(call)
        raise read_error(response.status_code, response.headers, body, call.request_id)
    # The body has only the time that is left now; httpx reads this limit when the body begins.
    response.request.extensions["timeout"]["read"] = call.limit()
    return response


def _receive_all(call: Call) -> Operation[bytes]:
    """Return the rest of the response's body."""
    chunks = []
    while (chunk := (yield from _receive(call))) is not None:
        chunks.append(chunk)
    return b"".join(chunks)


def _receive(call: Call) -> Operation[bytes | None]:
    """Return the next chunk of the body, or None at its end.

    Raises:
        DeadlineError: the deadline and the grace period have passed.
    """
    call.limit()
    return (yield Receive())


def _repeat(call: Call, attempt: Callable[[], Operation[T]]) -> Operation[T]:
    """Return the result of the first attempt that succeeds.

    Raises:
        PidError: of the last attempt, if another one is useless or would be too late.
    """
    while True:
        try:
            with _connection_errors(call):
                return (yield from attempt())
        except PidError as error:
            pause = call.pause(error)
            if pause is None:
                raise
        yield Wait(pause)


@contextlib.contextmanager
def _expecting(problem: str, call: Call) -> Iterator[None]:
    """Convert parsing errors in the block to a DecodeFailedError."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as cause:
        raise not_a_decode_server(problem, call.request_id) from cause


@contextlib.contextmanager
def _connection_errors(call: Call) -> Iterator[None]:
    try:
        yield
    except httpx.RequestError as cause:
        raise call.lost(cause) from cause
