"""Runtimes on a device: the image, the noise, failures, memory, and compilation."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from engines.errors import ConfigError, DecodeError, DeviceLostError, DeviceMemoryError
from engines.pid import NoiseSource, sample
from engines.pid.fp4 import Fp4Linear
from engines.pid.fp8 import Fp8Linear
from engines.pid.network import PIXEL_MEMORY_BUDGET
from engines.pid.quantised import quantise
from engines.pid.quantised_linear import QuantisedLinear
from engines.pid.sampler import STEP_TRANSITIONS, advance, step_indices
from engines.pixels import to_uint8
from engines.runtime import torch_runtime
from engines.runtime.backend import Backend
from engines.runtime.buffers import DeviceBuffers
from engines.runtime.cuda_graphs import CudaGraphRunner, EagerRunner, device_errors, free_bytes, other_bytes
from engines.runtime.device_runtime import DeviceRuntime
from engines.runtime.devices import device_memory
from engines.runtime.torch_runtime import TorchBackend
from engines.size import Size
from tests.engines.runtime.runtimes import INFO, SIZE, WIDE, decode, levels, make_decoder, make_sample, pixels, ready


class TestOnDevice:
    @pytest.mark.computes
    def test_the_image_equals_that_of_the_sampler(self, on_device: DeviceRuntime):
        request = make_sample(7, WIDE, sigma=0.4, caption=torch.randn(5, 24))
        device, decoder = on_device.device, make_decoder(on_device.device)
        noise = NoiseSource(7, device)
        start, *step_noise = [noise.draw(WIDE)[None] for _ in range(4)]
        conditioning = decoder.condition(request.latent[None].to(device), request.caption[None].to(device), WIDE)
        image = sample(decoder, conditioning, start, 0.4, step_noise)[0]
        expected = to_uint8(image).permute(1, 2, 0).cpu().numpy().astype(int)
        assert np.abs(decode(on_device, request) - expected).max() <= levels(on_device)

    @pytest.mark.computes
    def test_a_preview_is_the_image_that_the_step_predicted(self, on_device: DeviceRuntime):
        request, other = make_sample(7, WIDE, sigma=0.4), make_sample(8, WIDE)
        device, decoder = on_device.device, make_decoder(on_device.device)
        conditioning = decoder.condition(request.latent[None].to(device), torch.zeros(1, 5, 24, device=device), WIDE)
        noise = NoiseSource(7, device)
        x, slots = noise.draw(WIDE)[None], [on_device.start(other), on_device.start(request)]
        for index in step_indices(4):
            t, next_t = STEP_TRANSITIONS[index]
            velocity = decoder.velocity(x, t, conditioning, 0.4)
            expected = to_uint8((x - t * velocity)[0]).permute(1, 2, 0).cpu().numpy().astype(int)
            x = advance(x, velocity, t, next_t, noise.draw(WIDE)[None])
            on_device.step(slots, [index] * 2)
            assert np.abs(on_device.preview(slots[1]) - expected).max() <= 1 + 8 * levels(on_device)
        for slot in slots:
            on_device.release(slot)

    @pytest.mark.computes
    def test_sigma_seed_caption_and_latent_all_affect_the_image(self, on_device: DeviceRuntime):
        base = decode(on_device, make_sample(1))
        for other in (
            make_sample(1, sigma=0.5),
            make_sample(1, seed=2),
            make_sample(1, caption=torch.ones(5, 24)),
            make_sample(2, seed=1),
        ):
            assert (decode(on_device, other) != base).any()

    def test_drawing_into_a_buffer_draws_the_same_noise(self, on_device: DeviceRuntime):
        first, second = NoiseSource(3, on_device.device), NoiseSource(3, on_device.device)
        buffer = torch.empty(2, 3, *SIZE, device=on_device.device)
        for i in range(2):
            first.draw_into(buffer[i])
        assert torch.equal(buffer, torch.stack([second.draw(SIZE) for _ in range(2)]))

    def test_the_noise_is_that_of_the_reference_for_a_batch_of_one(self, on_device: DeviceRuntime):
        generator = torch.Generator(on_device.device).manual_seed(11)
        reference = torch.randn(1, 3, *SIZE, generator=generator, device=on_device.device)
        assert torch.equal(NoiseSource(11, on_device.device).draw(SIZE)[None], reference)

    def test_a_failed_step_can_be_repeated_with_the_same_result(self, on_device: DeviceRuntime, monkeypatch):
        expected = decode(on_device, make_sample(1))
        slot = on_device.start(make_sample(1))
        first, *rest = step_indices(4)
        with monkeypatch.context() as patch:
            for runner in (EagerRunner, CudaGraphRunner):
                patch.setattr(runner, "run", broken)
            with pytest.raises(DecodeError):
                on_device.step([slot], [first])
        for index in (first, *rest):
            on_device.step([slot], [index])
        assert (pixels(on_device, slot) == expected).all()

    @pytest.mark.computes
    def test_a_value_that_is_not_finite_is_an_error_instead_of_an_image(self, on_device: DeviceRuntime):
        runtime = ready(OneBadValue(on_device.backend))
        slot = runtime.start(make_sample())
        runtime.step([slot], [0])
        rows = runtime.finish(slot)
        with pytest.raises(DecodeError, match="NaN or infinity"):
            rows.wait(SIZE.height)
        rows.close()
        runtime.release(slot)

    def test_memory_does_not_grow_over_decodes(self, on_device: DeviceRuntime):
        sources = live_noise_sources()
        for size in (SIZE, WIDE):
            decode(on_device, make_sample(size=size))
        tensors = live_tensor_bytes()
        for i in range(20):
            decode(on_device, make_sample(i, WIDE if i % 2 else SIZE))
        assert live_tensor_bytes() == tensors
        assert live_noise_sources() == sources

    def test_buffers_never_move(self, on_device: DeviceRuntime):
        """CUDA graphs and TensorRT contexts keep raw addresses."""
        recorder = RecordedAddresses(on_device.backend)
        runtime = ready(recorder)
        decode(runtime, make_sample())
        before = set(recorder.addresses)
        for i in range(4):
            decode(runtime, make_sample(i, WIDE if i % 2 else SIZE))
        assert recorder.addresses == before


class Wrapper:
    """A backend that calls another one."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)


class OneBadValue(Wrapper):
    """Backend whose images have one NaN."""

    def step(self, *arguments: Any) -> torch.Tensor:
        next_x = self.backend.step(*arguments)
        next_x[:, 0, 0, 0] = float("nan")
        return next_x


class RecordedAddresses(Wrapper):
    """Backend that records the addresses of the buffers that must not move."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self.addresses: set[int] = set()

    def condition(self, size: Size, latent: torch.Tensor, caption: torch.Tensor) -> Any:
        self.addresses |= {latent.data_ptr(), caption.data_ptr()}
        return self.backend.condition(size, latent, caption)

    def step(self, size: Size, x: Any, sigma: Any, step_index: torch.Tensor, noise: torch.Tensor, *rest: Any) -> Any:
        self.addresses |= {step_index.data_ptr(), noise.data_ptr()}
        return self.backend.step(size, x, sigma, step_index, noise, *rest)


def test_peak_memory_is_unknown_on_the_cpu():
    assert ready(TorchBackend(make_decoder("cpu"))).peak_memory() is None


def test_products_of_float16_are_summed_in_float32():
    products = torch.backends.cuda.matmul
    before = products.allow_fp16_reduced_precision_reduction
    try:
        products.allow_fp16_reduced_precision_reduction = True
        TorchBackend(make_decoder("cpu"))
        assert products.allow_fp16_reduced_precision_reduction
        TorchBackend(make_decoder("cpu").half())
        assert not products.allow_fp16_reduced_precision_reduction
    finally:
        products.allow_fp16_reduced_precision_reduction = before


def test_peak_memory_includes_what_pytorch_did_not_allocate(monkeypatch):
    """The CUDA context, loaded kernels and TensorRT engines: as the device reports it."""
    runtime = ready(TorchBackend(make_decoder("cpu")))
    simulate_memory(monkeypatch, lambda: 900)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 800)
    runtime._other_bytes = other_bytes(torch.device("cuda"))
    runtime._update_peak()
    assert runtime.peak_memory() == 800 + (2000 - 900 - 700)


def test_memory_that_pytorch_keeps_for_later_is_free(monkeypatch):
    kept = [300]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", kept.clear)
    simulate_memory(monkeypatch, lambda: 900 - sum(kept))
    assert free_bytes("cpu") is None
    assert kept
    assert free_bytes("cuda:0") == 900


@pytest.mark.parametrize(("available", "free"), [(1500, 1500), (500, 900), (9000, 2000)])
def test_memory_of_an_integrated_gpu_that_the_page_cache_uses_is_free(monkeypatch, available: int, free: int):
    simulate_memory(monkeypatch, lambda: 900, integrated=True)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
    assert free_bytes("cuda:0") == free
    assert device_memory("cuda:0") == (free, 2000)


def simulate_memory(monkeypatch, free: Callable[[], int], integrated: bool = False) -> None:
    """Simulate a GPU with 2000 bytes of memory."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free(), 2000))
    properties = SimpleNamespace(is_integrated=integrated)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def live_tensor_bytes() -> int:
    """Return the bytes of all dense tensors that exist in this process."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor and not (x.is_meta or x.is_sparse)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def live_noise_sources() -> int:
    """Return the number of noise sources that exist in this process."""
    gc.collect()
    return sum(type(value) is NoiseSource for value in gc.get_objects())


def raised_during(first: Exception, second: Exception) -> Exception:
    try:
        try:
            raise first
        except Exception:
            raise second  # noqa: B904  as the end of a capture does
    except Exception as error:
        return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("no room"), DeviceMemoryError),
        (raised_during(torch.OutOfMemoryError("no room"), RuntimeError("CUDA error: capture")), DeviceMemoryError),
        (torch.AcceleratorError("an illegal memory access"), DeviceLostError),
        (RuntimeError("CUDA error: unspecified launch failure"), DeviceLostError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), MemoryError),
        (RuntimeError("shapes differ"), DecodeError),
        (DecodeError("already translated"), DecodeError),
    ],
)
def test_exceptions_of_pytorch_are_translated(error: Exception, expected: type):
    with pytest.raises(expected) as caught, device_errors():
        raise error
    assert caught.type is expected


@pytest.mark.parametrize("budget", [PIXEL_MEMORY_BUDGET, 2 * 10**5], ids=["whole", "equal chunks"])
def test_compilation_keeps_the_image_and_compiles_repeated_parts_once(monkeypatch, budget: int):
    """Compiling every block and chunk separately would multiply the time of a start."""
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch_runtime, "COMPILE_BACKEND", "eager")
    eager, compiled = make_decoder("cpu"), make_decoder("cpu")
    expected = decode(ready(TorchBackend(eager)), make_sample(1))
    compiled.pixel_memory_budget = budget
    chunks = 16 // compiled.chunk_tokens(1, 16)
    assert chunks == (1 if budget == PIXEL_MEMORY_BUDGET else 8)
    torch.compiler.reset()
    counters.clear()
    image = decode(ready(TorchBackend(compiled, compiled=True)), make_sample(1))
    assert np.abs(image.astype(int) - expected).max() <= 1
    # gate, block, last block, attention, two halves of a pixel block, pixel embedder, final layer
    assert counters["stats"]["unique_graphs"] == 8
    assert not counters["graph_break"]


class TestRecompileLimit:
    """Beyond its limit PyTorch runs code uncompiled, and says so only in a warning."""

    @pytest.fixture(autouse=True)
    def config(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
        from torch._dynamo import config

        monkeypatch.setattr(torch_runtime, "COMPILE_BACKEND", "eager")
        monkeypatch.setattr(torch_runtime, "_recompiles", 0)
        torch.compiler.reset()
        with config.patch(recompile_limit=1, accumulated_recompile_limit=1, fail_on_recompile_limit_hit=False):
            yield config
        torch.compiler.reset()

    def test_it_covers_all_backends_of_all_devices(self, monkeypatch, config: Any):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
        ready(TorchBackend(make_decoder("cpu"), compiled=True))
        one = config.recompile_limit
        ready(TorchBackend(make_decoder("cpu"), compiled=True))
        assert config.recompile_limit == 2 * one
        assert one % 4 == 0
        assert config.accumulated_recompile_limit == config.recompile_limit

    def test_reaching_it_is_an_error(self, monkeypatch, config: Any):
        monkeypatch.setattr(
            torch_runtime, "_allow_recompiles", lambda count: setattr(config, "fail_on_recompile_limit_hit", True)
        )
        runtime = ready(TorchBackend(make_decoder("cpu"), compiled=True))
        with pytest.raises(ConfigError, match="recompile limit"):
            decode_all_sizes(runtime)

    def test_a_runtime_of_all_sizes_and_batches_stays_below_it(self):
        decode_all_sizes(ready(TorchBackend(make_decoder("cpu"), compiled=True)))  # an error otherwise


def decode_all_sizes(runtime: DeviceRuntime) -> None:
    """Decode every size in every batch."""
    for size in runtime.info.sizes:
        for batch in range(1, runtime.info.max_batch + 1):
            slots = [runtime.start(make_sample(size=size)) for _ in range(batch)]
            runtime.step(slots, [0] * batch)
            for slot in slots:
                runtime.release(slot)


def broken(runner: object, key: object) -> None:
    raise RuntimeError("a kernel failed")


@pytest.mark.parametrize(("precision", "kind"), [("FP4", Fp4Linear), ("FP8", Fp8Linear)])
def test_layers_that_a_device_cannot_multiply_are_logged(
    precision: str, kind: type[QuantisedLinear], caplog: pytest.LogCaptureFixture
):
    decoder = make_decoder("cpu")
    quantise(decoder, {"patch_blocks.0.attn.qkv_x": 4.0, "patch_blocks.0.mlp_x.w1": 4.0}, kind)
    with caplog.at_level("INFO", "engines.runtime"):
        TorchBackend(decoder).prepare(INFO, DeviceBuffers(torch.device("cpu")))
    expected = f"2 layers in {precision} are emulated: cpu multiplies their rounded values in float32"
    assert expected in caplog.messages


def test_a_network_without_quantised_layers_logs_nothing(caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO", "engines.runtime"):
        TorchBackend(make_decoder("cpu")).prepare(INFO, DeviceBuffers(torch.device("cpu")))
    assert not [message for message in caplog.messages if "emulated" in message]


def test_a_closed_runtime_is_freed_at_once():
    runtime = DeviceRuntime(TorchBackend(make_decoder("cpu")), torch.zeros(5, 24), INFO)
    runtime.warm_up()
    decode(runtime, make_sample())
    weights = weakref.ref(runtime.backend.decoder.y_pos_embedding)
    gc.disable()
    try:
        runtime.close()
        del runtime
        assert weights() is None
    finally:
        gc.enable()


def test_a_runtime_can_be_closed_before_it_is_warm():
    DeviceRuntime(TorchBackend(make_decoder("cpu")), torch.zeros(5, 24), INFO).close()
