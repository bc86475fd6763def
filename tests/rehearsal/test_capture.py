"""Warm-up, capture and decode of the full network on each generation of GPUs, without a violation of CUDA's rules."""

from __future__ import annotations

import pytest

from engines.size import Size
from tests.rehearsal import programs
from tests.rehearsal.conftest import Device

pytestmark = pytest.mark.rehearsal

SIZE = Size(2048, 2048)


@pytest.mark.parametrize("kernel", ["cuDNN", "flash", "memory-efficient"])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("capability", [90, 100, 120])
def test_the_full_network_is_captured(device: Device, capability: int, precision: str, kernel: str):
    settings = {"capability": capability}
    result = device.run(programs.decode, settings, precision=precision, size=SIZE, kernels=[kernel])
    assert result["chosen"]["joint attention"] == result["chosen"]["pixel attention"] == kernel
    assert result["operations"]["graphs captured"] == 4
    assert result["launches"] == 1 + 4 + 4 + 1  # condition, steps, previews, finish
    assert not device.log("violation")


OWN = ("Triton", "fused")
FP4_PRODUCT = "types 33 14"  # operands in CUDA_R_4F_E2M1, the result in CUDA_R_16BF
KERNELS_OF_A_STEP = {  # of the full network: blocks, and chunks of pixels; the last patch block is like the others
    "_make_heads": 14 * 2 + 2,
    "_attention": 14 + 2,
    "_gated_product": 14,
    "_update_pixels": 2 * 16,
}


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("capability", "attention"),
    [
        (capability, attention)
        for capability in (90, 100, 120)
        for attention in ("Triton, ", "Triton, scores in FP8", "Triton, FP8")
        if (capability, attention) != (90, "Triton, FP8")  # not used on Hopper
    ],
)
def test_the_kernels_of_this_project_are_captured(device: Device, capability: int, attention: str, compiled: bool):
    result = device.run(
        programs.decode,
        {"capability": capability},
        precision="fp8",
        size=SIZE,
        compiled=compiled,
        kernels=[attention, *OWN],
        fp8_attention="FP8" in attention,
    )
    assert not result["failed"]
    chosen = {name: chosen for name, chosen in result["chosen"].items() if name not in ("FP8 product", "adapter")}
    assert all(name.startswith(OWN) for name in chosen.values())
    captured = {name: result["operations"].get(f"captured kernel {name}") for name in KERNELS_OF_A_STEP}
    assert captured == KERNELS_OF_A_STEP
    assert not device.log("violation")


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
@pytest.mark.parametrize("capability", [90, 100, 120])
def test_a_network_in_fp4_is_captured(device: Device, capability: int, compiled: bool):
    """Its layers are emulated on Hopper, which cannot multiply FP4, and products in FP4 on Blackwell."""
    settings = {"capability": capability}
    kernels = ("Triton, ", *OWN)
    result = device.run(programs.decode, settings, precision="fp4", size=SIZE, compiled=compiled, kernels=kernels)
    products = {name: count for name, count in result["operations"].items() if FP4_PRODUCT in name}
    # Blocks of images and captions, of which the last has fewer layers; pixel blocks in 16 chunks of tokens.
    expected = 13 * 10 + 6 + 2 * 3 * 16 if capability >= 100 else 0
    assert sum(count for name, count in products.items() if name.startswith("captured")) == expected
    assert not device.log("violation")


def test_the_kernels_of_this_project_need_no_more_memory(device: Device):
    peaks = [
        device.run(programs.decode, {}, precision="fp8", size=SIZE, kernels=kernels)["rest"]
        for kernels in (("cuDNN", "PyTorch", "NCHW"), OWN)
    ]
    assert peaks[1] <= peaks[0]


def test_a_preview_copies_and_waits_once_and_allocates_nothing(device: Device):
    result = device.run(programs.preview, {}, batch=2)
    operations = {name: count for name, count in result["operations"].items() if not name.startswith("kernel")}
    assert operations == {"graph launch": 2, "copy device to pageable": 2, "cudaStreamSynchronize": 2}
    assert not result["allocator_used"]
    assert not device.log("violation")


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_compiled_network_is_captured(device: Device, precision: str):
    result = device.run(programs.decode, {}, precision=precision, compiled=True)
    assert any("captured kernel triton" in operation for operation in result["operations"])
    assert not device.log("violation")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_the_compiled_full_network_is_captured(device: Device, precision: str):
    device.run(programs.decode, {}, precision=precision, size=SIZE, compiled=True)
    assert not device.log("violation")


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_devices_warm_up_at_the_same_time(device: Device, devices: int, precision: str):
    result = device.run(programs.decode_on_all_devices, {"devices": devices}, precision=precision)
    assert result["errors"] == [""] * devices
    assert not device.log("violation")


@pytest.mark.parametrize(("compiled", "backend"), [(False, None), (True, "eager")], ids=["eager", "compiled"])
def test_a_network_warms_up_beside_the_decodes_of_another(device: Device, compiled: bool, backend: str | None):
    result = device.run(programs.warm_up_beside_decodes, {}, compiled=compiled, backend=backend)
    assert result["error"] == ""
    assert result["both"] > result["before"]
    assert result["after"] < result["both"], "the first network is still in memory"
    assert not device.log("violation")


@pytest.mark.parametrize("devices", [2, 4])
def test_devices_compile_without_reaching_the_recompile_limit(device: Device, devices: int):
    result = device.run(programs.decode_on_all_devices, {"devices": devices}, compiled=True, backend="eager")
    assert result["errors"] == [""] * devices  # reaching the limit is an error
    assert not device.log("violation")
