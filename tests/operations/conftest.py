"""Fixtures: two real servers, a Prometheus that scrapes them during a short load, and containers."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml
from safetensors.numpy import save

from docker.prometheus.local import write_configuration
from loadtest.processes import free_port
from tests.operations.archive_server import Server, archive
from tests.operations.archive_server import running as serving_archives
from tests.operations.gpu_server import CHANNELS, SIZE
from tests.operations.podman import CONFINED, CPU_IMAGE, Podman
from tests.programs import ROOT, program, running
from tests.waiting import responds, until

LOAD_SECONDS = 8
SCENARIO = f"""
title = "Short"
duration = {LOAD_SECONDS}
warm_up = 1
[arrivals]
rate = 8
[[mix]]
name = "in time"
size = "{SIZE}"
[[mix]]
name = "rejected"
size = "{SIZE}"
deadline_ms = 1
[[mix]]
name = "disconnecting"
size = "{SIZE}"
images = 2
disconnect_share = 1
"""
PROMPTS = f"""
[[mix]]
name = "with a prompt"
size = "{SIZE}"
new_prompts = 0.5
"""


@pytest.fixture(scope="session")
def servers(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, ...]]:
    """Addresses (host:port) of two servers: the bundled decoder on the CPU, and simulated GPUs."""
    folder = tmp_path_factory.mktemp("servers")
    addresses = []
    with contextlib.ExitStack() as stack:
        for name, flags in (("server", ["--bundle", demo_bundle]), ("tests.operations.gpu_server", [])):
            port = free_port()
            command = [sys.executable, "-m", name, *flags, "--port", port, "--drain-delay", "0"]
            stack.enter_context(running(command, folder / f"{name}.log"))
            addresses.append(f"127.0.0.1:{port}")
        for address in addresses:
            until(lambda address=address: responds(f"http://{address}/health/ready"), f"{address} to be ready")
        yield tuple(addresses)


@pytest.fixture(scope="session")
def prometheus(servers: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a Prometheus with the project's rules, after a load on both servers."""
    folder = tmp_path_factory.mktemp("prometheus")
    port = free_port()
    listen = f"--web.listen-address=127.0.0.1:{port}"
    config = folder / "prometheus.yml"
    write_configuration(config, dict(zip(("cpu", "gpu"), servers, strict=True)), seconds=1)
    command = [program("prometheus"), f"--config.file={config}", listen]
    with running([*command, f"--storage.tsdb.path={folder / 'data'}"], folder / "log"):
        url = f"http://127.0.0.1:{port}"
        until(lambda: responds(f"{url}/-/ready"), "Prometheus to be ready")
        until(lambda: len(samples(url, "up == 1")) == len(servers), "both servers to be scraped")
        send_load(servers, folder)
        until(lambda: bool(samples(url, "job_decoder:pid_deadline_burn:rate6h")), "the first rules to have data")
        until(lambda: bool(samples(url, "job:pid_device_busy:ratio_rate5m")), "dependent rules to have data")
        yield url


@pytest.fixture(scope="session")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    """Podman with the images of this project. Set PID_IMAGES to the directory of an earlier build to reuse it."""
    reused = os.environ.get("PID_IMAGES")
    folder = Path(reused) if reused else tmp_path_factory.mktemp("images")
    podman = Podman(folder)
    try:
        if not reused:
            for name in ("buildah", "debootstrap"):
                program(name)
            script = ROOT / "docker/build_with_buildah.sh"
            built = subprocess.run([script, folder], capture_output=True, text=True, timeout=1200)
            assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-4000:]
        yield podman
    finally:
        podman.remove_everything()
        if not reused:
            shutil.rmtree(folder)


@pytest.fixture(scope="session")
def volumes(podman: Podman, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Flags that mount a bundle, which the image builds as in compose, and an empty directory for compiled code."""
    bundles, cache = (tmp_path_factory.mktemp(name) for name in ("bundles", "cache"))
    for path in (bundles, cache):
        os.chown(path, 10001, 10001)
        path.chmod(0o755)
    service = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]["bundle"]
    entrypoint, command = json.dumps(service["entrypoint"]), service["command"]
    podman("run", "--rm", *CONFINED, "--volume", f"{bundles}:/bundles", "--entrypoint", entrypoint, CPU_IMAGE, *command)
    return ("--volume", f"{bundles}:/bundles:ro", "--volume", f"{cache}:/cache")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A web server on this machine with the archive of a bundle, for tests of docker/fetch_bundle.py."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving_archives(Server(archive())) as started:
        yield started


def send_load(servers: tuple[str, ...], folder: Path) -> None:
    """Run the scenario against both servers at once; every run must succeed.

    The second server also gets prompts, and images for its other decoder.
    """
    runs = []
    of_flux = (SCENARIO + PROMPTS).replace("[[mix]]", '[[mix]]\ndecoder = "flux"')
    for number, (address, classes) in enumerate(zip(servers, (SCENARIO, of_flux), strict=True)):
        scenario = folder / f"load-{number}.toml"
        scenario.write_text(classes)
        command = [sys.executable, "-m", "loadtest", "--url", f"http://{address}", "--scenario", str(scenario)]
        output = ["--output", str(folder / f"load-{number}")]
        runs.append(subprocess.Popen([*command, *output], cwd=ROOT, stdout=subprocess.DEVNULL))
    body = save({"latent": np.zeros((CHANNELS["sdxl"], SIZE.height // 32, SIZE.width // 32), np.float32)})
    for _ in range(5 * LOAD_SECONDS):
        httpx.post(f"http://{servers[1]}/decode", content=body, timeout=60).raise_for_status()
        time.sleep(0.2)
    assert [process.wait(120) for process in runs] == [0, 0]


def samples(url: str, query: str) -> list[dict[str, object]]:
    """Return the series that Prometheus has for `query` now."""
    response = httpx.get(f"{url}/api/v1/query", params={"query": query}, timeout=20).json()
    assert response["status"] == "success", f"{query}: {response.get('error')}"
    result: list[dict[str, object]] = response["data"]["result"]
    return result
