"""Problem documents (RFC 9457): the one place where errors become HTTP."""

from __future__ import annotations

import math
from typing import Any

from engines.errors import PidError

PROBLEM_MEDIA_TYPE = "application/problem+json"


def problem(error: BaseException, request_id: str | None = None) -> tuple[int, dict[str, str], dict[str, Any]]:
    """Status, extra headers and RFC 9457 body for `error`; anything unforeseen becomes a plain 500 without detail."""
    if not isinstance(error, PidError):
        error = PidError("The server failed in an unforeseen way; the log has the details under this request id.")
    headers: dict[str, str] = dict(getattr(error, "headers", {}))
    retry_after = getattr(error, "retry_after", None)
    if retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(retry_after)))
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": error.code.replace("-", " ").capitalize(),
        "status": error.status,
        "code": error.code,
        "detail": str(error),
    }
    if request_id is not None:
        body["request_id"] = request_id
    return error.status, headers, body
