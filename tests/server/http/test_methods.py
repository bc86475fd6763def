"""HEAD, OPTIONS and Allow, for every path that the server has."""

from __future__ import annotations

import http.client
import re

import pytest
from fastapi import APIRouter, FastAPI
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from server.http.methods import MethodsMiddleware
from tests.server.conftest import Running

UNLISTED = {"/docs": {"GET"}, "/openapi.json": {"GET"}}  # routes that the OpenAPI document does not list


def methods(header: str) -> set[str]:
    return {method.strip() for method in header.split(",")}


def routes(running: Running) -> dict[str, set[str]]:
    """Return the methods of every path; a parameter in a path has the value x."""
    listed = running.client.get("/openapi.json").json()["paths"]
    return UNLISTED | {re.sub(r"{\w+}", "x", path): {method.upper() for method in listed[path]} for path in listed}


def test_every_get_route_responds_to_head_with_the_same_head(server: Running):
    paths = [path for path, own in routes(server).items() if "GET" in own]
    assert {"/health/live", "/metrics", "/info", "/docs"} <= set(paths)
    for path in paths:
        get, head = server.client.get(path), server.client.head(path)
        assert head.status_code == get.status_code, path
        assert get.content, path
        assert not head.content, path
        assert head.headers["content-type"] == get.headers["content-type"]
        if path != "/metrics":  # its length changes with every request
            assert head.headers["content-length"] == get.headers["content-length"]
        assert server.client.head(path).status_code == get.status_code  # nothing of a body is left on the connection


def test_head_gets_the_status_of_get(server: Running):
    assert [server.client.head(path).status_code for path in ("/decode", "/nowhere")] == [405, 404]


def test_options_and_405_list_the_methods_of_every_path(server: Running):
    for path, own in routes(server).items():
        expected = own | {"OPTIONS"} | ({"HEAD"} if "GET" in own else set())
        options = server.client.options(path)
        assert (options.status_code, options.content) == (204, b""), path
        assert methods(options.headers["allow"]) == expected
        rejected = server.client.delete(path)
        assert rejected.status_code == 405
        assert methods(rejected.headers["allow"]) == expected


def test_options_on_an_unknown_path_gets_404(server: Running):
    assert server.client.options("/nowhere").status_code == 404


def test_options_on_the_whole_server_gets_204(server: Running):
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
    connection.request("OPTIONS", "*")
    response = connection.getresponse()
    assert (response.status, response.read()) == (204, b"")
    connection.close()


def test_options_does_not_count_as_a_decode(server: Running):
    assert server.client.options("/decode").status_code == 204
    exposition = server.client.get("/metrics").text
    assert 'pid_request_seconds_count{code="200",decoder=""}' in exposition
    assert 'code="204"' not in exposition


@pytest.fixture(scope="module")
def other() -> TestClient:
    """An application with a parameter in a path, and a path with two methods."""
    app, router = FastAPI(), APIRouter()

    @router.get("/models/{name}")
    async def model(name: str) -> PlainTextResponse:
        return PlainTextResponse(f"model {name}")

    @router.post("/models/{name}/load")
    @router.get("/models/{name}/load")
    async def load(name: str) -> PlainTextResponse:
        return PlainTextResponse(f"load {name}")

    app.include_router(router)
    app.add_middleware(MethodsMiddleware, routes=app.routes)
    return TestClient(app)


def test_paths_with_parameters_have_head_and_options(other: TestClient):
    assert other.head("/models/flux").status_code == 200
    assert methods(other.options("/models/flux").headers["allow"]) == {"GET", "HEAD", "OPTIONS"}
    assert other.get("/models/flux").text == "model flux"


def test_options_lists_the_methods_of_all_routes_of_a_path(other: TestClient):
    assert methods(other.options("/models/flux/load").headers["allow"]) == {"GET", "HEAD", "OPTIONS", "POST"}
