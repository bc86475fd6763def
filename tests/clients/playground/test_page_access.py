"""How the page reaches the browser: content negotiation, a prefix of a proxy, and a policy that allows no other origin.

In all tests of this folder, the fixture `problems` fails if a request is sent to another origin or if the policy is
violated.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Page, expect

from tests.clients.conftest import Serve
from tests.clients.playground.actions import image, open_page, run, sent_latent

pytestmark = pytest.mark.clients

PREFIX = "/decoder"


def proxy(url: str) -> type[BaseHTTPRequestHandler]:
    """Return a handler that forwards requests below `PREFIX` to a server and streams its responses."""

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not self.path.startswith(f"{PREFIX}/"):
                self.send_error(404)
                return
            length = int(self.headers.get("Content-Length", 0))
            target, headers = url + self.path.removeprefix(PREFIX), dict(self.headers)
            with httpx.stream(self.command, target, headers=headers, content=self.rfile.read(length)) as response:
                self.send_response(response.status_code)
                for name, value in response.headers.items():
                    if name not in ("connection", "transfer-encoding"):
                        self.send_header(name, value)
                self.end_headers()
                for chunk in response.iter_raw():
                    self.wfile.write(chunk)
                    self.wfile.flush()

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, *arguments: object) -> None:
            pass

    return Proxy


@pytest.fixture
def below_a_prefix(demo: str) -> Iterator[str]:
    """URL of the page behind a proxy that removes a prefix."""
    with ThreadingHTTPServer(("127.0.0.1", 0), proxy(demo)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}{PREFIX}/"
        server.shutdown()
        thread.join()


def test_below_a_prefix_of_a_proxy_everything_works(page: Page, below_a_prefix: str):
    statuses: dict[str, int] = {}
    page.on("response", lambda response: statuses.update({response.url: response.status}))
    open_page(page, below_a_prefix)
    run(page)
    assert sent_latent(page).shape == (16, 16, 16)
    assert image(page).startswith(b"\x89PNG")
    expect(page.locator("#curl")).to_contain_text(f"{below_a_prefix}decode?")
    expect(page.locator("#python")).to_contain_text(f'PidClient("{below_a_prefix.rstrip("/")}")')
    expect(page.locator("#overload-facts")).to_contain_text("Capacity")
    page.get_by_role("link", name="HTTP API").click()
    expect(page).to_have_url(f"{below_a_prefix}docs")
    assert {url: status for url, status in statuses.items() if status != 200} == {}
    assert f"{below_a_prefix}metrics" in statuses


def test_no_playground_leaves_only_the_document_for_programs(page: Page, serve: Serve, demo: str, demo_bundle: Path):
    open_page(page, demo)
    assets = page.get_attribute("script[type=module]", "src")
    url = serve("server", "--bundle", demo_bundle, "--no-playground")
    response = httpx.get(url, headers={"Accept": "text/html,*/*;q=0.8"})
    assert response.headers["content-type"] == "application/json"
    assert httpx.get(f"{url}/{assets}").status_code == 404
    assert httpx.get(f"{demo}/{assets}").status_code == 200


def test_the_page_loads_nothing_but_its_own_files(page: Page, demo: str):
    requested: set[str] = set()
    page.on("request", lambda request: requested.add(request.url))
    open_page(page, demo)
    run(page)
    expect(page.locator("#overload-facts")).to_contain_text("Capacity")
    assets = f"{demo}/playground/"
    others = {url for url in requested if not url.startswith((assets, f"blob:{demo}/"))}
    allowed = ("/", "/info", "/metrics", "/health/ready", "/decode")
    assert {url.removeprefix(demo).partition("?")[0] for url in others} == set(allowed)


@pytest.mark.parametrize(
    "attempt",
    [
        "() => fetch('http://127.0.0.1:9/').catch(() => {})",
        "() => { const image = new Image(); image.src = 'http://127.0.0.1:9/x.png'; }",
        "() => { const script = document.createElement('script'); script.text = '1'; document.body.append(script); }",
        "() => { document.body.setAttribute('style', 'color: red'); }",
        "() => { const frame = document.createElement('iframe'); frame.src = '/'; document.body.append(frame); }",
    ],
)
def test_the_policy_forbids_other_origins_inline_code_and_frames(
    page: Page, demo: str, problems: list[str], attempt: str
):
    """This also shows that the fixture `problems` notices a violation."""
    open_page(page, demo)
    assert problems == []
    page.evaluate(attempt)
    page.wait_for_timeout(200)
    assert any("Content Security Policy" in problem for problem in problems)
    problems.clear()
