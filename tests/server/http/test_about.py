"""The documents at / and /version."""

from __future__ import annotations

import platform

import torch

from engines import __version__
from tests.server.conftest import Running


def test_the_root_names_the_decoder_and_links_existing_endpoints(server: Running):
    document = server.client.get("/").json()
    assert document["name"] == "PiD decode server"
    assert document["version"] == __version__
    assert document["decoders"] == [decoder["name"] for decoder in server.client.get("/info").json()["decoders"]]
    for path in document["links"].values():
        assert server.client.options(path).status_code == 204, path
    listed = {path for path in server.client.get("/openapi.json").json()["paths"] if "{" not in path}
    assert (
        {"/decode", "/info", "/health/ready", "/docs", "/openapi.json"}
        <= set(document["links"].values())
        <= (listed | {"/docs", "/openapi.json"})
    )


def test_the_version_is_that_of_the_running_software(server: Running):
    assert server.client.get("/version").json() == {
        "version": __version__,
        "decoders": [{"name": "simulated", "model": "simulated", "runtime": "simulated"}],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
