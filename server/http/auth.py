"""API keys: `Authorization: Bearer KEY`, checked against a file of `name:key` lines that is reloaded if it changes."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import os
import re
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from engines.errors import ConfigError, PidError
from server.errors import KeyBusyError, UnauthorizedError, count_of
from server.http.context import RequestContext, error_response
from server.metrics import Metrics

log = logging.getLogger(__name__)

# For probes and scrapers.
PROBE_PATHS = frozenset({"/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready", "/metrics"})
_PUBLIC_PATHS = PROBE_PATHS | {"/", "/docs", "/openapi.json"}  # without a key
_PAGE_FILES = ("/docs/", "/playground/")  # files of the pages at /docs and /
MIN_KEY = 16  # characters
_KEY = re.compile(rf"[A-Za-z0-9._~+/=-]{{{MIN_KEY},}}")  # the characters of RFC 6750
_CHECK_INTERVAL = 1.0  # seconds between checks of the file for changes


class KeyFile:
    """The keys of a file with one `name:key` per line, and comment lines that begin with `#`. Only hashes are kept."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Read the keys from `path`; `clock` is for tests.

        Raises:
            ConfigError: the file cannot be read or is invalid.
        """
        self._path, self._clock = path, clock
        self._version = self._stat()
        self._checked = clock()
        self._names = read_keys(path)

    def name_of(self, key: str) -> str | None:
        """Return the name of `key`, or None if it is unknown. Keys are compared in constant time."""
        self._refresh()
        digest, name = _digest(key), None
        for known, known_name in self._names.items():
            if hmac.compare_digest(known, digest):
                name = known_name
        return name

    def _refresh(self) -> None:
        """Reload the file if it has changed; keep the current keys if that fails."""
        if self._clock() - self._checked < _CHECK_INTERVAL:
            return
        self._checked = self._clock()
        try:
            version = self._stat()
            if version != self._version:
                self._names, self._version = read_keys(self._path), version
                log.info("%d API keys read from %s", len(self._names), self._path)
        except ConfigError as error:
            log.error("keeping the current API keys: %s", error)

    def _stat(self) -> tuple[int, int, int]:
        try:
            status = os.stat(self._path)
        except OSError as error:
            raise ConfigError(f"Cannot read the API key file {self._path}: {error.strerror}.") from None
        return status.st_mtime_ns, status.st_size, status.st_ino


def read_keys(path: Path) -> dict[bytes, str]:
    """Read a key file and return the names by the SHA-256 of their keys.

    The syntax leaves no room for interpretation: whatever could be read in two ways is rejected.

    Raises:
        ConfigError: the file cannot be read or is invalid; the message names the line and never quotes a key.
    """
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise ConfigError(f"Cannot read the API key file {path}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"The API key file {path} is not UTF-8 text.") from None
    names: dict[bytes, str] = {}
    for number, line in enumerate(text.split("\n"), 1):
        try:
            entry = _read_line(line)
            if entry is not None:
                _add_key(names, *entry)
        except ValueError as error:
            raise ConfigError(f"{path}:{number}: {error}.") from None
    if not names:
        raise ConfigError(f"The API key file {path} is empty; expected one name:key per line.")
    return names


def _read_line(line: str) -> tuple[str, str] | None:
    """Return name and key, or None for a comment or a blank line. Raises ValueError with the reason."""
    if line.endswith("\r"):
        raise ValueError("the line ends with a carriage return; save the file with Unix line endings")
    if not line.replace("\t", " ").isprintable():
        raise ValueError("the line has an invisible character, such as a byte order mark; remove it")
    line = line.lstrip(" \t")
    if not line or line.startswith("#"):
        return None
    if any(character in line for character in "#\"'"):
        raise ValueError("a key line must have neither # nor quotes; write a comment on a separate line")
    name, colon, key = line.partition(":")
    name, key = name.strip(" \t"), key.lstrip(" \t")
    if not colon or not name:
        raise ValueError("expected name:key")
    if not _KEY.fullmatch(key):
        raise ValueError(
            f"a key needs at least {MIN_KEY} characters, all of them letters, digits or -._~+/=, and nothing after it"
        )
    return name, key


def _add_key(names: dict[bytes, str], name: str, key: str) -> None:
    """Add a key to `names`. Raises ValueError if the name or the key has occurred before."""
    if name in names.values():
        raise ValueError("the name is used twice; give each key its own name")
    if _digest(key) in names:
        raise ValueError("the key is used twice; give each name its own key")
    names[_digest(key)] = name


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def is_public(path: str) -> bool:
    """Return whether a path needs no API key: probes, and what a person needs to know to send a first request."""
    return path in _PUBLIC_PATHS or path.startswith(_PAGE_FILES)


def fair_share_client(scope: Scope, fair_by: Literal["key", "address"]) -> str:
    """Return the client of a request for fair shares: the name of its key or the address of its peer.

    IPv6 addresses are reduced to their /64 network, as one machine has all addresses of such a network.
    """
    context: RequestContext = scope["state"]["context"]
    if fair_by == "key":
        return context.client
    if scope["client"] is None:
        return ""  # a Unix socket, whose clients have no address and count as one
    host = scope["client"][0]
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    return str(address.ipv4_mapped or ipaddress.ip_network((address, 64), strict=False))


class ApiKeyMiddleware:
    """ASGI middleware that requires a known key unless a path is public, and limits requests in flight per key."""

    def __init__(
        self,
        app: ASGIApp,
        keys: KeyFile,
        max_in_flight: int,
        metrics: Metrics,
        next_end: Callable[[str], float | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Wrap `app`.

        Args:
            app: The application.
            keys: The known keys.
            max_in_flight: Maximum number of requests in flight per key.
            metrics: Counts the rejections.
            next_end: Returns the predicted seconds until an admitted request of a key ends, or None without one.
            clock: Returns the time in seconds.
        """
        self._app, self._keys, self._max_in_flight, self._metrics = app, keys, max_in_flight, metrics
        self._next_end, self._clock = next_end, clock
        self._in_flight: defaultdict[str, list[float]] = defaultdict(list)  # when each began

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Authorise a request and pass it on, or respond with 401 or 429."""
        if scope["type"] != "http" or is_public(scope["path"]):
            await self._app(scope, receive, send)
            return
        context: RequestContext = scope["state"]["context"]
        try:
            name = self._authorise(Headers(scope=scope).get("authorization", ""))
        except PidError as error:
            await error_response(error, context, self._metrics)(scope, receive, send)
            return
        context.client = context.fields["key"] = name
        began = self._clock()
        self._in_flight[name].append(began)
        try:
            await self._app(scope, receive, send)
        finally:
            self._in_flight[name].remove(began)

    def _authorise(self, header: str) -> str:
        """Return the name of the key in an Authorization header, if it may send another request."""
        scheme, _, key = header.partition(" ")
        name = self._keys.name_of(key.strip()) if scheme.lower() == "bearer" else None
        if name is None:
            raise UnauthorizedError("A valid API key is required; send it as Authorization: Bearer KEY.")
        if len(self._in_flight[name]) >= self._max_in_flight:
            raise KeyBusyError(
                f"The API key {name} has reached its limit of {count_of(self._max_in_flight, 'request')} in flight; "
                "retry later.",
                self._retry_after(name),
            )
        return name

    def _retry_after(self, name: str) -> float:
        """Return the predicted seconds until a request of a key ends.

        If none is admitted yet, their bodies are arriving. The newest is expected to take as long again as it has
        taken; --body-timeout ends the wait.
        """
        predicted = self._next_end(name)
        return self._clock() - self._in_flight[name][-1] if predicted is None else predicted
