"""Engines on the GPU they are for, against PyTorch on the same GPU with the same inputs."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engines.bundle import Bundle, empty_caption, load_folded
from engines.compile.check import psnr, velocity_of_step
from engines.compile.results import DeviceResult
from engines.machine import device_name
from engines.pid.config import PidConfig, Size
from engines.pid.sampler import MAX_STEPS, TRANSITIONS, step_indices
from engines.runtime.device_runtime import Stages
from engines.runtime.open import runtime_info
from engines.runtime.slots import Gathered
from engines.runtime.tensorrt_runtime import TensorRTStages, open_engines
from engines.runtime.torch_runtime import TorchStages

_RUNS = 5
_FUSED_ATTENTION = re.compile(r"f?mha|flash|fused[_ ]?attention", re.IGNORECASE)


def check_on_device(bundle: Bundle, progress: Callable[[str], None]) -> DeviceResult:
    """`bundle` holds engines for the current CUDA device, and the weights that they were made of."""
    device = torch.device("cuda")
    info = runtime_info(bundle, device, slots=1, max_batch=1)
    engines = open_engines(bundle, device, max_batch=1)
    engines.prepare(info)
    reference = TorchStages(load_folded(bundle, device))
    reference.prepare(info)
    caption = empty_caption(bundle)[None].float().to(device)
    errors, psnrs, times = {}, {}, {}
    torch.cuda.reset_peak_memory_stats()
    for size in info.sizes:
        name = f"{size[0]}x{size[1]}"
        progress(f"{name}: engines against PyTorch")
        inputs = Inputs(reference.config, size, caption, device)
        errors[name], psnrs[name] = compare(reference, engines, inputs)
        times[name] = 1000 * _seconds(engines, inputs)
    return DeviceResult(
        device=device_name(device),
        velocity_error=errors,
        image_psnr=psnrs,
        milliseconds=times,
        peak_bytes=torch.cuda.max_memory_allocated() + engines.memory_outside,
        fused_attention=fused_attention(engines),
    )


class Inputs:
    """Random inputs of one decode in buffers that never move, as `Stages` require."""

    def __init__(self, config: PidConfig, size: Size, caption: Tensor, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        latent = torch.randn(1, config.latent_channels, *config.latent_size(size), generator=generator)
        noises = torch.randn(MAX_STEPS + 1, 1, 3, *size, generator=generator)
        self.size, self.caption = size, caption
        self.latent, self.sigma = latent.to(device), torch.zeros(1, device=device)
        self.start, self.noises = noises[0].to(device), noises[1:].to(device)
        self._noise, self._index = torch.zeros_like(self.start), torch.zeros(1, dtype=torch.long, device=device)
        self._first = torch.zeros(1, dtype=torch.long, device=device)

    def condition(self, stages: Stages) -> list[Tensor]:
        return [tokens.clone() for tokens in stages.condition(self.size, self.latent, self.caption)]

    def step(self, stages: Stages, x: Tensor, position: int, row: int, tokens: Sequence[Tensor]) -> Tensor:
        self._noise.copy_(self.noises[position])
        self._index.fill_(row)
        state = Gathered(tokens[1:], self._first)
        return stages.step(self.size, x, self.sigma, self._index, self._noise, tokens[0], state).clone()


@torch.inference_mode()
def compare(reference: Stages, engines: Stages, inputs: Inputs) -> tuple[tuple[float, ...], float]:
    """Relative velocity error of each step, from equal inputs, and the PSNR of two whole decodes in dB."""
    ours, theirs = inputs.condition(reference), inputs.condition(engines)
    x = alone = inputs.start
    errors = []
    for position, row in enumerate(step_indices(MAX_STEPS)):
        expected = inputs.step(reference, x, position, row, ours)
        actual = inputs.step(engines, x, position, row, theirs)
        noise = inputs.noises[position]
        velocity, other = (velocity_of_step(x, result, noise, *TRANSITIONS[row]) for result in (expected, actual))
        errors.append(((other - velocity).norm() / velocity.norm()).item())
        x, alone = expected, inputs.step(engines, alone, position, row, theirs)
    return tuple(errors), psnr(x.clamp(-1, 1), alone.clamp(-1, 1))


@torch.inference_mode()
def _seconds(engines: Stages, inputs: Inputs) -> float:
    """Median of whole decodes, without CUDA graphs."""
    seconds = []
    for _ in range(_RUNS + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        x, tokens = inputs.start, inputs.condition(engines)
        for position, row in enumerate(step_indices(MAX_STEPS)):
            x = inputs.step(engines, x, position, row, tokens)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def fused_attention(engines: TensorRTStages) -> bool:
    """Whether the step engines' layer information names a fused attention kernel."""
    return all(_FUSED_ATTENTION.search(text) for text in engines.layers("step"))
