"""/docs in Chromium, which cannot connect to any other host."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.clients.conftest import KEY, render_page
from tests.programs import NODE_SCRIPTS, program

pytestmark = pytest.mark.clients

SCRIPT = Path(__file__).with_name("docs_page.cjs")
OFFLINE = ("--proxy-server=127.0.0.1:9", "--proxy-bypass-list=127.0.0.1")  # nothing listens on the port


def test_it_shows_every_operation_and_the_authorize_button(demo: str, tmp_path: Path):
    html = render_page(f"{demo}/docs", tmp_path / "profile", *OFFLINE)
    paths = httpx.get(f"{demo}/openapi.json").json()["paths"]
    assert set(re.findall(r'data-path="([^"]+)"', html)) == set(paths)
    assert re.search(r"<button[^>]*class=\"btn authorize[^>]*><span>Authorize", html)


def test_the_page_works_offline_with_an_api_key(demo_with_keys: str):
    environment = {"NODE_PATH": str(NODE_SCRIPTS.parent), "PATH": "/usr/bin:/bin"}
    command = [program("node"), SCRIPT, program("chromium"), demo_with_keys, KEY]
    completed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=180)
    result = json.loads(completed.stdout)
    assert result["messages"] == []  # violations of the policy, failed requests and exceptions would be here
    assert all(re.match(rf"(blob:)?{re.escape(demo_with_keys)}/|data:", address) for address in result["requests"])
    assert result["decoded"]["size"] == [256, 256]
    assert "content-type: image/png" in result["decoded"]["text"]


def test_the_files_are_those_of_a_release_of_swagger_ui(demo: str):
    """The package that contains them is by other authors than Swagger UI."""
    release = NODE_SCRIPTS.parent / "swagger-ui-dist"
    for name in ("swagger-ui-bundle.js", "swagger-ui.css", "favicon-32x32.png"):
        served = httpx.get(f"{demo}/docs/0/{name}").raise_for_status().content
        assert hashlib.sha256(served).digest() == hashlib.sha256((release / name).read_bytes()).digest(), name
