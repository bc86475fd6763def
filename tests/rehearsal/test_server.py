"""The server on CUDA bundles: requests, too little memory, a lost device."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import save

from engines.decoders import find_decoder
from engines.size import Size
from tests.conftest import BuildOnce
from tests.rehearsal.conftest import ROOT, Device

pytestmark = pytest.mark.rehearsal

START_SECONDS = 900  # only ends a test that would hang
DECODER, SIZE = find_decoder("dct-demo"), Size(256, 256)
BODY = save({"latent": torch.zeros(DECODER.config.latent_channels, *DECODER.config.latent_size(SIZE))})
HEADERS = {"Content-Type": "application/x-safetensors"}


@pytest.fixture(params=["bf16", "fp8"])
def bundle(request: pytest.FixtureRequest, build_once: BuildOnce) -> Path:
    """Bundle of the bundled decoder for CUDA, built on the CPU, because builds compare results."""
    precision = request.param

    def build(directory: Path) -> None:
        arguments = ["--decoder", DECODER.name, "--target", "cuda", "--precision", precision, "--sizes", str(SIZE)]
        command = [sys.executable, "build_engines.py", *arguments, "--max-batch", "2", "--output", directory / "bundle"]
        environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        subprocess.run(command, cwd=ROOT, env=environment, check=True)

    return build_once(f"cuda-bundle-{precision}", build) / "bundle"


class Server:
    """A server process and its output."""

    def __init__(self, process: subprocess.Popen[bytes], output: Path) -> None:
        self.process, self._output = process, output

    @property
    def log(self) -> str:
        return self._output.read_text()

    def wait_until_ready(self) -> httpx.Client:
        """Return a client of the server."""
        limit = time.monotonic() + START_SECONDS
        while time.monotonic() < limit and self.process.poll() is None:
            if listening := re.search(r"listening on 127.0.0.1 port (\d+)", self.log):
                url = f"http://127.0.0.1:{listening[1]}"
                if httpx.get(f"{url}/health/ready").status_code == 200:
                    return httpx.Client(base_url=url, headers=HEADERS, timeout=START_SECONDS)
            time.sleep(0.1)
        pytest.fail(f"the server did not start: {self.log}")


@contextmanager
def running(device: Device, bundle: Path, *flags: str, **settings: object) -> Iterator[Server]:
    output = device.log_file.with_name("server.log")
    command = [sys.executable, "-m", "server", "--bundle", str(bundle), "--port", "0", "--drain-delay", "0", *flags]
    with output.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=device.environment(**settings), stdout=file, stderr=file)
    try:
        yield Server(process, output)
    finally:
        process.kill()
        process.wait()


def assert_that_requests_succeed(server: Server, client: httpx.Client) -> None:
    def decode(seed: int) -> httpx.Response:
        return client.post("/decode", content=BODY, params={"seed": seed, "preview": ("none", "steps")[seed % 2]})

    with ThreadPoolExecutor(8) as pool:
        responses = list(pool.map(decode, range(24)))
    assert [response.status_code for response in responses] == [200] * 24
    assert all(response.content.startswith(b"\x89PNG") for response in responses[::2])
    events = [re.findall("^event: (.*)$", response.text, re.MULTILINE) for response in responses[1::2]]
    assert all(names[-1] == "image" for names in events)  # previews that are not read in time are lost
    assert "no preview of an image" not in server.log


@pytest.mark.parametrize(
    "flags", [("--no-compile",), pytest.param(("--compile",), marks=pytest.mark.slow)], ids=["eager", "compiled"]
)
def test_the_server_answers_requests(device: Device, bundle: Path, flags: tuple[str, ...]):
    with running(device, bundle, *flags) as server, server.wait_until_ready() as client:
        assert_that_requests_succeed(server, client)
        assert 'pid_memory_bytes{device="cuda:0",kind="used"}' in client.get("/metrics").text
        server.process.terminate()
        assert server.process.wait(START_SECONDS) == 0
    assert not device.log("violation")


def test_two_devices_serve_together(device: Device, bundle: Path):
    flags = ("--no-compile", "--devices", "cuda:0,cuda:1")
    with running(device, bundle, *flags, devices=2) as server, server.wait_until_ready() as client:
        assert_that_requests_succeed(server, client)
    assert not device.log("violation")


@pytest.mark.parametrize(
    ("memory_mib", "message"),
    [
        (2, "cuda:0 has 0.00 GB of free memory, but this is needed: weights of dct-demo"),
        (
            60,
            "The device ran out of memory, .* Planned, without the working memory of the steps: weights of dct-demo",
        ),
    ],
    ids=["plan", "warm-up"],
)
def test_too_little_memory_ends_the_start(device: Device, bundle: Path, memory_mib: int, message: str):
    with running(device, bundle, "--no-compile", memory_mib=memory_mib) as server:
        assert server.process.wait(START_SECONDS) == 2
    assert re.search(message, server.log)


def test_a_lost_device_ends_the_server(device: Device, bundle: Path):
    """The failed requests get 503, and so does liveness, until the process exits with status 1."""
    with running(device, bundle, "--no-compile", fail_at_launch=500) as server:
        with server.wait_until_ready() as client:

            def decode_until_it_fails(_: int) -> int:
                with contextlib.suppress(httpx.RemoteProtocolError):  # a response that has begun is cut off
                    for _ in range(500):
                        if (status := client.post("/decode", content=BODY).status_code) != 200:
                            return status
                return client.post("/decode", content=BODY).status_code

            with ThreadPoolExecutor(8) as pool:
                assert set(pool.map(decode_until_it_fails, range(8))) == {503}
            assert client.get("/health/live").status_code == 503
        assert server.process.wait(START_SECONDS) == 1
    assert "Unrecoverable CUDA error; the process must be restarted." in server.log
