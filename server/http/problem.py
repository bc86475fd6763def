"""Problem documents (RFC 9457): conversion of errors to statuses, headers and bodies."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from engines.errors import PidError
from server.body import media
from server.http import models

PROBLEM_MEDIA_TYPE = media.PROBLEM


class Problem(NamedTuple):
    """An error as HTTP: status, headers to add, and the members of the document."""

    status: int
    headers: dict[str, str]
    document: dict[str, Any]


def problem(error: BaseException, request_id: str | None = None) -> Problem:
    """Describe `error` as a problem; an unexpected one becomes a plain 500 without details."""
    if not isinstance(error, PidError):
        error = PidError("Internal error; see the server log for this request id.")
    headers: dict[str, str] = dict(getattr(error, "headers", {}))
    retry_after = getattr(error, "retry_after", None)
    if retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(retry_after)))
    document = problem_document(error.status, error.code, str(error), request_id)
    return Problem(error.status, headers, document)


def problem_document(status: int, code: str, detail: str, request_id: str | None) -> dict[str, Any]:
    """Return the members of a problem document; without a request id, it has no such member."""
    title = code.replace("-", " ").capitalize()
    document = models.Problem(
        type="about:blank", title=title, status=status, code=code, detail=detail, request_id=request_id
    )
    return document.model_dump(exclude_none=True)
