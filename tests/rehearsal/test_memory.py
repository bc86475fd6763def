"""Device memory of the full network: peak of a warm-up, and the end of the memory."""

from __future__ import annotations

import pytest

from engines.size import Size
from tests.rehearsal import programs
from tests.rehearsal.conftest import Device

pytestmark = pytest.mark.rehearsal

MIB = 2**20
WORKSPACE_MIB = 34  # of cuBLAS for a stream, which it keeps
CONTEXT_MIB = 512  # estimate: of a CUDA context with the kernels that PyTorch has loaded


@pytest.mark.parametrize(
    ("size", "batch", "limit_mib"),
    [(Size(2048, 2048), 1, 3900), (Size(2048, 2048), 4, 8950), (Size(4096, 4096), 2, 15350)],
)
def test_a_warm_up_needs_no_more_memory_than_decoding(device: Device, size: Size, batch: int, limit_mib: int):
    result = device.run(programs.decode, {}, size=size, batch=batch)
    assert result["peak"] <= limit_mib * MIB  # weights included
    assert result["peak"] <= result["rest"] + 64 * MIB
    assert result["after_decoding"] <= result["rest"] + 64 * MIB


def test_all_other_graphs_fit_into_the_memory_of_the_steps(device: Device):
    increases = device.run(programs.graph_memory, {}, size=Size(2048, 2048), batch=2)
    assert increases.pop("step") > 0
    assert increases == {"condition": 0, "finish": 0, "preview": 0}


def test_fp8_at_2048_needs_at_most_4_gb(device: Device):
    settings = {"context_mib": CONTEXT_MIB}
    result = device.run(programs.decode, settings, precision="fp8", size=Size(2048, 2048))
    assert result["peak"] <= 4e9


def test_images_in_tiles_need_no_memory_after_the_warm_up(device: Device):
    image = Size(1024, 2048)
    result = device.run(programs.decode_in_tiles, {}, max_pixels=image.area, image=image)
    assert result["launches"] == 2 * 4 * 2 * result["tiles"]  # condition and step, of each tile
    assert (result["used"], result["reserved"]) == (0, 0)
    assert result["temporary"] <= 16 * 1024  # scalars
    assert not device.log("violation")


def test_two_decoders_need_the_memory_of_the_larger_one(device: Device):
    sizes = [Size(1024, 1024)] * 2
    separate, shared = (
        device.run(programs.decode_with_two_decoders, {}, shared=shared, sizes=sizes) for shared in (False, True)
    )
    assert shared["one"] == separate["one"]
    assert separate["two"] - separate["one"] > 400 * MIB
    assert shared["two"] - shared["one"] <= 4 * MIB  # position tables
    assert shared["decoded"] == shared["two"]
    assert not device.log("violation")


def test_a_decoder_beside_those_that_share_has_memory_of_its_own_and_frees_it(device: Device):
    result = device.run(programs.decode_with_two_decoders, {}, shared=True, sizes=[Size(1024, 1024)] * 2)
    assert result["beside"] - result["two"] > 400 * MIB
    assert result["closed"] - result["two"] <= WORKSPACE_MIB * MIB
    assert result["rest"] <= 2 * WORKSPACE_MIB * MIB  # one stream of the shared graphs, and one of the other decoder
    assert not device.log("violation")


@pytest.mark.parametrize("memory_mib", [2100, 2500, 3000, 3500])
def test_too_little_memory_for_the_warm_up_is_a_memory_error(device: Device, memory_mib: int):
    result = device.run(programs.decode_until_it_fails, {"memory_mib": memory_mib}, size=Size(2048, 2048))
    assert (result["stage"], result["error"]) == ("warm-up", "DeviceMemoryError")
    assert "Use a smaller size, batch, number of slots or limit of pixels." in result["message"]


@pytest.mark.parametrize("launch", [1, 2, 3, 10, 11])  # condition, step, preview, finish, condition
def test_an_error_that_the_context_does_not_survive_is_a_lost_device(device: Device, launch: int):
    result = device.run(programs.decode_until_it_fails, {"fail_at_launch": launch})
    assert (result["stage"], result["error"], result["cause"]) == ("decode", "DeviceLostError", "AcceleratorError")
