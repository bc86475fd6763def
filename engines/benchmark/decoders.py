"""The two ways of running one network: as published, and in the runtime that serves."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from engines.benchmark.roofline import UNLIMITED, synchronize
from engines.compile.calibrate import calibrate, fit, synthetic_calibration
from engines.compile.quantise import choose, linear_layers
from engines.machine import device_name
from engines.manifest import Precision
from engines.pid import FoldedDecoder, PidDecoder, fp8, sample
from engines.pid.released import DecoderDescription
from engines.pid.sampler import MAX_STEPS, step_indices
from engines.runtime.device_runtime import DeviceRuntime
from engines.runtime.protocol import RuntimeInfo, Sample
from engines.runtime.torch_runtime import TorchBackend
from engines.size import Size


class ReferenceDecoder:
    """The network as published code runs it: everything live, at every step."""

    def __init__(self, decoder: PidDecoder, latent: Tensor, caption: Tensor, size: Size, compiled: bool) -> None:
        self._decoder, self._latent, self._caption, self._size = decoder, latent, caption, size
        self.device = latent.device
        self.autocast = False
        decoder.pixel_memory_budget = UNLIMITED
        self._call = torch.compile(self._velocity) if compiled else self._velocity

    def _velocity(self, x: Tensor, t: Tensor, sigma: Tensor) -> Tensor:
        conditioning = self._decoder.condition(self._latent, self._caption, self._size)
        return self._decoder.velocity(x, t, conditioning, sigma)

    def velocity(self, x: Tensor, t: Tensor | float, conditioning: object, sigma: Tensor | float) -> Tensor:
        batch = x.shape[0]
        times, sigmas = (torch.full((batch,), float(value), device=x.device) for value in (t, sigma))
        return self._call(x, times, sigmas)

    @torch.no_grad()
    def decode(self) -> None:
        shape = (self._latent.shape[0], 3, *self._size)
        start, *step_noise = (torch.randn(shape, device=self.device) for _ in range(MAX_STEPS))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            conditioning = self._decoder.condition(self._latent, self._caption, self._size)
            sample(self, conditioning, start, 0.0, step_noise)
        synchronize(self.device)


class ServingDecoder:
    """The same network folded, in the runtime that serves."""

    def __init__(self, runtime: DeviceRuntime, batch: int, size: Size | None = None) -> None:
        """`size` is by default the runtime's first."""
        self._runtime, self._batch = runtime, batch
        size = size or runtime.info.sizes[0]
        self._sample = Sample(torch.randn(runtime.info.latent_channels, *runtime.info.latent_size(size)), size)
        self.stages: dict[str, list[float]] = {"condition": [], "step": [], "finish": []}

    def decode(self, steps: int = MAX_STEPS) -> None:
        """Decode a batch, or take only the first `steps` of a decode in four."""
        runtime = self._runtime
        slots = [self._timed("condition", runtime.start, self._sample) for _ in range(self._batch)]
        for index in step_indices(MAX_STEPS)[:steps]:
            self._timed("step", runtime.step, slots, [index] * self._batch)
        for slot in slots:
            self._timed("finish", self._finish, slot)

    def stage_seconds(self) -> dict[str, float]:
        return {stage: statistics.median(times) for stage, times in self.stages.items()}

    def _finish(self, slot: int) -> None:
        rows = self._runtime.finish(slot)
        rows.wait(rows.pixels.shape[0])
        rows.close()
        self._runtime.release(slot)

    def _timed(self, stage: str, work: Callable[..., Any], *arguments: Any) -> Any:
        began = time.perf_counter()
        result = work(*arguments)
        synchronize(self._runtime.device)
        self.stages[stage].append(time.perf_counter() - began)
        return result


def make_runtime(
    folded: FoldedDecoder,
    description: DecoderDescription,
    sizes: Sequence[Size],
    batch: int,
    precision: Precision,
    compiled: bool = False,
    slots: int | None = None,
) -> DeviceRuntime:
    """A runtime that decodes `batch` images at once, and by default holds no more."""
    config, device = folded.config, folded.y_pos_embedding.device
    caption = torch.zeros(config.caption_tokens, config.caption_width)
    info = RuntimeInfo(
        decoder=description.name,
        latent_space=description.latent_space.name,
        latent_channels=config.latent_channels,
        pixels_per_cell=config.pixels_per_cell,
        upscale=config.upscale,
        sigma_frame=description.latent_space.sigma_frame,
        caption_tokens=len(caption),
        caption_width=config.caption_width,
        sizes=tuple(sizes),
        max_batch=batch,
        slots=slots or batch,
        precision=precision,
        kind="torch",
        device=device_name(device),
    )
    return DeviceRuntime(TorchBackend(folded, compiled), caption, info)


def quantise(folded: FoldedDecoder) -> None:
    """To FP8 in place, as the builder does it without latents to calibrate with."""
    layers = [layer for layer, rule in choose(linear_layers(folded), ()).items() if rule.fp8]
    calibration = fit(synthetic_calibration(folded.config), folded.config, folded.y_pos_embedding.device)
    caption = torch.zeros(folded.config.caption_tokens, folded.config.caption_width)
    largest, _ = calibrate(folded, calibration, caption, layers, lambda _: None)
    fp8.quantise(folded, largest)


def weight_bytes(folded: FoldedDecoder) -> int:
    return sum(tensor.nbytes for tensor in folded.state_dict().values())
