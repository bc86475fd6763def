"""Errors a client can get: each type has an HTTP status and a stable code (see server/http/problem.py)."""

from __future__ import annotations

from typing import ClassVar

from engines.errors import PidError


def count_of(count: int, noun: str) -> str:
    """Return a count for a message, such as `1 image` or `2 images`, in few characters even if it is huge."""
    text = str(count)
    return f"{text if len(text) <= 20 else f'{text[:20]}…'} {noun}{'' if count == 1 else 's'}"


class MalformedRequestError(PidError):
    """The bytes received are not valid HTTP."""

    status = 400
    code = "malformed-request"


class MalformedBodyError(PidError):
    """The body does not match its media type: it is truncated, inconsistent or cannot be decoded."""

    status = 400
    code = "malformed-body"


class UnauthorizedError(PidError):
    """The API key is missing or unknown."""

    status = 401
    code = "unauthorized"
    headers: ClassVar = {"WWW-Authenticate": "Bearer"}


class UnknownModelError(PidError):
    """The path of an inference request names a model that is not a decoder of this server."""

    status = 404
    code = "unknown-model"


class UnknownDecoderError(PidError):
    """The path of a decode request names a decoder that this server does not have."""

    status = 404
    code = "unknown-decoder"


class NotAcceptableError(PidError):
    """The Accept header allows none of the media types that the server can send."""

    status = 406
    code = "not-acceptable"


class BodyTimeoutError(PidError):
    """The client took too long to send the body."""

    status = 408
    code = "body-timeout"


class BodyTooLargeError(PidError):
    """The body exceeds the limit; the connection is closed because the rest of the body is not read."""

    status = 413
    code = "body-too-large"
    headers: ClassVar = {"Connection": "close"}


class UnsupportedMediaTypeError(PidError):
    """The body's media type or content encoding is not supported."""

    status = 415
    code = "unsupported-media-type"


class InvalidLatentError(PidError):
    """The latent is missing, or its shape, dtype or values are not supported by this decoder."""

    status = 422
    code = "invalid-latent"


class InvalidCaptionError(PidError):
    """The caption embedding has a shape, dtype or values that this decoder does not support."""

    status = 422
    code = "invalid-caption"


class InvalidOptionError(PidError):
    """An option is unknown, out of range or set to two different values."""

    status = 422
    code = "invalid-option"


class AmbiguousDecoderError(PidError):
    """Several decoders of this server support the latent, and the request names none of them."""

    status = 422
    code = "ambiguous-decoder"


class ExtremeValuesError(PidError):
    """The latent or the caption has values so large that the image contains NaN or infinity."""

    status = 422
    code = "extreme-values"


class DeadlineTooShortError(PidError):
    """Even an idle server would miss the deadline."""

    status = 422
    code = "deadline-too-short"


class TooManyImagesError(PidError):
    """The request has more images than the queue, or the share of its priority class, can hold."""

    status = 422
    code = "too-many-images"


class QueueFullError(PidError):
    """The request was rejected at admission; `retry_after` is in seconds, computed from the backlog."""

    status = 429
    code = "queue-full"

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class BodyMemoryError(PidError):
    """The bodies of other requests use all memory for bodies; the connection is closed, because no more is read."""

    status = 429
    code = "body-memory-full"
    retry_after = 1.0
    headers: ClassVar = {"Connection": "close"}


class ClientShareError(QueueFullError):
    """The client already uses its fair share of the queue, of device time or of undelivered bytes."""

    code = "client-share"


class KeyBusyError(PidError):
    """An API key has reached its limit of requests in flight; `retry_after` is the predicted end of one in seconds."""

    status = 429
    code = "key-busy"

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class HeadersTooLargeError(PidError):
    """The request has too many headers, or too many bytes of them."""

    status = 431
    code = "headers-too-large"


class CancelledError(PidError):
    """The client disconnected. The response is never sent; the log and metrics use nginx's status for this, 499."""

    status = 499
    code = "client-left"


class UnavailableError(PidError):
    """The server is starting, draining, stalled or unhealthy.

    `retry_after` is in seconds, or None if this server will not recover soon.
    """

    status = 503
    code = "unavailable"

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class OutOfMemoryError(UnavailableError):
    """The process ran out of memory, so it has to be restarted."""

    def __init__(self) -> None:
        super().__init__("The server ran out of memory and is restarting; retry shortly.")


class TooManyConnectionsError(PidError):
    """The request arrived on a connection over the limit."""

    status = 503
    code = "too-many-connections"
    retry_after = 1.0
    headers: ClassVar = {"Connection": "close"}


class DeadlineError(PidError):
    """The request was admitted but not finished before its deadline."""

    status = 504
    code = "deadline-exceeded"
