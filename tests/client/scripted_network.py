"""A network that follows a script, in simulated time, for the operations of the client."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from safetensors.numpy import load

from pid_client.call import Call
from pid_client.effects import Emit, Operation, Receive, Send, Show, Wait

PNG = {"Content-Type": "image/png", "X-Seed": "7", "Server-Timing": "queue;dur=1.0, denoise;dur=250.0"}
LOST = httpx.RemoteProtocolError("peer closed connection")


@dataclass
class Reply:
    """A response: each chunk of its body arrives after `seconds`; an exception in place of a chunk is raised."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: dict(PNG))
    chunks: Sequence[bytes | httpx.RequestError] = (b"image",)
    seconds: float = 0.0


def problem(status: int, code: str, **headers: str) -> Reply:
    """Return an error of the server."""
    document = {"status": status, "code": code, "detail": f"Detail of {code}."}
    return Reply(status, {"Content-Type": "application/problem+json", **headers}, [json.dumps(document).encode()])


BUSY = problem(429, "queue-full", **{"Retry-After": "4"})
GONE = problem(503, "unavailable")


END = b"--frontier--\r\n"


def batch_reply(*parts: int | Reply, first: int = 0, end: bytes | httpx.RequestError = END) -> Reply:
    """Return a response with one part per image, which names its seed, or per problem; each is one chunk."""
    chunks = [
        image_part(part, index) if isinstance(part, int) else problem_part(part, index)
        for index, part in enumerate(parts, first)
    ]
    return Reply(200, {"Content-Type": "multipart/mixed; boundary=frontier"}, [*chunks, end])


def preview_reply(*parts: bytes, end: bytes | httpx.RequestError = END) -> Reply:
    """Return a response with previews; each part is one chunk."""
    return Reply(200, {"Content-Type": "multipart/x-mixed-replace; boundary=frontier"}, [*parts, end])


def image_part(seed: int, index: int = 0) -> bytes:
    return _part({"X-Index": str(index), **PNG, "X-Seed": str(seed)}, b"image")


def preview_part(step: int, index: int = 0) -> bytes:
    """Return the preview of one of two steps, each of which lasts 250 ms."""
    headers = {"X-Step": str(step), "X-Steps": "2", "X-Index": str(index), "X-Latency-Ms": str(250 * step)}
    return _part({"Content-Type": "image/jpeg", **headers}, b"preview")


def problem_part(reply: Reply, index: int = 0) -> bytes:
    (body,) = reply.chunks
    assert isinstance(body, bytes)
    return _part({"X-Index": str(index), **reply.headers, "X-Status": str(reply.status)}, body)


def _part(headers: dict[str, str], body: bytes) -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for name, value in {**headers, "Content-Length": str(len(body))}.items())
    return f"--frontier\r\n{lines}\r\n".encode() + body + b"\r\n"


def sent_latents(request: httpx.Request) -> np.ndarray:
    return load(request.content)["latent"]


class Network:
    """Replies to requests in turn, and records them."""

    def __init__(self, *replies: Reply | httpx.RequestError) -> None:
        self.now = 0.0
        self.sent: list[httpx.Request] = []
        self.waits: list[float] = []
        self._replies = iter(replies)
        self._http = httpx.Client(base_url="http://server")

    def call(self, deadline: float = 60.0, retry: bool = True) -> Call:
        """Return a call in the time of this network, whose jitter is always the largest possible."""
        return Call(deadline, retry=retry, request_id="id", clock=lambda: self.now, uniform=lambda low, high: high)

    def perform(self, operation: Operation[None]) -> list[Any]:
        """Perform an operation and return what it emits, or raise its error."""
        emitted: list[Any] = []
        reply, chunks = Reply(), iter(())
        result: Any = None
        failure: httpx.RequestError | None = None
        while True:
            try:
                effect = operation.send(result) if failure is None else operation.throw(failure)
            except StopIteration:
                return emitted
            result = failure = None
            match effect:
                case Emit(value):
                    emitted.append(value)
                case Show(preview, function):
                    function(preview)
                case Wait(seconds):
                    self.waits.append(seconds)
                    self.now += seconds
                case Send(method, path, arguments):
                    self.sent.append(self._http.build_request(method, path, **arguments))
                    item = next(self._replies)
                    if isinstance(item, httpx.RequestError):
                        item.request = self.sent[-1]
                        failure = item
                    else:
                        reply, chunks = item, iter(item.chunks)
                        result = httpx.Response(reply.status, headers=reply.headers, request=self.sent[-1])
                case Receive():
                    self.now += reply.seconds
                    result = next(chunks, None)
                    if isinstance(result, httpx.RequestError):
                        result.request = self.sent[-1]
                        result, failure = None, result
