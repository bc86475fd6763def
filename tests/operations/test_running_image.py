"""The CPU image in real containers, with the restrictions of Kubernetes and OpenShift."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from safetensors.numpy import save

from tests.operations.podman import CONFINED, PORT, TMP, Container, Podman
from tests.programs import run
from tests.waiting import responds, until

pytestmark = pytest.mark.operate

BODY = save({"latent": np.zeros((16, 16, 16), np.float32)})
EIGHT = save({"latent": np.zeros((8, 16, 16, 16), np.float32)})
BUNDLE = ("--env", "PID_BUNDLE=/bundles/demo")
FORMATS = {"png": b"\x89PNG", "jpeg": b"\xff\xd8\xff", "webp": b"RIFF", "avif": b"ftypavif", "jxl": b"\xff\x0a"}
IDLE = 1020  # connections


@pytest.fixture(scope="module")
def server(podman: Podman, volumes: tuple[str, ...]) -> Iterator[Container]:
    with podman.container(*CONFINED, *volumes, *BUNDLE) as container:
        container.wait_until_ready()
        yield container


def test_the_server_is_process_1_of_user_10001_without_capabilities(server: Container):
    status = dict(line.split(":\t", 1) for line in server.run("cat", "/proc/1/status").splitlines())
    assert status["Uid"].split() == ["10001"] * 4
    assert int(status["CapBnd"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"


def test_the_health_check_of_the_image_succeeds(server: Container):
    server.run("python", "healthcheck.py")


@pytest.mark.parametrize("format_", FORMATS)
def test_every_format_is_encoded(server: Container, format_: str):
    response = server.decode(BODY, format=format_)
    assert response.status_code == 200, response.text
    assert FORMATS[format_] in response.content[:16]


def test_only_the_volumes_are_writable(server: Container, podman: Podman):
    for place, status in (("/app", 1), ("/opt/venv", 1), ("/bundles", 1), ("/cache", 0), (TMP, 0)):
        touched = podman.attempt("exec", server.name, "touch", f"{place}/x")
        assert touched.returncode == status, (place, touched.stderr)


def test_idle_connections_up_to_the_limit_of_open_files_do_not_keep_requests_out(server: Container):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard > IDLE + 100
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, IDLE + 100), hard))
    address = (server.address, PORT)
    with ExitStack() as stack:
        for _ in range(IDLE):
            stack.enter_context(socket.create_connection(address, timeout=10))
        assert responds(f"{server.url}/health/live")
        assert server.decode(BODY).status_code == 200
    assert server.decode(BODY).status_code == 200
    assert server.state["Running"]
    assert "Traceback" not in server.logs()


def test_nothing_was_killed_for_memory(server: Container, podman: Podman):
    with ThreadPoolExecutor(4) as pool:
        assert {response.status_code for response in pool.map(server.decode, [EIGHT] * 4)} == {200}
    assert not server.state["OOMKilled"]


def test_an_accepted_request_is_finished_after_sigterm_and_the_exit_status_is_0(
    podman: Podman, volumes: tuple[str, ...]
):
    flags = (*CONFINED, *volumes, *BUNDLE, "--env", "PID_DRAIN_DELAY=0")
    with podman.container(*flags) as container, ThreadPoolExecutor(1) as pool:
        container.wait_until_ready()
        response = pool.submit(container.decode, EIGHT)
        until(lambda: metric(container, "pid_running_images") > 0, "the decode to begin")
        assert container.stop() == 0
        assert response.result().status_code == 200
        assert "Traceback" not in container.logs()


def metric(container: Container, name: str) -> float:
    """Return the sum of all series of a metric."""
    families = text_string_to_metric_families(httpx.get(f"{container.url}/metrics").text)
    return sum(sample.value for family in families for sample in family.samples if sample.name == name)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(("--user", "1234567890:0"), id="OpenShift"),
        pytest.param(("--unsetenv", "HOME", "--passwd=false"), id="no HOME"),
        pytest.param(("--user", "1234567890:0", "--unsetenv", "HOME", "--passwd=false"), id="both"),
    ],
)
def test_the_server_runs_as_any_user(podman: Podman, volumes: tuple[str, ...], flags: tuple[str, ...]):
    bundles = volumes[:2]  # nothing is mounted at /cache
    with podman.container(*CONFINED, *bundles, *BUNDLE, *flags) as container:
        container.wait_until_ready()
        assert container.decode(BODY).status_code == 200
        assert "compiled code is not kept" in container.logs()
        assert container.stop() == 0
        assert "Traceback" not in container.logs()


class TestCache:
    """Starts with a filled, a damaged and a full volume at /cache; the first one has an empty volume."""

    @pytest.fixture
    def cache(self, tmp_path: Path) -> Path:
        os.chown(tmp_path, 10001, 10001)
        return tmp_path

    def start(self, podman: Podman, volumes: tuple[str, ...], *cache: str) -> str:
        """Start a server, decode an image, stop the server and return its log."""
        flags = (*CONFINED, *volumes[:2], *BUNDLE, *cache, "--env", "PID_DRAIN_DELAY=0")
        with podman.container(*flags) as container:
            container.wait_until_ready()
            assert container.decode(BODY).status_code == 200
            assert container.stop() == 0
            return container.logs()

    def test_a_second_start_compiles_nothing(self, podman: Podman, volumes: tuple[str, ...], cache: Path):
        self.start(podman, volumes, "--volume", f"{cache}:/cache")
        compiled = modified(cache)
        assert compiled
        self.start(podman, volumes, "--volume", f"{cache}:/cache")
        assert modified(cache) == compiled

    def test_damaged_code_is_compiled_again(self, podman: Podman, volumes: tuple[str, ...], cache: Path):
        self.start(podman, volumes, "--volume", f"{cache}:/cache")
        for path in modified(cache):
            path.write_bytes(path.read_bytes()[:100])
        self.start(podman, volumes, "--volume", f"{cache}:/cache")
        assert all(path.stat().st_size > 100 for path in modified(cache))

    def test_a_full_volume_does_not_prevent_the_start(self, podman: Podman, volumes: tuple[str, ...], cache: Path):
        run("mount", "-t", "tmpfs", "-o", "size=1m,uid=10001,gid=10001,mode=755", "tmpfs", cache)
        try:
            log = self.start(podman, volumes, "--volume", f"{cache}:/cache")
        finally:
            run("umount", cache)
        assert "less than 32 MiB are free" in log


def modified(cache: Path) -> dict[Path, int]:
    """Return the files of Numba's machine code and when they were modified."""
    return {path: path.stat().st_mtime_ns for path in cache.rglob("*.nb?")}
