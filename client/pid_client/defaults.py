"""Arguments of the constructors and of calls, which both clients share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from pid_client.call import Call
from pid_client.requests import DecodeRequest, Options
from pid_client.version import __version__

READY_SECONDS = 5.0  # limit for a readiness check


@dataclass(frozen=True)
class Defaults:
    """Settings of calls that have none of their own.

    Raises when constructed:
        ValueError: the deadline is not positive.
    """

    deadline: float  # seconds
    retry: bool

    def __post_init__(self) -> None:
        self.call()

    def call(self, deadline: float | None = None, request_id: str | None = None) -> Call:
        """Begin a call.

        Raises:
            ValueError: the deadline is not positive.
        """
        return Call(self.deadline if deadline is None else deadline, retry=self.retry, request_id=request_id)

    def batch(self, latents: Any, options: Options) -> tuple[Call, DecodeRequest]:
        """Begin a call that decodes a batch. Raises TypeError or ValueError as `DecodeRequest.read`."""
        call = self.call(options.get("deadline"), options.get("request_id"))
        return call, DecodeRequest.read(latents, **options)

    def single(self, latent: Any, options: Options) -> tuple[Call, DecodeRequest]:
        """Begin a call that decodes one latent.

        Raises:
            TypeError: as `DecodeRequest.read`.
            ValueError: as `DecodeRequest.read`, and for more or less than one latent.
        """
        call, request = self.batch(latent, options)
        if request.batch not in (None, 1):
            raise ValueError(f"This is a batch of {request.batch} latents; use decode_batch for it.")
        return call, request


def http_arguments(url: str, api_key: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of an HTTP client for a server.

    Raises:
        TypeError: an option is not supported.
        ValueError: the URL or the API key is invalid.
    """
    for name in ("timeout", "base_url"):
        if name in options:
            raise TypeError(f"The argument {name} is not supported; the client sets it from its URL and deadline.")
    try:
        address = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"The URL of the server is invalid: {error}.") from error
    if address.scheme not in ("http", "https") or not address.host:
        raise ValueError("The URL of the server is invalid: it must begin with http:// or https:// and a host.")
    if address.query or address.fragment:
        raise ValueError("The URL of the server must have neither a query nor a fragment.")
    # Images are compressed already.
    headers = httpx.Headers({"User-Agent": f"pid-decode-client/{__version__}", "Accept-Encoding": "identity"})
    if api_key is not None:
        if not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key != ""):
            raise ValueError(
                "The API key is empty or contains characters that HTTP does not allow, such as a line break."
            )
        headers["Authorization"] = f"Bearer {api_key}"
    headers.update(options.get("headers"))
    # Waiting for a connection would hide load from the server's admission control, and delay its 429.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
    return {"limits": limits, **options, "base_url": address, "headers": headers}
