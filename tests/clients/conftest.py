"""Servers for real clients. `make test-clients` runs these tests with the Python in which the clients are installed."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from loadtest.processes import Process, free_port, running
from tests.programs import program

# The server runs in its own environment, that of torch, without the packages that clients bring.
SERVER_PYTHON = Path(torch.__file__).parents[4] / "bin/python"

# `make test` collects the other tests too, in an environment without these packages.
collect_ignore = [
    file
    for package, file in (
        ("diffusers", "test_diffusers.py"),
        ("diffusers", "test_diffusers_document.py"),
        ("diffusers", "test_diffusers_pipelines.py"),
        ("diffusers", "test_diffusers_schedulers.py"),
        ("diffusers", "test_latent_frames.py"),
        ("jax", "test_jax.py"),
        ("playwright", "playground"),
        ("tritonclient", "test_tritonclient.py"),
    )
    if find_spec(package) is None
]

KEY = "alice-0123456789abcdef"

Serve = Callable[..., str]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--pictures", type=Path, metavar="DIR", help="write the pictures of the playground to DIR")


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Return a function that starts a server and returns its URL: `serve("server", "--bundle", folder, …)`.

    The first argument is the module to run. The same arguments return the same server again. The event loops that run
    the servers have their own thread, because Playwright has one in the thread of the tests.
    """
    urls: dict[tuple[str, ...], str] = {}
    folder = tmp_path_factory.mktemp("servers")
    stack = contextlib.ExitStack()
    with ThreadPoolExecutor(max_workers=1) as thread:

        def start(*arguments: str | Path) -> str:
            command = tuple(map(str, arguments))
            if command not in urls:
                port = free_port()
                options = ["--port", str(port), "--drain-delay", "0"]
                log = folder / f"{len(urls)}.log"
                process = Process([str(SERVER_PYTHON), "-m", *command, *options], port, log)
                urls[command] = thread.submit(stack.enter_context, running(process)).result().url
            return urls[command]

        yield start
        thread.submit(stack.close).result()


@pytest.fixture(scope="session")
def demo(serve: Serve, demo_bundle: Path) -> str:
    """URL of a server with the bundled decoder; an image of 256x256 is a latent of 16 channels and 16x16 cells."""
    return serve("server", "--bundle", demo_bundle)


@pytest.fixture(scope="session")
def demo_with_keys(serve: Serve, demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """URL of a server as `demo`, which requires the API key `KEY`."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"alice: {KEY}\n")
    return serve("server", "--bundle", demo_bundle, "--api-keys", keys)


@pytest.fixture(scope="session")
def serve_space(serve: Serve) -> Callable[[str], str]:
    """Return a function that starts a server for a latent space, whose images show the latent, and returns its URL."""
    return lambda space: serve("tests.clients.latent_server", "--latent-space", space)


@pytest.fixture(scope="session")
def flux(serve_space: Callable[[str], str]) -> str:
    """URL of a server whose decoder has the latent space of FLUX.1 and returns images that show the latent."""
    return serve_space("flux")


@pytest.fixture(scope="session")
def sdxl(serve_space: Callable[[str], str]) -> str:
    """URL of a server for the latent space of SDXL, otherwise as `flux`."""
    return serve_space("sdxl")


def render_page(url: str, folder: Path, *flags: str) -> str:
    """Load a page in headless Chromium and return its document, once its scripts and requests have ended.

    Args:
        url: Address of the page.
        folder: Directory for the browser's profile.
        flags: Further flags of Chromium.
    """
    command = [program("chromium"), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}"]
    command += ["--virtual-time-budget=20000", *flags, "--dump-dom", url]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=120).stdout
