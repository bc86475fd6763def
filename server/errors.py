"""What a client gets when a request cannot be served: the error tree mapped to HTTP, once (RFC 9457 problems)."""

from __future__ import annotations

from typing import ClassVar

from engines.errors import PidError


class MalformedRequestError(PidError):
    """Bytes that are no HTTP."""

    status = 400
    code = "malformed-request"


class MalformedBodyError(PidError):
    """The body is not what its media type says: truncated, inconsistent or undecodable."""

    status = 400
    code = "malformed-body"


class UnauthorizedError(PidError):
    """No API key, or one that is not known."""

    status = 401
    code = "unauthorized"
    headers: ClassVar = {"WWW-Authenticate": "Bearer"}


class NotAcceptableError(PidError):
    """No image format this server writes is among those the client accepts."""

    status = 406
    code = "not-acceptable"


class BodyTooLargeError(PidError):
    status = 413
    code = "body-too-large"
    headers: ClassVar = {"Connection": "close"}  # the rest of the body is not worth reading


class UnsupportedMediaTypeError(PidError):
    status = 415
    code = "unsupported-media-type"


class InvalidLatentError(PidError):
    """A well-formed tensor that this decoder does not take."""

    status = 422
    code = "invalid-latent"


class InvalidCaptionError(PidError):
    status = 422
    code = "invalid-caption"


class InvalidOptionError(PidError):
    status = 422
    code = "invalid-option"


class QueueFullError(PidError):
    """Refused at admission; `retry_after` is in seconds, computed from the backlog."""

    status = 429
    code = "queue-full"

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class KeyBusyError(PidError):
    """An API key has as many requests in flight as it may."""

    status = 429
    code = "key-busy"
    retry_after = 1.0


class HeadersTooLargeError(PidError):
    status = 431
    code = "headers-too-large"


class DeadlineError(PidError):
    """Admitted, but not finished in time."""

    status = 504
    code = "deadline-exceeded"


class BodyTimeoutError(PidError):
    """The client took too long to send its body."""

    status = 408
    code = "body-timeout"


class CancelledError(PidError):
    """The client left; nobody reads this answer, the log counts it under nginx's number for it."""

    status = 499
    code = "client-left"


class UnavailableError(PidError):
    """Starting, draining or unhealthy."""

    status = 503
    code = "unavailable"


class TooManyConnectionsError(PidError):
    status = 503
    code = "too-many-connections"
    retry_after = 1.0
    headers: ClassVar = {"Connection": "close"}
