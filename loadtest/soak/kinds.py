"""The kinds of requests of the soak test, good and bad, as bytes."""

from __future__ import annotations

import base64
import enum
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from safetensors.numpy import save

from loadtest.keys import authorization

GOOD, BAD = "good", "bad"  # names of the API keys; separate, as the limits per key should not affect good requests
CLOSED = "closed"  # result of a connection that the server closed without a response
REJECTED = "429"  # may be the result of any request, if the machine is busy


class Behaviour(enum.Enum):
    """How the client of a request behaves."""

    READ = enum.auto()  # sends the request and reads the response
    WAIT = enum.auto()  # sends the request, perhaps unfinished, and waits until the server closes the connection
    DRIP = enum.auto()  # like WAIT, but keep sending bytes slowly
    ABORT = enum.auto()  # resets the connection as soon as the request was sent
    ABORT_STREAMING = enum.auto()  # resets the connection during the response
    UNREAD = enum.auto()  # never reads


@dataclass(frozen=True)
class Kind:
    """One kind of request."""

    name: str
    share: float  # of all requests, relative to the other kinds
    data: bytes
    expected: tuple[str, ...] = ()  # statuses besides REJECTED, or CLOSED; empty if the client does not wait for any
    behaviour: Behaviour = Behaviour.READ


def make_kinds(shape: tuple[int, ...], keys: Mapping[str, str], max_body_bytes: int) -> tuple[Kind, ...]:
    """Return all kinds of requests for a decoder.

    Args:
        shape: A supported latent, [channels, height, width].
        keys: The API keys, called `GOOD` and `BAD`.
        max_body_bytes: The server's limit.
    """
    latent = np.random.default_rng(0).standard_normal(shape).astype(np.float16)
    good, bad = (_Requests(authorization(keys, name)) for name in (GOOD, BAD))
    return (
        *_good_kinds(latent, good),
        *_bad_bodies(latent, bad),
        *_bad_heads(latent, bad, max_body_bytes),
        *_bad_framing(bad),
        *_bad_clients(latent, bad),
    )


class _Requests:
    """Serialises requests that carry one API key."""

    def __init__(self, authorization: Mapping[str, str]) -> None:
        self._authorization = authorization

    def head(self, method: str, target: str, *lines: str) -> bytes:
        """Return a head with the API key and further header lines."""
        fields = ("Host: soak", *(f"{name}: {value}" for name, value in self._authorization.items()), *lines)
        return "\r\n".join((f"{method} {target} HTTP/1.1", *fields, "\r\n")).encode("latin-1")

    def post(self, body: bytes, media_type: str = "application/x-npy", query: str = "seed=1", *lines: str) -> bytes:
        """Return a complete request for /decode."""
        lines = (f"Content-Type: {media_type}", f"Content-Length: {len(body)}", *lines)
        return self.head("POST", f"/decode?{query}", *lines) + body

    def chunked(self, *chunks: bytes, coding: str = "chunked", end: bytes = b"0\r\n\r\n") -> bytes:
        """Return a request for /decode with a chunked body."""
        head = self.head("POST", "/decode?seed=1", "Content-Type: application/x-npy", f"Transfer-Encoding: {coding}")
        return head + b"".join(chunks) + end


def _good_kinds(latent: np.ndarray, requests: _Requests) -> tuple[Kind, ...]:
    npy, raw = _npy(latent), latent.tobytes()
    tensor = {"data": base64.b64encode(raw).decode(), "shape": latent.shape, "dtype": "float16"}
    form = b'--B\r\nContent-Disposition: form-data; name="latent"; filename="a.npy"\r\n\r\n' + npy + b"\r\n--B--\r\n"
    shape = ",".join(map(str, latent.shape))
    half = len(npy) // 2
    post, chunked = requests.post, requests.chunked(_chunk(npy[:half]), _chunk(npy[half:]))
    return (
        Kind("good: NumPy", 2, post(npy), ("200",)),
        Kind("good: safetensors", 1, post(save({"latent": latent}), "application/x-safetensors"), ("200",)),
        Kind("good: raw", 1, post(raw, "application/octet-stream", f"shape={shape}&dtype=float16"), ("200",)),
        Kind("good: JSON", 1, post(json.dumps({"latent": tensor}).encode(), "application/json"), ("200",)),
        Kind("good: form", 0.5, post(form, "multipart/form-data; boundary=B"), ("200",)),
        Kind("good: chunked", 0.5, chunked, ("200",)),
        Kind("good: offer of HTTP/2", 0.5, post(npy, "application/x-npy", "seed=1", *_H2C), ("200",)),
        Kind("good: metrics", 1, requests.head("GET", "/metrics"), ("200",)),
        Kind("good: readiness", 6, requests.head("GET", "/health/ready"), ("200",)),
        Kind("good: info", 2, requests.head("GET", "/info"), ("200",)),
    )


_H2C = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA")


def _bad_bodies(latent: np.ndarray, requests: _Requests) -> tuple[Kind, ...]:
    npy, tensors, post = _npy(latent), save({"latent": latent}), requests.post
    wrong, malformed = ("400", "422"), ("400",)
    safetensors, form = "application/x-safetensors", "multipart/form-data; boundary=B"
    return (
        Kind("bad body: empty", 4, post(b""), malformed),
        Kind("bad body: random bytes", 4, post(np.random.default_rng(1).bytes(1000)), malformed),
        Kind("bad body: truncated NumPy", 2, post(npy[:5000]), malformed),
        Kind("bad body: NumPy header", 4, post(b"\x93NUMPY\x01\x00\x00\x02" + b"(" * 512), malformed),
        Kind("bad body: truncated safetensors", 2, post(tensors[:5000], safetensors), malformed),
        Kind("bad body: safetensors header", 4, post(b"\xff" * 8 + b"{", safetensors), malformed),
        Kind("bad body: JSON", 4, post(b'{"latent": [1, 2', "application/json"), malformed),
        Kind("bad body: nested JSON", 2, post(b"[" * 10_000, "application/json"), malformed),
        Kind("bad body: form", 4, post(b"--B\r\n\r\n", form), malformed),
        Kind("bad body: many parts", 1, post(b"--B\r\n\r\n\r\n" * 1000 + b"--B--", form), malformed),
        Kind("bad body: shape", 3, post(_npy(latent[:, :3, :3])), wrong),
        Kind("bad body: not finite", 1, post(_npy(np.full_like(latent, np.nan))), wrong),
        Kind("bad body: pickle", 4, post(b"\x80\x04\x95" + bytes(100), "application/x-pickle"), ("415",)),
    )


def _bad_heads(latent: np.ndarray, requests: _Requests, max_body_bytes: int) -> tuple[Kind, ...]:
    npy, post, head = _npy(latent), requests.post, requests.head
    anonymous, unknown = _Requests({}), _Requests({"Authorization": "Bearer " + "0" * 32})
    huge = head("POST", "/decode", "Content-Type: application/x-npy", "Content-Length: 1000000000000")
    return (
        Kind("bad head: no key", 6, anonymous.post(b"x"), ("401",)),
        Kind("bad head: no key, long body", 1, anonymous.post(npy), ("401",)),
        Kind("bad head: unknown key", 6, unknown.post(b"x"), ("401",)),
        Kind("bad head: unknown option", 4, post(b"x", query="colour=1"), ("400", "422")),
        Kind("bad head: option out of range", 1, post(npy, query="steps=9"), ("422",)),
        Kind("bad head: Accept", 1, post(npy, "application/x-npy", "seed=1", "Accept: text/html"), ("406",)),
        Kind("bad head: Content-Encoding", 4, post(b"x", "application/x-npy", "", "Content-Encoding: gzip"), ("415",)),
        Kind("bad head: path", 4, head("GET", "/" + "a" * 100), ("404",)),
        Kind("bad head: method", 4, head("DELETE", "/decode"), ("405",)),
        Kind("bad head: many headers", 3, head("GET", "/info", *(f"X-{i}: y" for i in range(100))), ("431",)),
        Kind("bad head: long header", 3, head("GET", "/info", "X: " + "y" * 40_000), ("431",)),
        Kind("oversized: declared", 3, huge, ("413",)),
        Kind("oversized: sent", 0.2, post(bytes(max_body_bytes + 1)), ("413", CLOSED)),
    )


def _bad_framing(requests: _Requests) -> tuple[Kind, ...]:
    chunked, body = requests.chunked, _chunk(bytes(100))
    lengths = requests.head("POST", "/decode", "Content-Length: 5", "Content-Length: 6")
    both = requests.head("POST", "/decode", "Content-Length: 5", "Transfer-Encoding: chunked")
    rejected, checked = ("400", "431", "413"), ("400", "401", "413", "415", "422", "431")
    trailers = b"0\r\n" + b"".join(b"X-%d: y\r\n" % number for number in range(200)) + b"\r\n"
    # The server must close the connection after the response, at the latest when it is idle.
    wait = Behaviour.WAIT
    return (
        Kind("framing: TLS", 3, bytes.fromhex("16030100a5010000a10303") + bytes(100), ("400", CLOSED), wait),
        Kind("framing: HTTP/2", 2, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", ("400", "505", CLOSED), wait),
        Kind("framing: no colon", 2, requests.head("GET", "/info", "nonsense"), ("400",), wait),
        Kind("framing: two lengths", 2, lengths + b"12345", ("400",), wait),
        Kind("framing: length and chunks", 2, both + body + b"0\r\n\r\n", ("400",), wait),
        Kind("framing: unknown coding", 2, chunked(body, coding="xchunked"), ("400", "501"), wait),
        Kind("framing: chunk size", 2, chunked(b"-1\r\nx\r\n"), ("400",), wait),
        Kind("framing: huge chunk size", 2, chunked(b"f" * 17 + b"\r\nx\r\n"), ("400", "413"), wait),
        Kind("framing: no end of chunk", 2, chunked(b"5\r\n12345678"), ("400",), wait),
        Kind("framing: chunk extension", 1, chunked(b"1;" + b"a" * 100_000 + b"\r\nx\r\n"), checked, wait),
        Kind("framing: tiny chunks", 1, chunked(*[_chunk(b"x")] * 500), checked, wait),
        Kind("framing: trailers", 1, chunked(body, end=trailers), rejected, wait),
        Kind("framing: pipelined", 2, requests.head("GET", "/health/ready") * 5, ("200",), wait),
    )


def _bad_clients(latent: np.ndarray, requests: _Requests) -> tuple[Kind, ...]:
    npy = _npy(latent)
    request, begin = requests.post(npy), requests.head("GET", "/info")[:-2]
    timed_out = ("408", CLOSED)
    return (
        Kind("leaving: nothing sent", 2, b"", (), Behaviour.ABORT),
        Kind("leaving: half a body", 3, request[: len(request) // 2], (), Behaviour.ABORT),
        Kind("leaving: request sent", 3, request, (), Behaviour.ABORT),
        Kind("leaving: during the response", 2, request, (), Behaviour.ABORT_STREAMING),
        Kind("slow: no head", 1, b"", timed_out, Behaviour.WAIT),
        Kind("slow: head byte by byte", 1, begin, timed_out, Behaviour.DRIP),
        Kind("slow: half a body", 0.5, request[: len(request) // 2], timed_out, Behaviour.WAIT),
        Kind("slow: body byte by byte", 0.5, request[: len(request) // 2], timed_out, Behaviour.DRIP),
        Kind("slow: open chunk", 0.5, requests.chunked(b"ffff\r\nx", end=b""), timed_out, Behaviour.WAIT),
        Kind("slow: body after 401", 0.5, _Requests({}).post(npy)[:-1], ("401", CLOSED), Behaviour.WAIT),
        Kind("unread response", 0.5, request, (), Behaviour.UNREAD),
    )


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)
