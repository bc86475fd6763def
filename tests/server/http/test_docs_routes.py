"""/docs and its files. tests/clients/test_docs_page.py opens the page in a browser."""

from __future__ import annotations

import re
import sys
from urllib.parse import urljoin

import pytest

from engines.errors import ConfigError
from server.http.docs_page import docs_routes
from tests.server.conftest import Running

FILES = {
    "swagger-ui.css": "text/css",
    "swagger-ui-bundle.js": "text/javascript",
    "start.js": "text/javascript",
    "favicon-32x32.png": "image/png",
}


def links(server: Running) -> dict[str, str]:
    """Return what the page loads: absolute addresses, by the name of the file."""
    html = server.client.get("/docs").text
    found = re.findall(r"<(?:link|script)[^>]*(?:href|src)=\"([^\"]+)\"", html)
    return {link.rpartition("/")[2]: urljoin(f"{server.url}/docs", link) for link in found}


def test_the_page_loads_only_files_of_this_server(server: Running):
    assert links(server).keys() == FILES.keys()
    assert all(link.startswith(f"{server.url}/docs/") for link in links(server).values())


def test_its_policy_forbids_other_hosts_and_inline_scripts(server: Running):
    response = server.client.get("/docs")
    policy = dict(part.split(maxsplit=1) for part in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["connect-src"] == "'self'"
    assert not re.search(r"https?:|\*|unsafe-eval", " ".join(policy.values()))
    assert not re.search(r"<script(?![^>]*src=)|<style| on\w+=|javascript:", response.text)
    assert response.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize(("name", "media_type"), FILES.items())
def test_a_file_may_be_cached_for_as_long_as_its_address_has_the_hash_of_its_content(
    server: Running, name: str, media_type: str
):
    link = links(server)[name]
    linked, other = server.client.get(link), server.client.get(f"/docs/0/{name}")
    assert linked.content == other.content
    assert linked.headers["content-type"].startswith(media_type)
    assert linked.headers["x-content-type-options"] == "nosniff"
    assert "immutable" in linked.headers["cache-control"]
    assert other.headers["cache-control"] == "no-cache"
    head = server.client.head(link)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == linked.headers["content-length"]


def test_other_files_of_the_package_are_not_served(server: Running):
    assert server.client.get("/docs/__init__.py").status_code == 404
    assert server.client.get("/docs/../openapi.py").status_code == 404


def test_a_missing_package_is_reported_at_the_start(monkeypatch: pytest.MonkeyPatch):
    for module in ("fastapi_swagger", "fastapi_swagger.resources"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match="pip install fastapi-swagger"):
        docs_routes("title")
