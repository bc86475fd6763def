"""Verifies compiled engines on the GPU they were compiled for, by comparison with PyTorch on the same GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from engines.bundle import Bundle, empty_caption, load_folded
from engines.compile.comparison import DecodeInputs, compare, random_decode_inputs
from engines.compile.kernel_records import names_fused_attention
from engines.compile.results import DeviceResult
from engines.machine import device_name
from engines.pid.config import PidConfig
from engines.pid.sampler import MAX_STEPS, step_indices
from engines.runtime.backend import Backend
from engines.runtime.buffers import DeviceBuffers, Needs
from engines.runtime.open import runtime_info
from engines.runtime.slots import LazyGather
from engines.runtime.tensorrt_runtime import TensorRTBackend, open_engines
from engines.runtime.torch_runtime import TorchBackend
from engines.size import Size

_RUNS = 5


def verify_engines(bundle: Bundle, progress: Callable[[str], None]) -> DeviceResult:
    """Compare the engines of a bundle with PyTorch on the first GPU, and measure time and memory.

    Args:
        bundle: Engines for this device, and the weights that they were made from.
        progress: Called with a description of each comparison.

    Raises:
        VerificationError: An engine, or PyTorch, produces infinity or NaN.
    """
    device = torch.device("cuda", 0)
    info = runtime_info(bundle, device, slots=1, max_batch=1)
    engines = open_engines(bundle, device)
    buffers = DeviceBuffers(device)
    buffers.reserve(Needs(1, engines.buffer_counts(info)))
    engines.prepare(info, buffers)
    reference = TorchBackend(load_folded(bundle, device))
    reference.prepare(info, buffers)
    caption = empty_caption(bundle)[None].float().to(device)
    errors, psnrs, times = {}, {}, {}
    torch.cuda.reset_peak_memory_stats()
    for size in info.sizes:
        progress(f"{size}: engines against PyTorch")
        inputs = single_image_inputs(reference.config, size, caption, device)
        expected, actual = (BackendGraphs(backend, size, caption.shape[1]) for backend in (reference, engines))
        found = compare(expected, actual, inputs, f"TensorRT at {size}")
        errors[str(size)], psnrs[str(size)] = found.velocity_error, found.image_psnr
        times[str(size)] = 1000 * _decode_seconds(actual, inputs)
    return DeviceResult(
        device=device_name(device),
        velocity_error=errors,
        image_psnr=psnrs,
        milliseconds=times,
        peak_bytes=torch.cuda.max_memory_allocated() + engines.non_torch_bytes,
        fused_attention=has_fused_attention(engines),
    )


class BackendGraphs:
    """The graphs of a runtime backend for one image of one size, with the fixed input buffers that backends require."""

    def __init__(self, backend: Backend, size: Size, caption_tokens: int) -> None:
        config, device = backend.config, backend.device
        self._backend, self._size = backend, size
        self._latent = torch.zeros(1, config.latent_channels, *config.latent_size(size), device=device)
        self._caption = torch.zeros(1, caption_tokens, config.caption_width, device=device)
        self._noise = torch.zeros(1, 3, *size, device=device)
        self._index, self._first_slot = torch.zeros(2, 1, dtype=torch.long, device=device)

    def condition(self, latent: Tensor, caption: Tensor) -> list[Tensor]:
        """Return caption tokens and adapter tokens for one image."""
        self._latent.copy_(latent)
        self._caption.copy_(caption)
        return [tokens.clone() for tokens in self._backend.condition(self._size, self._latent, self._caption)]

    def step(self, x: Tensor, sigma: Tensor, index: Tensor, noise: Tensor, tokens: list[Tensor]) -> Tensor:
        """Return the next x."""
        self._noise.copy_(noise)
        self._index.copy_(index)
        adapter = LazyGather(tokens[1:], self._first_slot)
        return self._backend.step(self._size, x, sigma, self._index, self._noise, tokens[0], adapter).clone()


def single_image_inputs(config: PidConfig, size: Size, caption: Tensor, device: torch.device) -> DecodeInputs:
    """Make random inputs for one image with a noise-free latent; caption [1, T, E]."""
    batch = random_decode_inputs(config, size, caption_tokens=caption.shape[1])
    sigma = torch.zeros(1, device=device)
    return DecodeInputs(batch.latent[:1].to(device), caption.to(device), sigma, batch.noise[:, :1].to(device))


@torch.inference_mode()
def _decode_seconds(engines: BackendGraphs, inputs: DecodeInputs) -> float:
    """Return the median duration of a whole decode, without CUDA graphs."""
    seconds = []
    for _ in range(_RUNS + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        x, tokens = inputs.noise[0], engines.condition(inputs.latent, inputs.caption)
        for noise, row in zip(inputs.noise[1:], step_indices(MAX_STEPS), strict=True):
            x = engines.step(x, inputs.sigma, torch.full((1,), row, device=x.device), noise, tokens)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def has_fused_attention(engines: TensorRTBackend) -> bool:
    """Return whether the layer information of the step engine names a fused attention kernel."""
    return names_fused_attention(engines.layers("step"))
