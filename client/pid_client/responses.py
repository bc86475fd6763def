"""Images, previews and errors from HTTP responses."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from pid_client.errors import (
    DeadlineError,
    DecodeFailedError,
    InvalidRequestError,
    OverloadedError,
    PidError,
    ResponseError,
    UnauthorizedError,
    UnavailableError,
)
from pid_client.image import Image, ImageInfo, Preview
from pid_client.multipart import Part

_TYPES = {
    401: UnauthorizedError,
    429: OverloadedError,
    502: UnavailableError,
    503: UnavailableError,
    504: UnavailableError,  # of a proxy; those of the server are deadlines
}
_DEADLINE_CODES = ("deadline-exceeded", "deadline-too-short")
_LONGEST_DETAIL = 500  # characters of a response that is not a problem document
_STAGE = re.compile(
    r"([\w-]+)\s*;\s*dur=([0-9]+(?:\.[0-9]+)?)"
)  # of a Server-Timing header, to which proxies may add others


def read_info(headers: Mapping[str, str], index: int, request_id: str) -> ImageInfo:
    """Read the headers of an image: those of a response or of a part of one.

    Raises:
        DecodeFailedError: they are not from a decode server.
        ValueError: a number in them is invalid.
    """
    media_type, seed = headers.get("Content-Type", ""), headers.get("X-Seed", "")
    if not seed.isdecimal():
        raise not_a_decode_server(f"is {media_type or 'untyped'} without a seed", request_id)
    timings = {name: float(duration) / 1000 for name, duration in _STAGE.findall(headers.get("Server-Timing", ""))}
    shape = headers.get("X-Shape")
    pixels = None if shape is None else tuple(map(int, shape.split(",")))
    return ImageInfo(media_type, int(seed), timings, request_id, index, pixels)


def read_part(part: Part, start: int, request_id: str) -> tuple[int, Preview | Image | PidError]:
    """Read a part of the response to the latents from `start` of a batch: an image, its preview or its error.

    Returns:
        Index in the batch and contents. Errors have no index yet.

    Raises:
        DecodeFailedError: as in `read_info`.
        KeyError, ValueError: a header is missing or is not a number.
    """
    headers, content = part
    index = start + int(headers["X-Index"])
    if "X-Status" in headers:
        return index, read_error(int(headers["X-Status"]), headers, content, request_id)
    if "X-Step" in headers:
        step, steps, latency = int(headers["X-Step"]), int(headers["X-Steps"]), float(headers["X-Latency-Ms"]) / 1000
        return index, Preview(index, step, steps, latency, content)
    return index, Image(**vars(read_info(headers, index, request_id)), data=content)


def not_a_decode_server(problem: str, request_id: str) -> DecodeFailedError:
    """Return the error for a successful response that no decode server sends."""
    detail = f"The response {problem}; check the URL of the server."
    return DecodeFailedError(200, "http-200", detail, request_id=request_id)


def read_error(status: int, headers: Mapping[str, str], body: bytes, request_id: str) -> PidError:
    """Return the error in a response, or in a part of one: a problem document (RFC 9457), or the text of a proxy."""
    code, detail = _read_problem(body)
    code = code or f"http-{status}"
    if 300 <= status < 400 and "Location" in headers:
        detail = f"The server redirects to {headers['Location']}; use the URL that it redirects to."
    detail = detail or body[:_LONGEST_DETAIL].decode(errors="replace").strip() or "The response is empty."
    kind = _TYPES.get(status, InvalidRequestError if 400 <= status < 500 else DecodeFailedError)
    error: ResponseError = kind(status, code, detail, _read_seconds(headers.get("Retry-After")), request_id)
    if code not in _DEADLINE_CODES:
        return error
    late = DeadlineError(detail, request_id)
    late.__cause__ = error
    return late


def _read_problem(body: bytes) -> tuple[str | None, str | None]:
    """Return code and detail of a problem document, or None for what it lacks."""
    try:
        problem = json.loads(body)
    except ValueError:
        return None, None
    values = (problem.get(name) if isinstance(problem, dict) else None for name in ("code", "detail"))
    code, detail = (value if isinstance(value, str) else None for value in values)
    return code, detail


def _read_seconds(header: str | None) -> float | None:
    """Return the seconds of a Retry-After header; a date, which the server never sends, counts as none."""
    return float(header) if header is not None and header.isdecimal() else None
