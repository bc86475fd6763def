"""The description of a server with several decoders as the target of a load test."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from engines.errors import ConfigError
from engines.runtime.simulated import SimulatedCost, SimulatedRuntime
from engines.size import Size
from loadtest.target import inspect_server
from server.scheduling.costs import Output
from tests.server.conftest import run_server

SMALL, LARGE = Size(64, 64), Size(128, 128)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """URL of a server with a decoder of 16 channels for small images and one of 4 channels for small and large ones."""
    first = SimulatedRuntime({SMALL: SimulatedCost()})
    second = SimulatedRuntime(
        {SMALL: SimulatedCost(), LARGE: SimulatedCost(step=0.02)}, latent_channels=4, max_pixels=256**2
    )
    with run_server(decoders={"first": {"device": first}, "second": {"device": second}}, resident=1) as server:
        yield server.url


def test_each_decoder_has_its_own_latents_and_costs(url: str):
    target = asyncio.run(inspect_server(url))
    first, second, large = Output("first", SMALL), Output("second", SMALL), Output("second", LARGE)
    assert target.latents == {first: (16, 2, 2), second: (4, 2, 2), large: (4, 4, 4)}
    assert target.capacity.costs.keys() == target.latents.keys()
    assert target.capacity.costs[large].step >= 0.02


def test_something_else_than_a_decode_server_is_an_error():
    with pytest.raises(ConfigError, match="No decode server responds"):
        asyncio.run(inspect_server("http://127.0.0.1:9"))
