"""Two implementations of one network: the reference as published, and the runtime that the server uses."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from engines.benchmark.roofline import NO_CHUNKING
from engines.benchmark.timing import synchronize
from engines.compile.inputs.calibrate import calibrate, crop_for_device, synthetic_calibration
from engines.compile.planning.layer_rules import assign_rules, linear_layers
from engines.machine import device_name
from engines.manifest import Precision, Quantised
from engines.pid import FoldedDecoder, PidConfig, PidDecoder, sample
from engines.pid.quantised import KINDS, quantise
from engines.pid.released import DecoderDescription
from engines.pid.sampler import MAX_STEPS, step_indices
from engines.runtime.buffers import DeviceBuffers
from engines.runtime.device_runtime import DeviceRuntime
from engines.runtime.protocol import RuntimeInfo, Sample
from engines.runtime.torch_runtime import TorchBackend
from engines.size import Size


def random_inputs(config: PidConfig, size: Size, device: torch.device, batch: int = 1) -> tuple[Tensor, Tensor]:
    """Draw unit normal latents [B, c, h, w] for an output size; the captions [B, T, E] are zeros. Both float32."""
    latent = torch.randn(batch, config.latent_channels, *config.latent_size(size), device=device)
    return latent, torch.zeros(batch, config.caption_tokens, config.caption_width, device=device)


def random_sample(runtime: DeviceRuntime, size: Size) -> Sample:
    """Draw an image to decode: a unit normal latent, without a caption."""
    return Sample(torch.randn(runtime.info.latent_channels, *runtime.info.latent_size(size)), size)


class ReferenceDecoder:
    """The network as the published code runs it.

    Weights are float32, under bf16 autocast if `autocast`. Modulations and adapter are computed at every step, and the
    pixel blocks hold all activations of the image at once.
    """

    def __init__(
        self, decoder: PidDecoder, inputs: tuple[Tensor, Tensor], size: Size, *, compiled: bool, autocast: bool
    ) -> None:
        """Decode latents [B, c, h, w] and captions [B, T, E] to images of `size`; `compiled` uses torch.compile."""
        self._decoder, self._size, self._autocast = decoder, size, autocast
        self._latent, self._caption = inputs
        self.device = self._latent.device
        decoder.pixel_memory_budget = NO_CHUNKING
        self._call = torch.compile(self._velocity) if compiled else self._velocity

    def _velocity(self, x: Tensor, t: Tensor, sigma: Tensor) -> Tensor:
        conditioning = self._decoder.condition(self._latent, self._caption, self._size)
        return self._decoder.velocity(x, t, conditioning, sigma)

    def velocity(self, x: Tensor, t: Tensor | float, conditioning: object, sigma: Tensor | float) -> Tensor:
        """Return the velocity [B, 3, H, W] at x; `conditioning` is ignored and recomputed, as in the published code."""
        batch = x.shape[0]
        timesteps, sigmas = (torch.full((batch,), float(value), device=x.device) for value in (t, sigma))
        return self._call(x, timesteps, sigmas)

    @torch.no_grad()
    def decode(self) -> None:
        """Decode the batch in four steps and wait for the device."""
        shape = (self._latent.shape[0], 3, *self._size)
        start, *step_noise = (torch.randn(shape, device=self.device) for _ in range(MAX_STEPS))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            unused: Any = None  # `velocity` computes the conditioning
            sample(self, unused, start, 0.0, step_noise)
        synchronize(self.device)


class ServingDecoder:
    """The same network folded, in the runtime that the server uses. Records the seconds of each stage."""

    def __init__(self, runtime: DeviceRuntime, batch: int, size: Size | None = None) -> None:
        """Decode batches of `batch` random latents at `size`, by default the first size of the runtime."""
        self._runtime, self._batch = runtime, batch
        self._sample = random_sample(runtime, size or runtime.info.sizes[0])
        self.reset_times()

    def reset_times(self) -> None:
        """Discard the recorded times, for example those of a warm-up."""
        self._times: dict[str, list[float]] = {"condition": [], "step": [], "finish": []}

    def decode(self, steps: int = MAX_STEPS) -> None:
        """Decode a batch, or run only the first `steps` steps of a four-step decode."""
        runtime, slots = self._runtime, []
        for _ in range(self._batch):
            with self._record("condition"):
                slots.append(runtime.start(self._sample))
        for index in step_indices(MAX_STEPS)[:steps]:
            with self._record("step"):
                runtime.step(slots, [index] * self._batch)
        for slot in slots:
            with self._record("finish"):
                self._finish(slot)

    def stage_seconds(self) -> dict[str, float]:
        """Return the median seconds of `condition` and `finish` (one image) and of `step` (the whole batch)."""
        return {stage: statistics.median(times) for stage, times in self._times.items()}

    def _finish(self, slot: int) -> None:
        rows = self._runtime.finish(slot)
        rows.wait(rows.pixels.shape[0])
        rows.close()
        self._runtime.release(slot)

    @contextmanager
    def _record(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        synchronize(self._runtime.device)
        self._times[stage].append(time.perf_counter() - started)


def make_runtime(
    folded: FoldedDecoder,
    description: DecoderDescription,
    sizes: Sequence[Size],
    batch: int,
    precision: Precision,
    compiled: bool = False,
    slots: int | None = None,
    max_pixels: int | None = None,
    buffers: DeviceBuffers | None = None,
) -> DeviceRuntime:
    """Wrap a folded network in the serving runtime, for batches of up to `batch` images; `slots` defaults to `batch`.

    The empty caption is zero and has the maximum length. Images of up to `max_pixels` are decoded in tiles. Runtimes
    that are given the same `buffers` share them.
    """
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
        max_pixels=max_pixels,
    )
    return DeviceRuntime(TorchBackend(folded, compiled), caption, info, buffers)


def calibrate_and_quantise(folded: FoldedDecoder, precision: Quantised = "fp8") -> None:
    """Quantise a network in place, all layers to one precision, calibrated with synthetic latents."""
    layers = [layer for layer, rule in assign_rules(linear_layers(folded), ()).items() if rule.quantised]
    calibration = crop_for_device(synthetic_calibration(folded.config), folded.config, folded.y_pos_embedding.device)
    caption = torch.zeros(folded.config.caption_tokens, folded.config.caption_width)
    ranges, _ = calibrate(folded, calibration, caption, layers, (), lambda _: None)
    quantise(folded, ranges.inputs, KINDS[precision])


def weight_bytes(folded: FoldedDecoder) -> int:
    """Return the size of all weights and tables in bytes."""
    return sum(tensor.nbytes for tensor in folded.state_dict().values())
