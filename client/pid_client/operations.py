"""Client operations without I/O, which the synchronous and the asynchronous client share.

An operation is a generator. It yields effects, which the client performs, and receives their results. An operation with
`on_preview` requests previews and passes each to this function.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Callable, Container, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import httpx

from pid_client.call import Call
from pid_client.effects import Emit, Operation, Receive, Send, Show, Wait
from pid_client.errors import ConnectionLostError, DeadlineError, PidError, ResponseError
from pid_client.image import Image, ImageInfo, Preview
from pid_client.multipart import MultipartParser, Part
from pid_client.requests import DecodeRequest
from pid_client.responses import not_a_decode_server, read_error, read_info, read_part
from pid_client.server_info import ServerInfo

T = TypeVar("T")

OnPreview = Callable[[Preview], Any]

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


def decode(call: Call, request: DecodeRequest, on_preview: OnPreview | None = None) -> Operation[None]:
    """Emit the `Image` of one latent."""

    def attempt() -> Operation[Image]:
        info = yield from _open_image(call, request)
        return Image(**vars(info), data=(yield from _receive_all(call)))

    def attempt_with_previews() -> Operation[Image]:
        results = yield from _open_results(call, request, 0, on_preview)
        _, result = yield from results.receive([0])
        yield from _receive_end(call)
        if isinstance(result, PidError):
            raise result
        return result

    image = yield from _repeat(call, attempt if on_preview is None else attempt_with_previews)
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


def decode_batch(call: Call, request: DecodeRequest, on_preview: OnPreview | None = None) -> Operation[None]:
    """Emit the `Image` of each latent of a batch as soon as it is complete, or the `PidError` that it ended with.

    Later attempts send only the latents whose images are missing. An error of the request as a whole is raised.
    """
    missing = list(range(request.batch or 1))
    while missing:
        try:
            yield from _repeat(call, partial(_decode_missing, call, request, missing, on_preview))
        except PidError as error:
            if error.index is None:
                raise
            missing.remove(error.index)
            yield Emit(error)


def _decode_missing(
    call: Call, request: DecodeRequest, missing: list[int], on_preview: OnPreview | None
) -> Operation[None]:
    """Send the first consecutive latents of `missing`; emit results and remove their indices from it.

    Raises:
        PidError: of the request; or, with its index, of an image that another attempt may decode.
    """
    start = missing[0]
    count = next((i for i, index in enumerate(missing) if index != start + i), len(missing))
    try:
        results = yield from _open_results(call, request.only(start, start + count), start, on_preview)
    except PidError as error:
        if count == 1 and _is_of_image(error):
            error.index = start  # the response to a single latent is its error
        raise
    failed = None
    for _ in range(count):
        index, result = yield from results.receive(missing)
        if isinstance(result, PidError):
            result.index = index
            if call.pause(result) is not None:
                failed = failed or result
                continue
        missing.remove(index)
        yield Emit(result)
    yield from _receive_end(call)
    if failed is not None:
        raise failed


class _Results:
    """Images in the parts of a response, and errors in place of images that failed."""

    def __init__(self, call: Call, content_type: str, start: int, on_preview: OnPreview | None) -> None:
        """Begin a response to the latents from `start`. Raises ValueError as `MultipartParser`."""
        self._call, self._start, self._on_preview = call, start, on_preview
        self._parser = MultipartParser(content_type)
        self._parts: Iterator[Part] = iter(())  # that have arrived

    def receive(self, expected: Container[int]) -> Operation[tuple[int, Image | PidError]]:
        """Return the index of the next image, which must be one of `expected`, and the image or its error."""
        with _expecting(f"is not a valid {_media_type(self._on_preview)} body", self._call):
            while True:
                for part in self._parts:
                    index, content = read_part(part, self._start, self._call.request_id)
                    if index not in expected:
                        raise ValueError(f"The response has the index {index}, which was not requested.")
                    if not isinstance(content, Preview):
                        return index, content
                    if self._on_preview is not None:
                        yield Show(content, self._on_preview)
                chunk = yield from _receive(self._call)
                if chunk is None:
                    raise ConnectionLostError("The response ended before its last part.", self._call.request_id)
                self._parts = self._parser.feed(chunk)


def _open_results(call: Call, request: DecodeRequest, start: int, on_preview: OnPreview | None) -> Operation[_Results]:
    """Send a request for the latents from `start` of a batch; return its results, which are to be received."""
    media_type, arguments = _media_type(on_preview), request.arguments()
    arguments["headers"] = {**arguments.get("headers", {}), "Accept": media_type}
    response = yield from _open(call, "POST", "decode", arguments)
    with _expecting(f"is not a valid {media_type} body", call):
        return _Results(call, response.headers.get("Content-Type", ""), start, on_preview)


def _media_type(on_preview: OnPreview | None) -> str:
    return "multipart/mixed" if on_preview is None else "multipart/x-mixed-replace"


def _receive_end(call: Call) -> Operation[None]:
    """Receive the end of the body, if it arrives, so that the connection can be reused."""
    with contextlib.suppress(httpx.RequestError, PidError):
        while (yield from _receive(call)) is not None:
            pass


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
