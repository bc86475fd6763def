"""docker/fetch_bundle.py against HTTP servers that interrupt downloads or send invalid responses."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from docker import fetch_bundle
from docker.fetch_bundle import ATTEMPTS, Source
from tests.operations.archive_server import FILES, Server, archive, redirect, sha256
from tests.operations.fetching import content, failing, fetching, program, source_of
from tests.waiting import until


class TestInterruptions:
    @pytest.mark.parametrize("ranges", [True, False])
    def test_a_truncated_body_is_continued_if_the_server_can_do_that(
        self, server: Server, tmp_path: Path, ranges: bool
    ):
        server.ranges = ranges
        server.scripted = [lambda request: server.respond(request, end=100_000)]
        assert fetching(source_of(server), tmp_path / "flux") == [1]
        assert content(tmp_path / "flux") == FILES
        assert server.requests[1]["Range"] == "bytes=100000-"

    def test_failures_of_the_server_are_retried_with_growing_pauses(self, server: Server, tmp_path: Path):
        server.scripted = [lambda request, status=status: request.send_error(status) for status in (503, 429, 500)]
        assert fetching(source_of(server), tmp_path / "flux") == [1, 2, 4]

    def test_another_range_than_requested_starts_the_download_again(self, server: Server, tmp_path: Path):
        server.scripted = [
            lambda request: server.respond(request, end=1000),
            lambda request: server.respond(request, shift=1),
        ]
        fetching(source_of(server), tmp_path / "flux")
        assert content(tmp_path / "flux") == FILES
        assert "Range" not in server.requests[2]

    def test_a_part_that_is_not_from_the_archive_starts_the_download_again(self, server: Server, tmp_path: Path):
        right = server.content
        for part in (b"x" * 1000, b"x" * (len(right) + 1)):
            folder = tmp_path / str(len(part))
            (tmp_path / f".{folder.name}.fetch").mkdir()
            (tmp_path / f".{folder.name}.fetch" / sha256(right)).write_bytes(part)
            fetching(source_of(server), folder)
            assert content(folder) == FILES
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(("1000", str(len(right) + 1)))

    def test_only_attempts_without_progress_are_limited(self, server: Server, tmp_path: Path):
        size = len(server.content) // (2 * ATTEMPTS)
        server.scripted = [lambda request, end=end: server.respond(request, end) for end in range(size, 10**9, size)]
        pauses = fetching(source_of(server), tmp_path / "flux")
        assert len(pauses) > ATTEMPTS
        assert set(pauses) == {1}
        assert content(tmp_path / "flux") == FILES

    def test_the_run_after_too_many_attempts_without_progress_continues(self, server: Server, tmp_path: Path):
        server.scripted = [lambda request: server.respond(request, end=1000)] * ATTEMPTS
        assert failing(source_of(server), tmp_path / "flux").retryable
        assert len(server.requests) == ATTEMPTS
        assert fetching(source_of(server), tmp_path / "flux") == []
        assert server.requests[-1]["Range"] == "bytes=1000-"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["flux"]

    def test_an_error_of_the_server_ends_with_status_1(
        self, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(fetch_bundle, "ATTEMPTS", 1)
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        server.scripted = [lambda request: request.send_error(503)]
        assert fetch_bundle.main([server.url, sha256(server.content), str(tmp_path / "flux")]) == 1

    def test_a_truncated_body_without_a_length_is_continued(self, server: Server, tmp_path: Path):
        server.scripted = [lambda request: raw(request, b"HTTP/1.0 200 OK\r\n\r\n" + server.content[:1000])]
        assert fetching(source_of(server), tmp_path / "flux") == [1]
        assert server.requests[1]["Range"] == "bytes=1000-"
        assert content(tmp_path / "flux") == FILES

    def test_a_body_without_a_length_that_always_has_the_wrong_hash_may_be_incomplete(
        self, server: Server, tmp_path: Path
    ):
        server.scripted = [lambda request: raw(request, b"HTTP/1.0 200 OK\r\n\r\n" + server.content[:1000])] * 20
        error = failing(source_of(server), tmp_path / "flux")
        assert error.retryable
        assert "may be incomplete" in str(error)

    def test_an_incomplete_chunk_is_kept(self, server: Server, tmp_path: Path):
        start = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3e8\r\n"
        server.scripted = [lambda request: raw(request, start + server.content[:1000])]
        assert fetching(source_of(server), tmp_path / "flux") == [1]
        assert server.requests[1]["Range"] == "bytes=1000-"

    def test_a_run_after_sigterm_continues_the_download(self, server: Server, tmp_path: Path):
        release = threading.Event()

        def stall(request: BaseHTTPRequestHandler) -> None:
            server.respond(request, end=3 << 20)
            release.wait(60)

        server.content, server.scripted = archive(**{"flux/large.bin": os.urandom(4 << 20)}), [stall]
        source, folder = source_of(server), tmp_path / "flux"
        part = tmp_path / ".flux.fetch" / source.sha256
        with subprocess.Popen(program(source.url, source.sha256, folder), env={}) as process:
            until(lambda: part.exists() and part.stat().st_size > 0, "the first part")
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 128 + signal.SIGTERM
        release.set()
        size = part.stat().st_size
        (tmp_path / ".flux.fetch" / ("0" * 64)).write_text("part of another archive")
        assert fetching(source, folder) == []
        assert server.requests[1]["Range"] == f"bytes={size}-"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["flux"]


class TestInvalidResponses:
    @pytest.mark.parametrize(
        "location", ["https://[x/y", "http://a..b/flux.tar", "http://127.0.0.1:port/flux.tar", f"http://{'a' * 64}/"]
    )
    def test_a_redirect_to_an_invalid_address_is_rejected(self, server: Server, tmp_path: Path, location: str):
        server.scripted = [redirect(location)]
        error = failing(source_of(server), tmp_path / "flux")
        assert "redirects to, is invalid" in str(error)
        assert not error.retryable

    def test_an_invalid_host_in_the_url_is_rejected(self, tmp_path: Path):
        assert "URL" in str(failing(Source("http://a..b/flux.tar", "0" * 64), tmp_path / "flux"))

    @pytest.mark.parametrize(
        "response",
        [
            b"",
            b"SSH-2.0\r\n",
            b"HTTP/1.1 ok\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\nx",
            b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nx",
            b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\nx",
            b"HTTP/1.1 206 Partial\r\nContent-Range: \xff\r\nContent-Length: 1\r\n\r\nx",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nx",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nsize\r\nx",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nx",
            b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 70_000 + b"\r\n\r\n",
        ],
        ids=range(11),
    )
    def test_a_response_that_is_not_valid_http_is_retried(self, server: Server, tmp_path: Path, response: bytes):
        server.scripted = [lambda request: raw(request, response)]
        assert fetching(source_of(server), tmp_path / "flux")[0] == 1
        assert content(tmp_path / "flux") == FILES

    def test_a_redirect_does_not_reveal_its_address(self, server: Server, tmp_path: Path):
        server.scripted = [redirect("http://user:secret@127.0.0.1/flux.tar?signature=secret")]
        assert "secret" not in str(failing(source_of(server), tmp_path / "flux"))


def raw(request: BaseHTTPRequestHandler, response: bytes) -> None:
    """Send a response, of which the status line and the headers are a part, and close the connection."""
    request.wfile.write(response)
    request.close_connection = True
