"""Images and errors from HTTP responses."""

from __future__ import annotations

import json
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
from pid_client.image import ImageInfo

PROBLEM = "application/problem+json"

_TYPES = {401: UnauthorizedError, 429: OverloadedError, 502: UnavailableError, 503: UnavailableError}
_DEADLINE_CODES = ("deadline-exceeded", "deadline-too-short")
_LONGEST_DETAIL = 500  # characters of a response that is not a problem document


def read_info(headers: Mapping[str, str], index: int, request_id: str) -> ImageInfo:
    """Read the headers of an image: those of a response or of a part of one.

    Raises:
        ResponseError: the response is not from a decode server.
    """
    media_type, seed = headers.get("Content-Type", ""), headers.get("X-Seed", "")
    if not seed.isdecimal():
        raise DecodeFailedError(
            200,
            "http-200",
            f"The response is {media_type or 'untyped'} without a seed; check the URL of the server.",
            request_id=request_id,
        )
    shape = headers.get("X-Shape")
    return ImageInfo(
        media_type,
        int(seed),
        dict(_read_timings(headers.get("Server-Timing", ""))),
        request_id,
        index,
        None if shape is None else tuple(map(int, shape.split(","))),
    )


def _read_timings(header: str) -> list[tuple[str, float]]:
    """Return the stages of a Server-Timing header (W3C) in seconds."""
    stages = [stage.partition(";dur=") for stage in header.split(", ") if stage]
    return [(name, float(milliseconds) / 1000) for name, _, milliseconds in stages]


def read_error(
    status: int, headers: Mapping[str, str], body: bytes, request_id: str, index: int | None = None
) -> PidError:
    """Return the error in a response, or in a part of one: a problem document (RFC 9457), or the text of a proxy."""
    code, detail = f"http-{status}", body[:_LONGEST_DETAIL].decode(errors="replace").strip() or "Empty response."
    if headers.get("Content-Type", "").startswith(PROBLEM):
        problem = json.loads(body)
        code, detail = problem["code"], problem["detail"]
    kind = _TYPES.get(status, InvalidRequestError if 400 <= status < 500 else DecodeFailedError)
    error: ResponseError = kind(status, code, detail, _read_seconds(headers.get("Retry-After")), request_id, index)
    if code not in _DEADLINE_CODES:
        return error
    late = DeadlineError(detail, request_id, index)
    late.__cause__ = error
    return late


def _read_seconds(header: str | None) -> float | None:
    """Return the seconds of a Retry-After header; a date, which the server never sends, counts as none."""
    return float(header) if header is not None and header.isdecimal() else None
