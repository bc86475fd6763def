"""Deadline and retries of one client call."""

from __future__ import annotations

import random
import re
import secrets
import ssl
import time
from collections.abc import Callable

import httpx

from pid_client.errors import ConnectionLostError, DeadlineError, OverloadedError, PidError, UnavailableError

GRACE = 0.5  # seconds that the client waits longer than the server, so that the server can report a missed deadline
CONNECT_SECONDS = 5.0  # limit for one attempt to connect
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0  # seconds, unless Retry-After is longer; doubles with each attempt
_NO_TLS = "WRONG_VERSION_NUMBER"  # reason of an ssl.SSLError for a port without TLS
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")  # others are replaced by the server
_LONGEST_DEADLINE = 24 * 3600.0  # seconds
_LONGEST_JITTER = 1.0  # seconds; the server keeps a place in the queue until two seconds after Retry-After


class Call:
    """Deadline and attempts of one call."""

    def __init__(
        self,
        deadline: float,
        *,
        retry: bool = True,
        request_id: str | None = None,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        """Begin a call now.

        Args:
            deadline: Seconds until all attempts must have ended.
            retry: Whether to retry.
            request_id: Id for the server's log; by default, a random one.
            clock: Monotonic time in seconds.
            uniform: Random number between two others, for jitter.

        Raises:
            ValueError: the deadline or the request id is invalid.
        """
        if not 0 < deadline <= _LONGEST_DEADLINE:
            raise ValueError(
                f"The deadline is {deadline:g} s; pass a positive number, at most {_LONGEST_DEADLINE:g} s."
            )
        if request_id is not None and not _REQUEST_ID.fullmatch(request_id):
            raise ValueError("The request_id is invalid; pass 1 to 64 characters of A-Z a-z 0-9 . _ -")
        self.request_id = request_id or secrets.token_hex(16)
        self._retry, self._clock, self._uniform = retry, clock, uniform
        self._ends = clock() + deadline
        self._attempts = 0

    @property
    def remaining(self) -> float:
        """Seconds until the deadline."""
        return self._ends - self._clock()

    def begin_attempt(self) -> tuple[dict[str, str], httpx.Timeout]:
        """Return the headers and the time limits of the next attempt.

        Raises:
            DeadlineError: the deadline has passed.
        """
        remaining = self.remaining
        if remaining <= 0:
            raise self._late()
        self._attempts += 1
        headers = {"X-Request-Id": self.request_id, "X-Deadline-Ms": str(max(1, round(1000 * remaining)))}
        return headers, httpx.Timeout(remaining + GRACE, connect=min(CONNECT_SECONDS, remaining))

    def limit(self) -> float:
        """Return the seconds that may pass until more of the response arrives.

        Raises:
            DeadlineError: the deadline has passed, and the time for the server to report it, too.
        """
        seconds = self.remaining + GRACE
        if seconds <= 0:
            raise self._late()
        return seconds

    def lost(self, cause: httpx.RequestError) -> PidError:
        """Return the error for a connection that failed."""
        error = self._late() if self.remaining <= 0 else ConnectionLostError(_describe(cause), self.request_id)
        error.__cause__ = cause
        return error

    def pause(self, error: PidError) -> float | None:
        """Return the seconds to wait before the next attempt, or None if `error` is final."""
        if not self._retry or not _is_temporary(error):
            return None
        after = error.retry_after if isinstance(error, OverloadedError | UnavailableError) else None
        limit = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(self._attempts - 1, 10))
        pause = self._uniform(limit / 2, limit)
        if after is not None:
            pause = max(pause, after + self._uniform(0, min(_LONGEST_JITTER, after / 2)))
        return pause if pause < self.remaining else None

    def _late(self) -> DeadlineError:
        return DeadlineError("The deadline passed before the response was complete.", self.request_id)


def _is_temporary(error: PidError) -> bool:
    if isinstance(error, ConnectionLostError):
        return error.__cause__ is None or not _is_permanent(error.__cause__)
    return isinstance(error, OverloadedError | UnavailableError)


def _is_permanent(failure: BaseException) -> bool:
    """Return whether a request fails for a reason that another attempt does not change, such as a certificate."""
    if not isinstance(failure, httpx.TransportError):
        return True  # too many redirects, or a body in an unknown encoding
    if isinstance(failure, httpx.LocalProtocolError | httpx.ProxyError | httpx.UnsupportedProtocol):
        return True
    cause: BaseException | None = failure
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError) or getattr(cause, "reason", "") == _NO_TLS:
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _describe(cause: httpx.RequestError) -> str:
    url = cause.request.url.copy_with(username=None, password=None, query=None)
    return f"The connection to {url} failed: {str(cause) or type(cause).__name__}."
