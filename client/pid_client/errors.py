"""Errors that the client raises."""

from __future__ import annotations


class PidError(Exception):
    """A request that did not succeed.

    Attributes:
        request_id: Id of the request in the server's log; all attempts of a call share it.
        index: Index of the latent in its batch, if the error concerns one image of a batch.
    """

    def __init__(self, message: str, request_id: str | None = None, index: int | None = None) -> None:
        super().__init__(message, request_id, index)  # all of them, so that the error can be pickled
        self.request_id, self.index = request_id, index

    def __str__(self) -> str:
        return str(self.args[0])


class ConnectionLostError(PidError):
    """There was no connection to the server, or it ended before the response did."""


class DeadlineError(PidError):
    """The deadline passed before the image was complete, or is shorter than a decode takes.

    If the server reported it, `__cause__` is its `ResponseError`.
    """


class ResponseError(PidError):
    """The server, or a proxy before it, reported an error.

    Attributes:
        status: HTTP status.
        code: Stable code of the server's error, such as `queue-full`; `http-STATUS` for other responses.
        detail: Explanation for people.
        retry_after: Retry-After in seconds, or None.
    """

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        retry_after: float | None = None,
        request_id: str | None = None,
        index: int | None = None,
    ) -> None:
        super().__init__(detail, request_id, index)
        self.args = (status, code, detail, retry_after, request_id, index)
        self.status, self.code, self.detail, self.retry_after = status, code, detail, retry_after

    def __str__(self) -> str:
        return f"{self.detail} ({self.status} {self.code})"


class InvalidRequestError(ResponseError):
    """The request is invalid: 4xx, apart from those below."""


class UnauthorizedError(ResponseError):
    """The API key is missing or unknown: 401."""


class OverloadedError(ResponseError):
    """The server has no room for the request now: 429."""


class UnavailableError(ResponseError):
    """The server, or a device of it, is not available now: 503, or 502 and 504 from a proxy."""


class DecodeFailedError(ResponseError):
    """The decode failed: 500, and responses that are not those of a decode server."""
