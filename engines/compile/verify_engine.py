"""Engines on the GPU they are for, against PyTorch on the same GPU with the same inputs."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from engines.bundle import Bundle, empty_caption, load_folded
from engines.compile.results import DeviceResult
from engines.compile.verify_onnx import Inputs, compare, random_inputs
from engines.machine import device_name
from engines.pid.config import PidConfig
from engines.pid.sampler import MAX_STEPS, step_indices
from engines.runtime.device_runtime import Backend
from engines.runtime.open import runtime_info
from engines.runtime.slots import LazyGather
from engines.runtime.tensorrt_runtime import TensorRTBackend, open_engines
from engines.runtime.torch_runtime import TorchBackend
from engines.size import Size

_RUNS = 5
_FUSED_ATTENTION = re.compile(r"f?mha|flash|fused[_ ]?attention", re.IGNORECASE)


def check_on_device(bundle: Bundle, progress: Callable[[str], None]) -> DeviceResult:
    """`bundle` holds engines for the current CUDA device, and the weights that they were made of."""
    device = torch.device("cuda")
    info = runtime_info(bundle, device, slots=1, max_batch=1)
    engines = open_engines(bundle, device, max_batch=1)
    engines.prepare(info)
    reference = TorchBackend(load_folded(bundle, device))
    reference.prepare(info)
    caption = empty_caption(bundle)[None].float().to(device)
    errors, psnrs, times = {}, {}, {}
    torch.cuda.reset_peak_memory_stats()
    for size in info.sizes:
        name = f"{size}"
        progress(f"{name}: engines against PyTorch")
        inputs = one_image(reference.config, size, caption, device)
        ours, theirs = (OnStages(stages, size, caption.shape[1]) for stages in (reference, engines))
        errors[name], psnrs[name] = compare(ours, theirs, inputs)
        times[name] = 1000 * _seconds(theirs, inputs)
    return DeviceResult(
        device=device_name(device),
        velocity_error=errors,
        image_psnr=psnrs,
        milliseconds=times,
        peak_bytes=torch.cuda.max_memory_allocated() + engines.non_torch_bytes,
        fused_attention=fused_attention(engines),
    )


class OnStages:
    """Two stages of a runtime for one image of one size, over buffers that never move, as they require."""

    def __init__(self, stages: Backend, size: Size, caption_tokens: int) -> None:
        config, device = stages.config, stages.device
        self._stages, self._size = stages, size
        self._latent = torch.zeros(1, config.latent_channels, *config.latent_size(size), device=device)
        self._caption = torch.zeros(1, caption_tokens, config.caption_width, device=device)
        self._noise = torch.zeros(1, 3, *size, device=device)
        self._index, self._first = torch.zeros(2, 1, dtype=torch.long, device=device)

    def condition(self, latent: Tensor, caption: Tensor) -> list[Tensor]:
        self._latent.copy_(latent)
        self._caption.copy_(caption)
        return [tokens.clone() for tokens in self._stages.condition(self._size, self._latent, self._caption)]

    def step(self, x: Tensor, sigma: Tensor, index: Tensor, noise: Tensor, tokens: list[Tensor]) -> Tensor:
        self._noise.copy_(noise)
        self._index.copy_(index)
        state = LazyGather(tokens[1:], self._first)
        return self._stages.step(self._size, x, sigma, self._index, self._noise, tokens[0], state).clone()


def one_image(config: PidConfig, size: Size, caption: Tensor, device: torch.device) -> Inputs:
    """Random inputs of a finished latent's decode; caption [1, T, E]."""
    both = random_inputs(config, size, tokens=caption.shape[1])
    sigma = torch.zeros(1, device=device)
    return Inputs(both.latent[:1].to(device), caption.to(device), sigma, both.noise[:, :1].to(device))


@torch.inference_mode()
def _seconds(engines: OnStages, inputs: Inputs) -> float:
    """Median of whole decodes, without CUDA graphs."""
    seconds = []
    for _ in range(_RUNS + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        x, tokens = inputs.noise[0], engines.condition(inputs.latent, inputs.caption)
        for noise, row in zip(inputs.noise[1:], step_indices(MAX_STEPS), strict=True):
            x = engines.step(x, inputs.sigma, torch.full((1,), row, device=x.device), noise, tokens)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def fused_attention(engines: TensorRTBackend) -> bool:
    """Whether the step engines' layer information names a fused attention kernel."""
    return all(_FUSED_ATTENTION.search(text) for text in engines.layers("step"))
