"""API keys: `Authorization: Bearer KEY`, known from a file of `name:key` lines that is read again when it changes."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from engines.errors import ConfigError, PidError
from server.errors import KeyBusyError, UnauthorizedError
from server.http.context import refusal
from server.metrics import Metrics

log = logging.getLogger(__name__)

PUBLIC_PATHS = frozenset({"/health/live", "/health/ready", "/metrics"})  # for probes and scrapers
MIN_KEY = 16  # characters
_LOOK_SECONDS = 1.0  # between looks at the file


class KeyFile:
    """The keys in a file, one `name:key` a line; `#` begins a comment. Keys are kept as hashes only."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises ConfigError if the file cannot be read or holds no keys."""
        self._path, self._clock = path, clock
        self._stamp = self._stat()
        self._looked = clock()
        self._names = read_keys(path)

    def name_of(self, key: str) -> str | None:
        """Who has `key`; in a time that does not tell how much of it was right."""
        self._refresh()
        digest, found = _digest(key), None
        for known, name in self._names.items():
            if hmac.compare_digest(known, digest):
                found = name
        return found

    def _refresh(self) -> None:
        if self._clock() - self._looked < _LOOK_SECONDS:
            return
        self._looked = self._clock()
        try:
            stamp = self._stat()
            if stamp != self._stamp:
                self._names, self._stamp = read_keys(self._path), stamp
                log.info("%d API keys read from %s", len(self._names), self._path)
        except ConfigError as error:
            log.error("the API keys stay as they were: %s", error)

    def _stat(self) -> tuple[int, int, int]:
        try:
            status = os.stat(self._path)
        except OSError as error:
            raise ConfigError(f"The file of API keys {self._path} cannot be read: {error.strerror}.") from None
        return status.st_mtime_ns, status.st_size, status.st_ino


def read_keys(path: Path) -> dict[bytes, str]:
    """Names by hash of their keys. Raises ConfigError, which never quotes a key."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"The file of API keys {path} cannot be read.") from None
    names: dict[bytes, str] = {}
    for number, line in enumerate(lines, 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        name, _, key = (part.strip() for part in line.partition(":"))
        if not name or len(key) < MIN_KEY or not key.isascii() or name in names.values() or _digest(key) in names:
            rule = f"write name:key, each name and key once, a key of at least {MIN_KEY} ASCII characters"
            raise ConfigError(f"Line {number} of {path} is no API key; {rule}.")
        names[_digest(key)] = name
    if not names:
        raise ConfigError(f"The file of API keys {path} holds none; write one name:key a line.")
    return names


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class ApiKeyMiddleware:
    """Lets requests with a known key through, each key up to `in_flight` at once, and everybody to `PUBLIC_PATHS`."""

    def __init__(self, app: ASGIApp, keys: KeyFile, in_flight: int, metrics: Metrics) -> None:
        self._app, self._keys, self._limit, self._metrics = app, keys, in_flight, metrics
        self._in_flight: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PUBLIC_PATHS:
            await self._app(scope, receive, send)
            return
        exchange = scope["state"]["context"]
        try:
            name = self._authorise(Headers(scope=scope).get("authorization", ""))
        except PidError as error:
            await refusal(error, exchange, self._metrics)(scope, receive, send)
            return
        exchange.fields["key"] = name
        self._in_flight[name] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._in_flight[name] -= 1

    def _authorise(self, header: str) -> str:
        scheme, _, key = header.partition(" ")
        name = self._keys.name_of(key.strip()) if scheme.lower() == "bearer" else None
        if name is None:
            raise UnauthorizedError("This server wants an API key; send it as Authorization: Bearer KEY.")
        if self._in_flight[name] >= self._limit:
            raise KeyBusyError(f"The key {name} has {self._limit} requests in flight, its limit; wait for one to end.")
        return name
