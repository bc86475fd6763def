"""Effects: what an operation lets the client do, which differs between the synchronous and the asynchronous client."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from pid_client.image import Preview

T = TypeVar("T")


@dataclass(frozen=True)
class Send:
    """Send a request; the result is the response, whose body is not read yet.

    Failures are thrown into the operation as `httpx.RequestError`, as are those of `Receive`.
    """

    method: str
    path: str  # relative to the address of the server
    arguments: dict[str, Any]  # of `httpx.Client.build_request`


@dataclass(frozen=True)
class Receive:
    """Receive more of the response's body; the result is None at its end."""


@dataclass(frozen=True)
class Wait:
    """Wait this number of seconds."""

    seconds: float


@dataclass(frozen=True)
class Emit:
    """Hand a value to the caller."""

    value: Any


@dataclass(frozen=True)
class Show:
    """Pass a preview to a function of the caller. If it raises an error, the operation ends with that error."""

    preview: Preview
    function: Callable[[Preview], Any]  # asynchronous in the asynchronous client


Effect: TypeAlias = Send | Receive | Wait | Emit | Show
Operation: TypeAlias = Generator[Effect, Any, T]
