"""Requests of web pages from other origins (CORS)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.server.conftest import Running, Serve, run_server

PAGE, OTHER = "https://app.example.com", "https://evil.example.com"
KEY = "alice-0123456789abcdef"
ALLOWED = "access-control-allow-origin"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that requires API keys and allows one page."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"alice:{KEY}\n")
    with run_server(api_keys=keys, cors_origins=PAGE, max_body_bytes=200_000) as running:
        yield running


def preflight(running: Running, origin: str = PAGE, path: str = "/decode", **headers: str) -> httpx.Response:
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST", **headers}
    return running.client.options(path, headers=asked)


def names(response: httpx.Response, header: str) -> set[str]:
    return {name.strip().lower() for name in response.headers[header].split(",")}


def test_a_preflight_needs_no_key_and_allows_every_header(running: Running):
    wanted = "authorization,content-type,x-deadline-ms,x-request-id,traceparent"
    response = preflight(running, **{"Access-Control-Request-Headers": wanted})
    assert (response.status_code, response.content) == (204, b"")
    assert response.headers[ALLOWED] == PAGE
    assert "POST" in response.headers["access-control-allow-methods"]
    assert names(response, "access-control-allow-headers") >= set(wanted.split(","))


def test_a_preflight_of_another_page_allows_nothing(running: Running):
    assert ALLOWED not in preflight(running, OTHER).headers


def test_a_preflight_for_another_method_lists_those_that_are_allowed(running: Running):
    response = preflight(running, **{"Access-Control-Request-Method": "DELETE"})
    assert names(response, "access-control-allow-methods") == {"get", "head", "options", "post"}


def test_a_response_has_the_headers_and_exposes_its_own(running: Running):
    running.client.headers.update({"Origin": PAGE, "Authorization": f"Bearer {KEY}"})
    try:
        response = running.decode()
    finally:
        del running.client.headers["Origin"], running.client.headers["Authorization"]
    assert (response.status_code, response.headers[ALLOWED]) == (200, PAGE)
    assert names(response, "access-control-expose-headers") >= {
        *("x-seed", "x-request-id", "server-timing", "retry-after", "*")
    }
    assert "origin" in names(response, "vary")
    assert "access-control-allow-credentials" not in response.headers


@pytest.mark.parametrize(
    ("method", "path", "key", "status"),
    [
        ("POST", "/decode", "unknown", 401),
        ("POST", "/decode", KEY, 415),
        ("GET", "/decode", KEY, 405),
        ("GET", "/nowhere", KEY, 404),
        ("OPTIONS", "/decode", KEY, 204),  # no preflight
        ("OPTIONS", "/decode", "unknown", 401),
    ],
)
def test_every_status_can_be_read_by_the_page(running: Running, method: str, path: str, key: str, status: int):
    headers = {"Origin": PAGE, "Authorization": f"Bearer {key}", "Content-Type": "text/plain"}
    response = running.client.request(method, path, headers=headers)
    assert (response.status_code, response.headers[ALLOWED]) == (status, PAGE)


def test_an_unexpected_error_can_be_read_by_the_page(serve: Serve, monkeypatch: pytest.MonkeyPatch):
    def fail(*arguments: object) -> None:
        raise RuntimeError("a bug")

    with serve(cors_origins=PAGE) as running:
        monkeypatch.setattr(running.service, "submit", fail)
        running.client.headers["Origin"] = PAGE
        response = running.decode()
    assert (response.status_code, response.headers[ALLOWED]) == (500, PAGE)


def test_another_page_gets_a_response_without_permission(running: Running):
    response = running.client.get("/health/live", headers={"Origin": OTHER})
    assert response.status_code == 200
    assert ALLOWED not in response.headers


def test_an_asterisk_allows_every_page(serve: Serve):
    with serve(cors_origins="*") as running:
        assert preflight(running, OTHER).headers[ALLOWED] == "*"
        assert running.client.get("/info", headers={"Origin": OTHER}).headers[ALLOWED] == "*"


def test_without_the_setting_no_page_is_allowed(serve: Serve, tmp_path: Path):
    with serve() as running:
        response = preflight(running)
        assert response.status_code == 204  # OPTIONS as such
        assert not [name for name in response.headers if name.startswith("access-control")]
