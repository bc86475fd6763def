"""Previews of the ComfyUI node, with a real server."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engines.runtime.simulated import SimulatedCost
from engines.size import Size
from tests.server.conftest import Running, run_server
from tests.server.runtimes import PacedRuntime
from tests.server.test_encoding import cancelled
from tests.waiting import until

SIZE = Size(256, 256)
LATENTS = {"samples": torch.zeros(1, 16, 8, 8)}


@pytest.fixture
def paced() -> Iterator[tuple[Running, PacedRuntime]]:
    """A server that waits after each step until the client has read the preview."""
    runtime = PacedRuntime({SIZE: SimulatedCost()})
    runtime.info = replace(runtime.info, latent_space="flux")
    with run_server(runtime) as server:
        runtime.paced = True
        yield server, runtime


def test_each_step_has_its_preview_and_progress(call, comfy: SimpleNamespace, paced: tuple[Running, PacedRuntime]):
    server, runtime = paced
    comfy.on_preview = runtime.read.release
    call("PidDecode", samples=LATENTS, url=server.url, sigma=0.0, seed=7)
    assert comfy.progress == [0.25, 0.5, 0.75, 1, 1]
    assert [(kind, image.size, limit) for kind, image, limit in comfy.previews] == [("JPEG", SIZE[::-1], None)] * 4
    levels = [np.asarray(image).mean() for _, image, _ in comfy.previews]
    assert levels == pytest.approx([40, 80, 120, 160], abs=3)


def test_an_interrupt_cancels_the_decode_after_a_step(
    call, comfy: SimpleNamespace, paced: tuple[Running, PacedRuntime]
):
    server, runtime = paced
    comfy.interrupted = True
    with pytest.raises(InterruptedError):
        call("PidDecode", samples=LATENTS, url=server.url, sigma=0.0, seed=7)
    until(lambda: sum(cancelled(server, "client-left").values()) == 1)
    runtime.read.release()  # so that the device continues
    assert comfy.progress == [0.25]
