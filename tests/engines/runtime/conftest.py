"""Fixtures for the runtimes under test."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from engines.runtime.device_runtime import DeviceRuntime
from engines.runtime.protocol import Runtime
from engines.runtime.simulated import SimulatedCost, SimulatedRuntime
from tests.conftest import BuildOnce
from tests.engines.runtime.runtimes import IN_TILES, ON_DEVICE, SIZE, TILED_INFO, WIDE, make_backend, params, ready


@pytest.fixture(autouse=True)
def _temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore the directory for temporary files, which torch.compile changes."""
    monkeypatch.setattr(tempfile, "tempdir", tempfile.gettempdir())
    monkeypatch.setenv("TMPDIR", tempfile.gettempdir())


@pytest.fixture(params=params(("simulated", *ON_DEVICE, "torch-fp4-cpu")))
def runtime(request: pytest.FixtureRequest, tmp_path: Path, build_once: BuildOnce) -> Runtime:
    if request.param == "simulated":
        return SimulatedRuntime({SIZE: SimulatedCost(), WIDE: SimulatedCost()}, max_batch=3, slots=4)
    return ready(make_backend(request.param, tmp_path, build_once))


@pytest.fixture(params=params(("simulated", *ON_DEVICE)))
def tiled(request: pytest.FixtureRequest, tmp_path: Path, build_once: BuildOnce) -> Runtime:
    """Runtime that decodes images up to the size IN_TILES in tiles, and two of them at a time."""
    if request.param == "simulated":
        costs = {SIZE: SimulatedCost(), WIDE: SimulatedCost()}
        return SimulatedRuntime(costs, max_batch=3, slots=4, max_pixels=IN_TILES.area)
    return ready(make_backend(request.param, tmp_path, build_once), TILED_INFO)


@pytest.fixture(params=params(ON_DEVICE))
def tiled_on_device(request: pytest.FixtureRequest, tmp_path: Path, build_once: BuildOnce) -> DeviceRuntime:
    return ready(make_backend(request.param, tmp_path, build_once), TILED_INFO)


@pytest.fixture(params=params(ON_DEVICE))
def on_device(request: pytest.FixtureRequest, tmp_path: Path, build_once: BuildOnce) -> DeviceRuntime:
    return ready(make_backend(request.param, tmp_path, build_once))
