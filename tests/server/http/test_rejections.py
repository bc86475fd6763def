"""Requests that are rejected: each gets a problem document with a stable code and affects no other request."""

from __future__ import annotations

import socket
import zlib
from collections.abc import Iterator

import httpx
import pytest
import torch
from safetensors.torch import save

from tests.server.conftest import Running, make_latent

SAFETENSORS = {"Content-Type": "application/x-safetensors"}
BAD_LATENTS = {
    "channels": make_latent(4, 2, 2),
    "size": make_latent(16, 3, 2),
    "integers": torch.ones(16, 2, 2, dtype=torch.int32),
    "complex": torch.ones(16, 2, 2, dtype=torch.complex64),
    "nan": torch.full((16, 2, 2), float("nan")),
    "infinity": torch.full((16, 2, 2), float("inf")),
    "empty": torch.zeros(0, 16, 2, 2),
    "too many": make_latent(4, 16, 2, 2),
}


@pytest.fixture(autouse=True)
def _healthy_afterwards(server: Running) -> Iterator[None]:
    yield
    assert server.client.get("/health/ready").status_code == 200
    assert server.decode().status_code == 200


def expect(response: httpx.Response, status: int, code: str) -> str:
    """Check the problem document and return its detail."""
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert (problem["status"], problem["code"]) == (status, code)
    assert problem["request_id"] == response.headers["x-request-id"]
    assert "Traceback" not in response.text
    return problem["detail"]


def post(server: Running, content: bytes, media_type: str = "application/x-safetensors", **params: str):
    return server.client.post("/decode", content=content, headers={"Content-Type": media_type}, params=params)


@pytest.mark.parametrize("name", BAD_LATENTS)
def test_an_unsupported_latent_gets_422(server: Running, name: str):
    expect(server.decode(BAD_LATENTS[name]), 422, "invalid-latent")


@pytest.mark.parametrize(
    "options", [{"sigma": 1.5}, {"sigma": "nan"}, {"steps": 5}, {"steps": 0}, {"sead": 1}, {"seed": -2}]
)
def test_an_option_that_is_unknown_or_out_of_range_gets_422(server: Running, options: dict):
    expect(server.decode(**options), 422, "invalid-option")


@pytest.mark.parametrize("media_type", ["application/x-pickle", "text/plain", "image/png"])
def test_an_unsupported_media_type_gets_415(server: Running, media_type: str):
    detail = expect(post(server, b"12345678", media_type), 415, "unsupported-media-type")
    assert "application/x-safetensors" in detail


def test_a_damaged_body_gets_400(server: Running):
    good = save({"latent": make_latent()})
    for body in (good[:-1], good[:20], b"", b"\xff" * 100, (2**50).to_bytes(8, "little") + good[8:]):
        expect(post(server, body), 400, "malformed-body")
    expect(post(server, b'{"latent": {', "application/json"), 400, "malformed-body")
    raw = post(server, b"\x00" * 100, "application/octet-stream", shape="16,2,2", dtype="float32")
    expect(raw, 400, "malformed-body")


def test_a_body_over_the_limit_gets_413_with_and_without_content_length(server: Running):
    body = b"\0" * 300_000
    expect(post(server, body), 413, "body-too-large")
    chunks = (body[i : i + 50_000] for i in range(0, len(body), 50_000))
    expect(server.client.post("/decode", content=chunks, headers=SAFETENSORS), 413, "body-too-large")


def test_a_body_over_the_limit_is_rejected_before_it_has_arrived(server: Running):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(
            b"POST /decode HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-safetensors\r\n"
            b"Content-Length: 1000000000\r\n\r\n"
        )
        assert b" 413 " in connection.recv(4096).split(b"\r\n")[0]


def test_a_content_encoding_gets_415_and_an_unsupported_accept_header_406(server: Running):
    body = save({"latent": make_latent()})
    compressed = server.client.post(
        "/decode", content=zlib.compress(body), headers={**SAFETENSORS, "Content-Encoding": "deflate"}
    )
    expect(compressed, 415, "unsupported-media-type")
    avif = server.client.post("/decode", content=body, headers={**SAFETENSORS, "Accept": "image/avif"})
    expect(avif, 406, "not-acceptable")


def test_an_unknown_path_gets_404_and_an_unsupported_method_405(server: Running):
    expect(server.client.get("/nowhere"), 404, "no-such-route")
    expect(server.client.get("/decode"), 405, "no-such-route")
    assert server.client.get("/decode").headers["allow"] == "POST"
    for path in ("/info", "/health/live", "/docs"):
        assert {x.strip() for x in server.client.post(path).headers["allow"].split(",")} == {"GET", "HEAD"}
