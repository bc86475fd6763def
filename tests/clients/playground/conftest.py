"""The playground in Chromium, driven by Playwright."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request, expect, sync_playwright

import build_engines
from tests.clients.conftest import Serve
from tests.conftest import BuildOnce
from tests.programs import program

SIZE = "512x512"
STEP = 0.05  # seconds
CAPACITY = 1 / (4 * STEP)  # images per second

Evaluate = Callable[..., Any]
NewPage = Callable[..., Page]
ServeSimulated = Callable[..., str]

expect.set_options(timeout=30_000)  # milliseconds; the machine may be busy


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, until the end of a module: as long as it runs, Playwright has an event loop in the thread of the tests.

    Tests of other modules need to run one themselves.
    """
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program("chromium"), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def problems() -> Iterator[list[str]]:
    """What pages have done that they must never do; the test fails if there is any of it at its end.

    That is an exception or a message in the console, which violations of the policy are too, or a request to another
    origin than that of the first document.
    """
    found: list[str] = []
    yield found
    assert found == []


def watch(context: BrowserContext, problems: list[str]) -> None:
    """Add to `problems` what the pages of a context do."""
    origins: list[str] = []

    def check_message(message: ConsoleMessage) -> None:
        is_status = message.text.startswith("Failed to load resource")  # of a response with an error, which is allowed
        if message.type in ("error", "warning") and not is_status:
            problems.append(message.text)

    def check_request(request: Request) -> None:
        address = urlsplit(request.url)
        if address.scheme not in ("data", "blob"):
            origins.append(address.netloc)
            if address.netloc != origins[0]:
                problems.append(f"a request to another origin: {request.url}")

    context.on("weberror", lambda error: problems.append(str(error.error)))
    context.on("console", check_message)
    context.on("request", check_request)


@pytest.fixture
def new_page(browser: Browser, problems: list[str]) -> Iterator[NewPage]:
    """Return a function that opens an empty page in a browser without history, with options of Playwright's contexts.

    See also `problems`.
    """
    with ExitStack() as stack:

        def open_page(**options: Any) -> Page:
            context = browser.new_context(**options)
            stack.callback(context.close)
            watch(context, problems)
            return context.new_page()

        yield open_page


@pytest.fixture
def page(new_page: NewPage) -> Page:
    """An empty page; see `new_page`."""
    return new_page()


@pytest.fixture(scope="session")
def bundle_of_three_sizes(build_once: BuildOnce) -> Path:
    """Bundle of the bundled decoder for images of three sizes; see also `demo_bundle`."""

    def build(directory: Path) -> None:
        arguments = ["--decoder", "dct-demo", "--target", "cpu", "--sizes", "512x512,256x256,192x256"]
        assert build_engines.main([*arguments, "--output", str(directory / "bundle")]) == 0

    return build_once("bundle-of-three-sizes", build) / "bundle"


@pytest.fixture(scope="session")
def bundled(serve: Serve, bundle_of_three_sizes: Path) -> str:
    """URL of a server with the bundled decoder, which decodes images of three sizes; see also `demo`."""
    return serve("server", "--bundle", bundle_of_three_sizes)


@pytest.fixture(scope="session")
def several(serve: Serve, demo_bundle: Path, bundle_of_three_sizes: Path) -> str:
    """URL of a server with the bundled decoder twice: as "1e1" for one size, and as "three" for three sizes."""
    return serve("server", "--bundle", f"1e1={demo_bundle}", "--bundle", f"three={bundle_of_three_sizes}")


@pytest.fixture(scope="session")
def serve_simulated(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> ServeSimulated:
    """Return a function that starts a server with a simulated device, with the seconds of a step and options."""

    def start(step: float, *options: str) -> str:
        table = tmp_path_factory.mktemp("tables") / "table.json"
        table.write_text(json.dumps({"name": "test", "source": "invented", "costs": {SIZE: {"step": step}}}))
        return serve("loadtest.simulated_server", "--table", table, *options)

    return start


@pytest.fixture(scope="session")
def simulated(serve_simulated: ServeSimulated) -> str:
    """URL of a server with a simulated device that decodes `CAPACITY` images per second."""
    return serve_simulated(STEP)


@pytest.fixture
def in_module(page: Page, simulated: str) -> Evaluate:
    """Return a function that calls a function with a module of the page: `in_module("load.js", "(load) => …")`."""
    page.goto(simulated)

    def evaluate(name: str, function: str, argument: Any = None) -> Any:
        folder = Path(page.get_attribute("script[type=module]", "src") or "").parent
        script = f"async (argument) => ({function})(await import('/{folder}/{name}'), argument)"
        return page.evaluate(script, argument)

    return evaluate
