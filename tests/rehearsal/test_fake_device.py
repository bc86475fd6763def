"""The fake CUDA device itself: it must reject what CUDA rejects."""

from __future__ import annotations

import pytest

from tests.rehearsal.conftest import Device

pytestmark = pytest.mark.rehearsal

# PyTorch itself avoids some of the forbidden calls, so these are made directly.
CALL = """
import ctypes, torch
from engines.runtime.virtual_memory import VirtualMemory

class Dim3(ctypes.Structure):
    _fields_ = [(axis, ctypes.c_uint) for axis in "xyz"]

def convert(value):
    address = getattr(value, "cuda_stream", None) or value.data_ptr() if hasattr(value, "device") else None
    return ctypes.c_void_p(address) if address else value

def call(name, *arguments):
    return getattr(ctypes.CDLL(None), name)(*map(convert, arguments))
"""

CAPTURE = (
    CALL
    + """
x = torch.zeros(4, device="cuda")
pinned, pageable, pair = torch.zeros(4).pin_memory(), torch.zeros(4), torch.zeros(2)
side, event = torch.cuda.Stream(), torch.cuda.Event()
event.record()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    x.add_(1)
    {line}
graph.replay()
print("captured")
"""
)


@pytest.mark.parametrize(
    "line", ["pass", "x.copy_(pinned, non_blocking=True)", "y = torch.ones(1000, device='cuda')", "torch.cuda.Event()"]
)
def test_permitted_work_is_captured(device: Device, line: str):
    process = device.python("-c", CAPTURE.replace("{line}", line))
    assert process.stdout == "captured\n", process.stderr
    assert device.log("graph")
    assert not device.log("violation")


@pytest.mark.parametrize(
    ("line", "violation"),
    [
        ("x.sum().item()", "cudaStreamSynchronize of a stream that is being captured"),
        ("torch.cuda.synchronize()", "cudaDeviceSynchronize while a stream is being captured"),
        ("torch.cuda.current_stream().synchronize()", "cudaStreamSynchronize of a stream that is being captured"),
        ("event.record(); event.synchronize()", "cudaEventSynchronize of an event that was recorded in a capture"),
        ("event.wait()", "a captured stream waits for an event from outside the capture"),
        ("call('cudaMalloc', pair, 8)", "cudaMalloc while a stream is being captured"),
        ("VirtualMemory(0).create(2 << 20)", "cuMemCreate while a stream is being captured"),
        (
            "call('cudaMemcpyAsync', x, pageable, 16, 1, torch.cuda.current_stream())",
            "copy pageable to device in a capture",
        ),
    ],
)
def test_forbidden_work_ends_the_capture(device: Device, line: str, violation: str):
    process = device.python("-c", CAPTURE.replace("{line}", line))
    assert process.returncode != 0
    assert "CUDA error" in process.stderr
    assert device.log("violation")[0] == violation
    assert not device.log("graph")


def test_work_that_the_graph_would_lack_is_reported(device: Device):
    process = device.python("-c", CAPTURE.replace("{line}", "with torch.cuda.stream(side): torch.add(x, 1, out=x)"))
    assert process.returncode == 0, process.stderr
    (violation,) = device.log("violation")
    assert violation.endswith("on another stream during a capture: it is not part of the graph")


VIRTUAL_MEMORY = """
import torch
from engines.runtime.virtual_memory import VirtualMemory
torch.zeros(1, device="cuda")
memory, size = VirtualMemory(0), 2 << 20
address, handle = memory.reserve(2 * size), memory.create(size)
memory.map(address, size, handle)
memory.allow_access(address, size)
{line}
"""


@pytest.mark.parametrize(
    ("line", "violation"),
    [
        ("memory.create(size + 1)", "cuMemCreate with a wrong size or location"),
        ("memory.map(address + size, size, handle)", "cuMemMap of memory that is mapped"),
        ("memory.map(address, size, memory.create(size))", "cuMemMap to addresses with memory"),
        ("memory.map(address + 2 * size, size, memory.create(size))", "cuMemMap to addresses that are not reserved"),
        ("memory.map(address + size, size, handle + 1)", "cuMemMap of an unknown handle"),
        ("memory.allow_access(address, 2 * size)", "cuMemSetAccess of addresses without memory"),
        ("memory.unmap(address + size, size)", "cuMemUnmap of addresses without memory"),
        ("memory.free(address, 2 * size)", "cuMemAddressFree of mapped memory"),
        ("memory.release(handle); memory.release(handle)", "cuMemRelease of an unknown handle"),
    ],
)
def test_wrong_use_of_virtual_memory_is_reported(device: Device, line: str, violation: str):
    process = device.python("-c", VIRTUAL_MEMORY.replace("{line}", line))
    assert "DeviceLostError: cuMem" in process.stderr
    assert device.log("violation") == [violation]


LAUNCH = (
    CALL
    + """
torch.cuda.set_device({current})
print(call("cudaLaunchKernel", None, Dim3(1, 1, 1), Dim3({threads}, 1, 1), None, 0, torch.cuda.Stream(1)))
"""
)


@pytest.mark.parametrize(
    ("current", "threads", "error", "violation"),
    [
        (1, 256, 0, None),
        (0, 256, 400, "kernel ? on a stream of device 1, but the current device is 0"),
        (1, 2048, 9, "kernel ? with grid 1 x 1 x 1, block 2048 x 1 x 1, 0 bytes of shared memory"),
    ],
)
def test_a_launch_is_checked(device: Device, current: int, threads: int, error: int, violation: str | None):
    process = device.python(
        "-c", LAUNCH.replace("{current}", str(current)).replace("{threads}", str(threads)), devices=2
    )
    assert process.stdout == f"{error}\n", process.stderr
    assert device.log("violation") == ([violation] if violation else [])


FP8_PRODUCT = """
import torch
from tests.fakecuda.control import FakeCuda
a, b = (torch.zeros(rows, 48, device="cuda").to(torch.float8_e4m3fn) for rows in (64, 32))
one = torch.ones((), device="cuda")
torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)
print(*FakeCuda().operations(), sep="\\n")
"""


def test_an_fp8_product_is_recorded_with_its_shape(device: Device):
    assert "\ngemm Lt 32 x 64 x 48 " in device.python("-c", FP8_PRODUCT).stdout


FP4_PRODUCT = """
import torch
a, b = (torch.zeros(rows, 32, dtype=torch.uint8, device="cuda").view(torch.float4_e2m1fn_x2) for rows in (64, 32))
scales = torch.zeros(128 * 4, device="cuda").to(torch.float8_e4m3fn)
torch._scaled_mm(a, b.t(), scales, scales, out_dtype=torch.bfloat16)
"""


@pytest.mark.parametrize(("capability", "allowed"), [(90, False), (100, True), (120, True)])
def test_an_fp4_product_needs_a_device_that_has_it(device: Device, capability: int, allowed: bool):
    device.python("-c", FP4_PRODUCT, capability=capability)
    reasons = [violation.rpartition(": ")[2] for violation in device.log("violation")]
    assert reasons == ([] if allowed else ["FP4 needs compute capability 10.0"])


SEVERAL = """
import pynvml, torch
pynvml.nvmlInit()
torch.ones(100_000_000, device="cuda:1")
for number in range(torch.cuda.device_count()):
    uuid = f"GPU-{torch.cuda.get_device_properties(number).uuid}"
    handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    print(number, torch.cuda.get_device_capability(number), pynvml.nvmlDeviceGetMemoryInfo(handle).used >> 20)
"""


def test_devices_have_their_own_memory_and_uuid(device: Device):
    process = device.python("-c", SEVERAL, devices=2, capability=120, context_mib=500)
    assert process.stdout.splitlines() == ["0 (12, 0) 500", "1 (12, 0) 882"], process.stderr


@pytest.mark.parametrize(
    ("setting", "error"), [({"nvml_init_error": 18}, "RmVersionMismatch"), ({"nvml_error": 15}, "GpuIsLost")]
)
def test_nvml_fails_on_request(device: Device, setting: dict[str, int], error: str):
    assert error in device.python("-c", SEVERAL, devices=2, **setting).stderr


def test_a_device_that_cannot_be_initialised(device: Device):
    process = device.python("-c", "import torch; torch.zeros(1, device='cuda')", init_error=802)
    assert process.returncode == 1
    assert "system not yet initialized" in process.stderr


def test_functions_that_the_fake_lacks_end_the_process_with_their_name(device: Device):
    process = device.python("-c", "import torch; torch.cuda.init(); torch.cuda.cudart().cudaProfilerStart()")
    assert process.returncode < 0
    assert device.log("error") == ["cudaProfilerStart is not implemented by the fake"]
