"""docker/fetch_bundle.py against HTTP servers on the loopback interface."""

from __future__ import annotations

import contextlib
import io
import os
import ssl
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from docker.fetch_bundle import Source, fetch
from engines.bundle import open_bundle
from tests.operations.archive_server import FILES, Server, archive, link, redirect, running, sha256
from tests.operations.fetching import content, failing, fetching, program, run, source_of
from tests.server.certificates import make_certificate
from tests.waiting import until

TOKEN = "secret-token"  # noqa: S105


class TestFetch:
    @pytest.mark.parametrize("mode", ["w", "w:gz"])
    @pytest.mark.parametrize("prefix", ["", "./", "flux/", "./flux/"])
    def test_a_bundle_at_the_root_or_in_one_directory_is_unpacked(
        self, server: Server, tmp_path: Path, prefix: str, mode: str
    ):
        server.content = archive(prefix, mode)
        fetching(source_of(server), tmp_path / "new/flux")
        assert content(tmp_path / "new/flux") == FILES
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["flux"]

    def test_an_archive_made_as_documented_gives_a_bundle_that_opens(
        self, server: Server, tmp_path: Path, demo_bundle: Path
    ):
        made = tmp_path / "flux.tar"
        subprocess.run(["tar", "-C", demo_bundle.parent, "-cf", made, demo_bundle.name], check=True)  # noqa: S607
        server.content = made.read_bytes()
        folder = tmp_path / "bundles/flux"
        completed = run(server.url, sha256(server.content).upper(), folder)
        assert (completed.returncode, completed.stderr) == (0, "")
        assert open_bundle(folder).manifest == open_bundle(demo_bundle).manifest

    def test_a_bundle_of_the_same_archive_is_not_fetched_again(self, server: Server, tmp_path: Path):
        fetching(source_of(server), tmp_path / "flux")
        assert not fetch(source_of(server), tmp_path / "flux")
        assert len(server.requests) == 1

    def test_a_bundle_of_another_archive_is_replaced(self, server: Server, tmp_path: Path):
        fetching(source_of(server), tmp_path / "flux")
        server.content = archive(**{"flux/other.bin": b"new"})
        fetching(source_of(server), tmp_path / "flux")
        assert content(tmp_path / "flux") == {**FILES, "other.bin": b"new"}
        assert [path.name for path in tmp_path.iterdir()] == ["flux"]

    def test_a_failed_replacement_keeps_the_bundle(self, server: Server, tmp_path: Path):
        fetching(source_of(server), tmp_path / "flux")
        failing(Source(server.url, "0" * 64), tmp_path / "flux")
        assert content(tmp_path / "flux") == FILES

    def test_an_empty_directory_is_replaced_and_other_files_are_not(self, server: Server, tmp_path: Path):
        folder = tmp_path / "flux"
        folder.mkdir()
        fetching(source_of(server), folder)
        (tmp_path / "other").mkdir()
        (tmp_path / "other/notes").write_text("keep")
        (tmp_path / "file").touch()
        (tmp_path / "link").symlink_to("other")
        for name in ("other", "file", "link"):
            assert not failing(source_of(server), tmp_path / name).retryable
        assert len(server.requests) == 1

    def test_processes_that_fetch_to_the_same_directory_wait_for_each_other(self, server: Server, tmp_path: Path):
        release = threading.Event()
        server.scripted = [lambda request: (release.wait(60), server.respond(request))[1]]
        arguments = (server.url, sha256(server.content), tmp_path / "flux")
        with contextlib.ExitStack() as stack:
            processes = [stack.enter_context(subprocess.Popen(program(*arguments), env={})) for _ in range(3)]
            until(lambda: bool(server.requests), "the first request")
            release.set()
            assert [process.wait(60) for process in processes] == [0, 0, 0]
        assert len(server.requests) == 1
        assert content(tmp_path / "flux") == FILES


class TestRejections:
    def test_a_wrong_hash_is_reported_without_a_second_attempt(self, server: Server, tmp_path: Path):
        completed = run(server.url, "0" * 64, tmp_path / "flux")
        assert completed.returncode == 2
        assert completed.stderr.count("\n") == 1
        assert sha256(server.content) in completed.stderr
        assert len(server.requests) == 1
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        "member",
        [
            tarfile.TarInfo("../escaped.txt"),
            tarfile.TarInfo("/escaped.txt"),
            tarfile.TarInfo("flux/../escaped.txt"),
            tarfile.TarInfo("flux/nested/file.bin"),
            tarfile.TarInfo("other/file.bin"),
            tarfile.TarInfo("flux/.hidden"),
            tarfile.TarInfo("flux/manifest.json"),
            link("flux/passwd", "/etc/passwd", tarfile.SYMTYPE),
            link("flux/weights", "weights.safetensors", tarfile.SYMTYPE),
            link("flux/hard", "../../etc/passwd", tarfile.LNKTYPE),
            link("flux/device", "", tarfile.CHRTYPE),
            link("flux/pipe", "", tarfile.FIFOTYPE),
        ],
        ids=lambda member: member.name,
    )
    def test_members_that_no_bundle_has_are_rejected(self, server: Server, tmp_path: Path, member: tarfile.TarInfo):
        server.content = archive(member=member)
        (tmp_path / "inner").mkdir()
        error = failing(source_of(server), tmp_path / "inner/flux")
        assert not error.retryable
        assert member.name in str(error)

    def test_files_that_tar_adds_on_macos_are_rejected_with_a_hint(self, server: Server, tmp_path: Path):
        server.content = archive(member=tarfile.TarInfo("flux/._manifest.json"))
        assert "COPYFILE_DISABLE=1" in str(failing(source_of(server), tmp_path / "flux"))

    def test_a_damaged_marker_is_not_a_fetched_bundle(self, server: Server, tmp_path: Path):
        (tmp_path / "flux").mkdir()
        (tmp_path / "flux/.archive-sha256").write_bytes(b"\xff")
        assert "were not fetched" in str(failing(source_of(server), tmp_path / "flux"))

    @pytest.mark.parametrize("body", [b"", b"PK\x03\x04" * 1000, archive()[:5000], archive(mode="w:gz")[:500]])
    def test_what_is_not_an_archive_is_rejected(self, server: Server, tmp_path: Path, body: bytes):
        server.content = body
        assert "not a valid tar file" in str(failing(source_of(server), tmp_path / "flux"))

    def test_an_archive_without_a_manifest_is_rejected(self, server: Server, tmp_path: Path):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("weights.safetensors"))
        server.content = buffer.getvalue()
        assert "manifest.json" in str(failing(source_of(server), tmp_path / "flux"))

    def test_an_archive_that_does_not_fit_on_the_disk_is_rejected_before_its_body(self, server: Server, tmp_path: Path):
        error = failing(source_of(server), tmp_path / "flux", free_bytes=lambda _: 1000)
        assert "free space" in str(error)

    def test_contents_that_do_not_fit_on_the_disk_are_rejected(self, server: Server, tmp_path: Path):
        server.content = archive(mode="w:gz", **{"flux/zeros.bin": bytes(1 << 20)})
        free = (64 << 20) + (1 << 19)
        assert "zeros.bin" in str(failing(source_of(server), tmp_path / "flux", free_bytes=lambda _: free))

    @pytest.mark.parametrize(("status", "hint"), [(401, "PID_FETCH_TOKEN"), (403, "PID_FETCH_TOKEN"), (404, "404")])
    def test_rejections_by_the_server_are_not_retried(self, server: Server, tmp_path: Path, status: int, hint: str):
        server.scripted = [lambda request: request.send_error(status)]
        signed = Source(f"{server.url}?signature=secret", sha256(server.content))
        error = failing(signed, tmp_path / "flux")
        assert hint in str(error)
        assert "secret" not in str(error)
        assert len(server.requests) == 1

    def test_a_directory_that_is_not_writable_is_reported(self, server: Server, tmp_path: Path):
        if os.geteuid() == 0:
            folder = Path("/proc/flux")  # where root cannot write either
        else:
            tmp_path.chmod(0o500)
            folder = tmp_path / "flux"
        completed = run(server.url, sha256(server.content), folder)
        assert completed.returncode == 2
        assert completed.stderr.count("\n") == 1
        assert not server.requests

    @pytest.mark.parametrize(
        "arguments",
        [
            [],
            ["https://example.com/flux.tar", "0" * 64],
            ["https://example.com/flux.tar", "0" * 63, "flux"],
            ["file:///etc/passwd", "0" * 64, "flux"],
            ["ftp://example.com/flux.tar", "0" * 64, "flux"],
            ["https://", "0" * 64, "flux"],
            ["https://user:password@example.com/flux.tar", "0" * 64, "flux"],
            ["https://example.com/two words.tar", "0" * 64, "flux"],
            ["https://example.com/flux.tar", "0" * 64, "/"],
        ],
    )
    def test_invalid_arguments_end_with_status_2(self, arguments: list[str]):
        completed = run(*arguments)
        assert completed.returncode == 2
        assert completed.stderr.count("\n") == 1
        assert "password@" not in completed.stderr


class TestToken:
    @pytest.fixture
    def secure(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Server, Server]]:
        """Two servers with TLS, whose certificate is trusted."""
        (tmp_path / "tls").mkdir()
        made = make_certificate(tmp_path / "tls")
        monkeypatch.setenv("SSL_CERT_FILE", str(made.certificate))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(made.certificate, made.key)
        with contextlib.ExitStack() as stack:
            servers = [Server(archive(), "https") for _ in range(2)]
            for server in servers:
                server.http.socket = context.wrap_socket(server.http.socket, server_side=True)
                stack.enter_context(running(server))
            yield servers[0], servers[1]

    def test_a_redirect_to_another_host_does_not_get_the_token(self, secure: tuple[Server, Server], tmp_path: Path):
        first, second = secure
        first.scripted = [redirect(f"{first.url}?again"), redirect(second.url)]
        fetching(Source(first.url, sha256(first.content), TOKEN), tmp_path / "flux")
        assert [request.get("Authorization") for request in first.requests] == [f"Bearer {TOKEN}"] * 2
        assert [request.get("Authorization") for request in second.requests] == [None]

    def test_a_redirect_to_http_is_rejected(self, secure: tuple[Server, Server], server: Server, tmp_path: Path):
        secure[0].scripted = [redirect(server.url)]
        failing(source_of(secure[0]), tmp_path / "flux")
        assert not server.requests

    def test_an_untrusted_certificate_is_rejected(
        self, secure: tuple[Server, Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.delenv("SSL_CERT_FILE")
        error = failing(source_of(secure[0]), tmp_path / "flux")
        assert "certificate verify failed" in str(error)
        assert not secure[0].requests

    @pytest.mark.parametrize("token", [TOKEN, "two\nlines"])
    def test_an_unusable_token_is_never_sent_or_printed(self, server: Server, tmp_path: Path, token: str):
        url = server.url if token == TOKEN else server.url.replace("http:", "https:")
        completed = run(url, "0" * 64, tmp_path / "flux", PID_FETCH_TOKEN=token)
        assert completed.returncode == 2
        assert "PID_FETCH_TOKEN" in completed.stderr
        assert token.splitlines()[-1] not in completed.stdout + completed.stderr
        assert not server.requests
