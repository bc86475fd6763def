"""HTTP server with an archive of a bundle, whose responses can be scripted, and such archives."""

from __future__ import annotations

import contextlib
import hashlib
import io
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FILES = {"manifest.json": b"{}", "weights.safetensors": bytes(range(256)) * 1200}

Respond = Callable[[BaseHTTPRequestHandler], None]


class Server:
    """HTTP server that serves `content`, or calls the scripted responses first, one per request."""

    def __init__(self, content: bytes, scheme: str = "http") -> None:
        self.content = content
        self.ranges = True  # whether it supports the header Range
        self.scripted: list[Respond] = []
        self.requests: list[dict[str, str]] = []  # headers
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.requests.append(dict(self.headers))
                with contextlib.suppress(ConnectionError):
                    (server.scripted.pop(0) if server.scripted else server.respond)(self)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"{scheme}://127.0.0.1:{self.http.server_port}/flux.tar"

    def respond(self, request: BaseHTTPRequestHandler, end: int | None = None, shift: int = 0) -> None:
        """Send the requested part; close the connection after byte `end`. A range begins `shift` bytes too late."""
        asked = request.headers.get("Range") if self.ranges else None
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        if start and start >= len(self.content):
            request.send_error(416)
            return
        request.send_response(206 if asked else 200)
        if asked:
            last = len(self.content) - 1
            request.send_header("Content-Range", f"bytes {start + shift}-{last}/{len(self.content)}")
        request.send_header("Content-Length", str(len(self.content) - start))
        request.end_headers()
        request.wfile.write(self.content[start:end])


@contextlib.contextmanager
def running(server: Server) -> Iterator[Server]:
    thread = threading.Thread(target=server.http.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        thread.join()
        server.http.server_close()


def archive(prefix: str = "flux/", mode: str = "w", **members: bytes | tarfile.TarInfo) -> bytes:
    """Return a tar archive of FILES and `members`, in the directory `prefix`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
        for name, content in {**{prefix + name: content for name, content in FILES.items()}, **members}.items():
            member = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            data = b"" if isinstance(content, tarfile.TarInfo) else content
            if member.isreg():
                member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def redirect(url: str) -> Respond:
    def respond(request: BaseHTTPRequestHandler) -> None:
        request.send_response(302)
        request.send_header("Location", url)
        request.send_header("Content-Length", "0")
        request.end_headers()

    return respond
