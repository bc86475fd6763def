"""Weights that move between the fake CUDA device and host memory."""

from __future__ import annotations

import signal

import pytest

from engines.runtime.weight_memory import CHUNK_BYTES
from tests.rehearsal import programs
from tests.rehearsal.conftest import Device

pytestmark = pytest.mark.rehearsal


@pytest.mark.parametrize(("precision", "compiled"), [("bf16", False), ("fp8", False), ("bf16", True)])
def test_weights_return_to_the_same_addresses(device: Device, precision: str, compiled: bool):
    result = device.run(programs.offload_and_restore, {}, precision=precision, compiled=compiled)
    assert result["unchanged"]
    assert result["opened"] == 0  # the weights are in host memory until the warm-up
    assert result["weights"] > 2 * CHUNK_BYTES  # otherwise the test would not show that chunks are in order
    assert result["weights"] <= result["mapped"] == result["pool"] < result["weights"] + 2 * CHUNK_BYTES
    assert result["mapped_after_offload"] == 0
    assert "cuMemCreate" not in result["moves"]
    assert result["grown"] == [0, 0]
    assert result["used"] <= result["peak"] < result["used"] + result["pool"]  # which is counted once
    assert result["closed"] >= result["pool"]
    assert not device.log("violation")


def test_decoders_of_which_one_fits_at_a_time_take_turns(device: Device):
    result = device.run(programs.take_turns, {"memory_mib": 1300})
    assert result["error"] == "DeviceMemoryError"
    assert result["operations"]["cuMemMap"] > 0
    assert {"cuMemCreate", "cuMemRelease", "cudaMalloc"}.isdisjoint(result["operations"])
    assert result["closed"] < result["pool"]  # the decoder that remains is smaller
    assert not device.log("violation")


def test_decoders_of_which_two_fit_at_a_time_take_turns(device: Device):
    operations = device.run(programs.take_turns_in_pairs, {})["operations"]
    assert operations["cuMemMap"] > 0
    assert {"cuMemCreate", "cuMemRelease", "cudaMalloc"}.isdisjoint(operations)
    assert not device.log("violation")


def test_weights_move_during_a_warm_up(device: Device):
    result = device.run(programs.offload_beside_a_warm_up, {})
    assert result["errors"] == []
    assert result["pool"] > 0
    assert not device.log("violation")


def test_offloaded_weights_cannot_be_read(device: Device):
    process = device.python("-m", "tests.rehearsal.programs", "read_offloaded", "{}")
    assert process.returncode == -signal.SIGSEGV
