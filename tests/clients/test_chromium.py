"""fetch of a web page in Chromium against a server that allows the page's origin (CORS)."""

from __future__ import annotations

import json
import re
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlencode

import pytest

from tests.clients.conftest import Serve, render_page
from tests.clients.latents import JSON_TENSOR, LATENT, decode

pytestmark = pytest.mark.clients

SEED = 7


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves files and logs nothing."""

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def page_port() -> Iterator[int]:
    """Port of a server with the page."""
    handler = partial(QuietHandler, directory=str(Path(__file__).parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def url(serve: Serve, demo_bundle: Path, page_port: int) -> str:
    return serve("server", "--bundle", demo_bundle, "--cors-origins", f"http://127.0.0.1:{page_port}")


@pytest.fixture
def load(url: str, page_port: int, tmp_path: Path) -> Callable[[str], dict[str, object]]:
    """Return a function that loads the page from a host and returns its result."""

    def load(host: str) -> dict[str, object]:
        query = urlencode({"server": url, "body": json.dumps({"latent": JSON_TENSOR, "seed": SEED})})
        document = render_page(f"http://{host}:{page_port}/page.html?{query}", tmp_path)
        match = re.search(r'<pre id="result">(.+?)</pre>', document)
        assert match is not None, document
        result: dict[str, object] = json.loads(match[1])
        return result

    return load


def test_a_page_of_an_allowed_origin_shows_the_image(url: str, load: Callable[[str], dict[str, object]]):
    image = decode(url, LATENT, seed=SEED)
    assert load("127.0.0.1") == {"seed": str(SEED), "width": 256, "data": b64encode(image).decode()}


def test_a_page_of_another_origin_reads_nothing(load: Callable[[str], dict[str, object]]):
    assert load("localhost") == {"error": "TypeError"}
