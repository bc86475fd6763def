"""One contract for all runtimes, and what those on a device add to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch

from engines.errors import DecodeError, DeviceLostError, DeviceMemoryError
from engines.pid import FoldedDecoder, NoiseSource, PidDecoder, fold, sample
from engines.pid.sampler import MODEL_TIMESTEPS, step_indices
from engines.runtime import torch_runtime
from engines.runtime.cuda_graphs import device_errors
from engines.runtime.device_runtime import Backend, DeviceRuntime
from engines.runtime.protocol import Runtime, RuntimeInfo, Sample
from engines.runtime.simulated import SimulatedCost, SimulatedRuntime
from engines.runtime.tensorrt_runtime import TensorRTBackend
from engines.runtime.torch_runtime import TorchBackend
from engines.runtime.trt import KernelCache
from tests.engines.runtime.fake_tensorrt import engine_bundle, fake_tensorrt
from tests.engines.runtime.real_engines import PACKAGES, real_stages
from tests.tiny import TINY

SIZE, WIDE = (64, 64), (64, 96)
CONFIG = replace(TINY, patch_depth=3, pixel_depth=2, pixel_injection=True, gate_per_channel=False)


INFO = RuntimeInfo(
    decoder="tiny",
    latent_space="flux",
    latent_channels=16,
    pixels_per_cell=8,
    upscale=4,
    sigma_frame="flow",
    caption_tokens=5,
    caption_width=24,
    sizes=(SIZE, WIDE),
    max_batch=3,
    slots=4,
    precision="fp32",
    kind="torch",
    device="cpu",
)


@cache
def exported_decoder() -> FoldedDecoder:
    return make_decoder("cpu")


def make_decoder(device: str | torch.device) -> FoldedDecoder:
    torch.manual_seed(0)
    return fold(PidDecoder(CONFIG), MODEL_TIMESTEPS).to(device)


def torch_stages(device: str) -> Backend:
    return TorchBackend(make_decoder(device))


def engine_stages(device: str) -> Backend:
    """Engines of the fake TensorRT."""
    tensorrt = fake_tensorrt(make_decoder(device))
    with TemporaryDirectory() as folder:
        bundle = engine_bundle(Path(folder) / "tiny", network=CONFIG, sizes=(SIZE, WIDE))
        return TensorRTBackend(bundle, tensorrt, torch.device(device), 3, KernelCache(Path(folder) / "kernels"))


def ready(stages: Backend) -> DeviceRuntime:
    runtime = DeviceRuntime(stages, torch.zeros(5, 24), INFO)
    runtime.warm_up()
    return runtime


def real_runtime(package: str) -> DeviceRuntime:
    return ready(real_stages(package, exported_decoder(), (SIZE, WIDE)))


def simulated_runtime() -> SimulatedRuntime:
    return SimulatedRuntime({SIZE: SimulatedCost(), WIDE: SimulatedCost()}, max_batch=3, slots=4)


ON_DEVICE = {
    "torch-cpu": lambda: ready(torch_stages("cpu")),
    "torch-cuda": lambda: ready(torch_stages("cuda")),
    "fake-engines": lambda: ready(engine_stages("cpu")),
    **{f"{package}-cuda": partial(real_runtime, package) for package in PACKAGES},
}
RUNTIMES = {"simulated": simulated_runtime, **ON_DEVICE}


def params(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.gpu if name.endswith("cuda") else ()) for name in names]


@pytest.fixture(params=params(RUNTIMES))
def runtime(request: pytest.FixtureRequest) -> Runtime:
    return RUNTIMES[request.param]()


def make_sample(number: int = 0, size: tuple[int, int] = SIZE, **fields) -> Sample:
    latent = torch.randn(16, size[0] // 32, size[1] // 32, generator=torch.Generator().manual_seed(number))
    return Sample(latent, size, **{"seed": number, **fields})


def pixels(runtime: Runtime, slot: int) -> np.ndarray:
    rows = runtime.finish(slot)
    rows.wait(rows.pixels.shape[0])
    copy = rows.pixels.copy()
    rows.close()
    runtime.release(slot)
    return copy


def decode(runtime: Runtime, sample: Sample, steps: int = 4) -> np.ndarray:
    slot = runtime.start(sample)
    for index in step_indices(steps):
        runtime.step([slot], [index])
    return pixels(runtime, slot)


def levels(runtime: Runtime) -> int:
    """By how much of 255 pictures may differ that other kernels computed: TensorRT's may use TF32."""
    real = isinstance(runtime, DeviceRuntime) and isinstance(runtime.stages, TensorRTBackend)
    return 8 if real and runtime.device.type == "cuda" else 1


class TestContract:
    @pytest.mark.parametrize("steps", [1, 2, 3, 4])
    @pytest.mark.parametrize("size", [SIZE, WIDE])
    def test_a_latent_becomes_uint8_rows_of_the_size_asked_for(self, runtime: Runtime, size, steps: int):
        image = decode(runtime, make_sample(size=size), steps)
        assert image.shape == (*size, 3)
        assert image.dtype == np.uint8

    def test_the_same_request_gives_the_same_image(self, runtime: Runtime):
        assert (decode(runtime, make_sample()) == decode(runtime, make_sample())).all()

    def test_images_at_different_steps_share_a_batch(self, runtime: Runtime):
        alone = [decode(runtime, make_sample(i)) for i in range(3)]
        slots = [runtime.start(make_sample(i)) for i in range(3)]
        plans = [list(step_indices(4)) for _ in range(3)]
        runtime.step([slots[0]], [plans[0].pop(0)])
        runtime.step(slots[:2], [plans[0].pop(0), plans[1].pop(0)])
        runtime.step(slots, [plan.pop(0) for plan in plans])
        runtime.step(slots[::-1], [plan.pop(0) for plan in plans[::-1]])
        runtime.step(slots[1:], [plan.pop(0) for plan in plans[1:]])
        runtime.step([slots[2]], [plans[2].pop(0)])
        for slot, expected in zip(slots, alone, strict=True):
            assert np.abs(pixels(runtime, slot).astype(int) - expected).max() <= levels(runtime)

    def test_a_paused_image_goes_on_where_it_was(self, runtime: Runtime):
        expected = decode(runtime, make_sample(1))
        slot = runtime.start(make_sample(1))
        first, *rest = step_indices(4)
        runtime.step([slot], [first])
        decode(runtime, make_sample(2, WIDE))
        for index in rest:
            runtime.step([slot], [index])
        assert (pixels(runtime, slot) == expected).all()

    def test_slots_are_finite_and_come_back(self, runtime: Runtime):
        slots = [runtime.start(make_sample(i)) for i in range(runtime.info.slots)]
        with pytest.raises(DecodeError, match="slots"):
            runtime.start(make_sample())
        for slot in slots:
            runtime.release(slot)
        with pytest.raises(DecodeError, match="twice"):
            runtime.release(slots[0])
        decode(runtime, make_sample())

    def test_a_size_that_it_does_not_hold_is_refused_and_costs_no_slot(self, runtime: Runtime):
        for _ in range(runtime.info.slots + 1):
            with pytest.raises(DecodeError, match="96x96"):
                runtime.start(make_sample(size=(96, 96)))
        decode(runtime, make_sample())

    def test_rows_outlive_their_slot(self, runtime: Runtime):
        expected = decode(runtime, make_sample(1))
        slot = runtime.start(make_sample(1))
        for index in step_indices(4):
            runtime.step([slot], [index])
        rows = runtime.finish(slot)
        runtime.release(slot)
        decode(runtime, make_sample(2))
        rows.wait(SIZE[0])
        assert (rows.pixels == expected).all()
        rows.close()


@pytest.fixture(params=params(ON_DEVICE))
def on_device(request: pytest.FixtureRequest) -> DeviceRuntime:
    return ON_DEVICE[request.param]()


class TestOnDevice:
    def test_it_computes_what_the_sampler_says(self, on_device: DeviceRuntime):
        request = make_sample(7, WIDE, sigma=0.4, caption=torch.randn(5, 24))
        device, decoder = on_device.device, make_decoder(on_device.device)
        noise = NoiseSource(7, device)
        start, *step_noise = [noise.draw(WIDE)[None] for _ in range(4)]
        conditioning = decoder.condition(request.latent[None].to(device), request.caption[None].to(device), WIDE)
        image = sample(decoder, conditioning, start, 0.4, step_noise)[0]
        expected = ((image.clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).cpu().numpy()
        assert np.abs(decode(on_device, request) - expected).max() <= levels(on_device)

    def test_sigma_seed_caption_and_latent_all_matter(self, on_device: DeviceRuntime):
        base = decode(on_device, make_sample(1))
        for other in (
            make_sample(1, sigma=0.5),
            make_sample(1, seed=2),
            make_sample(1, caption=torch.ones(5, 24)),
            make_sample(2, seed=1),
        ):
            assert (decode(on_device, other) != base).any()

    def test_drawing_into_a_buffer_draws_the_same_numbers(self, on_device: DeviceRuntime):
        first, second = NoiseSource(3, on_device.device), NoiseSource(3, on_device.device)
        buffer = torch.empty(2, 3, *SIZE, device=on_device.device)
        for i in range(2):
            first.draw_into(buffer[i])
        assert torch.equal(buffer, torch.stack([second.draw(SIZE) for _ in range(2)]))

    def test_the_noise_is_the_references_for_a_batch_of_one(self, on_device: DeviceRuntime):
        generator = torch.Generator(on_device.device).manual_seed(11)
        reference = torch.randn(1, 3, *SIZE, generator=generator, device=on_device.device)
        assert torch.equal(NoiseSource(11, on_device.device).draw(SIZE)[None], reference)

    def test_a_step_that_failed_can_be_repeated_with_the_same_result(self, on_device: DeviceRuntime, monkeypatch):
        expected = decode(on_device, make_sample(1))
        slot = on_device.start(make_sample(1))
        first, *rest = step_indices(4)
        run: Callable = on_device._execution.run
        with monkeypatch.context() as patch:
            patch.setattr(on_device._execution, "run", broken)
            with pytest.raises(DecodeError):
                on_device.step([slot], [first])
        assert on_device._execution.run == run
        for index in (first, *rest):
            on_device.step([slot], [index])
        assert (pixels(on_device, slot) == expected).all()

    def test_values_that_are_not_finite_are_an_error_and_no_picture(self, on_device: DeviceRuntime):
        slot = on_device.start(make_sample())
        with torch.inference_mode():
            on_device._arena.fields[SIZE].x[slot, 0, 0, 0] = float("nan")
        rows = on_device.finish(slot)
        with pytest.raises(DecodeError, match="not finite"):
            rows.wait(SIZE[0])
        rows.close()
        on_device.release(slot)

    def test_memory_does_not_grow_over_decodes(self, on_device: DeviceRuntime):
        """Every buffer that a request touches was there before it: the same addresses, before and after."""

        def addresses() -> list[int]:
            buffers = [on_device._arena._storage, on_device._step_noise, on_device._image, on_device._latent]
            return [buffer.data_ptr() for buffer in (*buffers, *sorted(on_device._host._free, key=id))]

        decode(on_device, make_sample())
        before = sorted(addresses())
        for i in range(20):
            decode(on_device, make_sample(i, WIDE if i % 2 else SIZE))
        assert sorted(addresses()) == before
        assert not on_device._noise
        assert not on_device._sizes


def raised_during(first: Exception, then: Exception) -> Exception:
    try:
        try:
            raise first
        except Exception:
            raise then  # noqa: B904  as the end of a capture does
    except Exception as error:
        return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("no room"), DeviceMemoryError),
        (raised_during(torch.OutOfMemoryError("no room"), RuntimeError("CUDA error: capture")), DeviceMemoryError),
        (torch.AcceleratorError("an illegal memory access"), DeviceLostError),
        (RuntimeError("CUDA error: unspecified launch failure"), DeviceLostError),
        (RuntimeError("shapes differ"), DecodeError),
        (DecodeError("said already"), DecodeError),
    ],
)
def test_what_pytorch_throws_becomes_an_error_that_says_what_to_do(error: Exception, expected: type):
    with pytest.raises(expected) as caught, device_errors():
        raise error
    assert caught.type is expected


def test_compilation_changes_no_picture_and_compiles_what_repeats_once(monkeypatch):
    """With every block and chunk compiled by itself a start would take as many times longer."""
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch_runtime, "COMPILE_BACKEND", "eager")
    expected = decode(ready(torch_stages("cpu")), make_sample(1))
    torch.compiler.reset()
    counters.clear()
    compiled = ready(TorchBackend(make_decoder("cpu"), compiled=True))
    assert np.abs(decode(compiled, make_sample(1)).astype(int) - expected).max() <= 1
    # a gate, a block and the last one, an attention, two halves of a pixel block, the final layer
    assert counters["stats"]["unique_graphs"] == 7
    assert not counters["graph_break"]


def broken(key: object) -> None:
    raise RuntimeError("a kernel failed")
