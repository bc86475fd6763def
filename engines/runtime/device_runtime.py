"""The runtime for CPU and CUDA devices: slots, noise, batches, CUDA graphs, and the copies of rows to the host."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engines.errors import DecodeError, PidError
from engines.pid.config import PidConfig
from engines.pid.sampler import STEP_TRANSITIONS, NoiseSource
from engines.pixels import to_uint8
from engines.runtime.cuda_graphs import (
    CudaGraphRunner,
    EagerRunner,
    GraphRunner,
    device_errors,
    other_bytes,
    preparing,
)
from engines.runtime.host_rows import BufferPool, HostRows, nbytes
from engines.runtime.kernels.choice import Choice
from engines.runtime.previews import preview
from engines.runtime.protocol import RuntimeInfo, Sample, Slot, preview_size
from engines.runtime.slots import Arena, LazyGather, select
from engines.runtime.staging import StagedInput
from engines.size import Size


class Backend(Protocol):
    """Implementation of the two graphs of a decode (`engines.pid.graphs`): the only part that differs between runtimes.

    `condition` and `step` are captured as CUDA graphs, one per size and batch. They must not allocate memory outside
    the pool of a graph, wait for the device, or read Python state that changes between requests.
    """

    config: PidConfig
    dtype: torch.dtype  # of caption tokens and adapter tokens
    device: torch.device
    choices: Sequence[Choice]  # measurements by which `prepare` chose kernels

    def prepare(self, info: RuntimeInfo) -> None:
        """Allocate and choose everything that `condition` and `step` need. Called again on every warm-up."""

    def condition(self, size: Size, latent: Tensor, caption: Tensor) -> Sequence[Tensor]:
        """Run `ConditionGraph`. The inputs are buffers that never move."""

    def step(
        self,
        size: Size,
        x: Tensor,
        sigma: Tensor,
        step_index: Tensor,
        noise: Tensor,
        caption: Tensor,
        tokens: LazyGather,
    ) -> Tensor:
        """Run `StepGraph`. `step_index` and `noise` are buffers that never move."""

    def on_captured(self) -> None:
        """Complete the warm-up: called once all CUDA graphs have been captured."""


class DeviceRuntime:
    """Decodes with a `Backend`; implements `protocol.Runtime`.

    All work (condition, step, preview, finish; per size and batch) runs over fixed buffers: the arena and a few inputs.
    On CUDA each piece of work is a graph, captured during warm-up, largest first. A step gathers its images from their
    slots, so any images of the same size can share a step, even if they are at different steps.

    Attributes:
        backend: Implementation of the two graphs.
        info: Decoder, limits and device.
        device: Device of the backend.
    """

    def __init__(self, backend: Backend, empty_caption: Tensor, info: RuntimeInfo) -> None:
        """Create a runtime that decodes after `warm_up`; `empty_caption` is [info.caption_tokens, E]."""
        self.backend, self.info, self.device = backend, info, backend.device
        self._empty_caption = empty_caption
        self._noise: dict[Slot, NoiseSource] = {}
        self._sizes: dict[Slot, Size] = {}
        self._stepped: dict[Slot, tuple[int, int]] = {}  # of the last step: position in the batch, and step index
        self._runner: GraphRunner
        self._other_bytes = 0  # device memory in use that PyTorch did not allocate
        self._peak_bytes: int | None = None

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Allocate all buffers, and capture the graphs on CUDA."""
        with device_errors():
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # per thread; graphs are captured on the current device
            self._runner = CudaGraphRunner(self.device) if self.device.type == "cuda" else EagerRunner()
            with preparing, self._runner.stream():
                self.backend.prepare(self.info)
                self._allocate()
            for size in sorted(self.info.sizes, key=lambda size: size.area, reverse=True):
                for batch in range(self.info.max_batch, 0, -1):
                    self._runner.prepare(("step", size, batch), partial(self._step_work, size, batch))
                self._runner.prepare(("condition", size), partial(self._condition_work, size))
                self._runner.prepare(("finish", size), partial(self._finish_work, size))
                self._runner.prepare(("preview", size), partial(self._preview_work, size))
            self._synchronize()
            self.backend.on_captured()
            if self.device.type == "cuda":
                self._other_bytes = other_bytes(self.device)
                self._update_peak()

    def _allocate(self) -> None:
        info, device = self.info, self.device
        self._arena = Arena(
            self.backend.config, info.sizes, info.caption_tokens, info.slots, self.backend.dtype, device
        )
        pixels = max(size.area for size in info.sizes)
        batch = info.max_batch
        # Inputs of the prepared work. Each size uses the first part of the same buffers.
        self._slot_index = torch.zeros(batch, dtype=torch.long, device=device)
        self._step_index = torch.zeros(batch, dtype=torch.long, device=device)
        self._step_noise = torch.zeros(batch * 3 * pixels, device=device)
        cells = max(info.latent_size(size).area for size in info.sizes)
        self._latent = StagedInput(info.latent_channels * cells, device)
        self._caption = StagedInput(info.caption_tokens * info.caption_width, device)
        self._empty_caption = self._empty_caption.to(device)
        self._next_t = torch.tensor([next_t for _, next_t in STEP_TRANSITIONS], device=device)  # by step index
        self._noise_index = torch.zeros(1, dtype=torch.long, device=device)
        previews = max(preview_size(size).area for size in info.sizes)
        self._preview = torch.zeros(3 * previews, dtype=torch.uint8, device=device)
        self._image = torch.zeros(3 * pixels, dtype=torch.uint8, device=device)
        self._finite = torch.ones((), dtype=torch.bool, device=device)
        self._host = BufferPool(info.slots + 1, max(map(nbytes, info.sizes)), pinned=device.type == "cuda")
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    # The prepared work, with the restrictions documented on `Backend`.

    def _condition_work(self, size: Size) -> None:
        state, index = self._arena.states[size], self._slot_index[:1]
        latent = self._latent.view((1, self.info.latent_channels, *self.info.latent_size(size)))
        caption = self._caption.view((1, self.info.caption_tokens, self.info.caption_width))
        values = self.backend.condition(size, latent, caption)
        for target, value in zip((state.caption, *state.tokens), values, strict=True):
            target.index_copy_(0, index, value)

    def _step_work(self, size: Size, batch: int) -> None:
        state, index = self._arena.states[size], self._slot_index[:batch]
        next_x = self.backend.step(
            size,
            select(state.x, index),  # [b, 3, H, W]
            state.sigma.index_select(0, index)[:, 0],
            self._step_index[:batch],
            self._noise_view(size, batch),
            select(state.caption, index),
            LazyGather(state.tokens, index),
        )
        state.x.index_copy_(0, index, next_x)

    def _finish_work(self, size: Size) -> None:
        x = select(self._arena.states[size].x, self._slot_index[:1])[0]  # [3, H, W]
        self._image_view(size).copy_(to_uint8(x).permute(1, 2, 0))
        self._finite.copy_(x.isfinite().all())

    def _preview_work(self, size: Size) -> None:
        x = select(self._arena.states[size].x, self._slot_index[:1])  # [1, 3, H, W]
        noise = self._noise_view(size, self.info.max_batch).index_select(0, self._noise_index)
        self._preview_view(size).copy_(preview(x, noise, self._next_t.index_select(0, self._step_index[:1])))

    # The interface of `protocol.Runtime`.

    @torch.inference_mode()
    def start(self, sample: Sample) -> Slot:
        """Condition on latent and caption, and draw the starting noise, in a free slot."""
        if sample.size not in self._arena.states:
            raise DecodeError(f"This runtime does not support the size {sample.size}.")
        slot = self._arena.acquire()
        try:
            with device_errors():
                self._latent.write(sample.latent)
                self._caption.write(self._empty_caption if sample.caption is None else sample.caption)
                self._slot_index[0].fill_(slot)  # an assignment would wait for the device
                state = self._arena.states[sample.size]
                state.sigma[slot].fill_(sample.sigma)
                self._noise[slot] = NoiseSource(sample.seed, self.device)
                self._noise[slot].draw_into(state.x[slot])
                self._sizes[slot] = sample.size
                self._runner.run(("condition", sample.size))
                self._synchronize()  # so that the cost is measured here and not as part of the next step
        except BaseException:
            self.release(slot)
            raise
        return slot

    @torch.inference_mode()
    def step(self, slots: Sequence[Slot], indices: Sequence[int]) -> None:
        """Run one step of images of the same size. If it fails it can be repeated with the same result."""
        size, batch = self._sizes[slots[0]], len(slots)
        sources = [self._noise[slot] for slot in slots]
        before = [source.state() for source in sources]
        try:
            with device_errors():
                self._slot_index[:batch] = torch.tensor(slots)
                self._step_index[:batch] = torch.tensor(indices)
                for noise, source, index in zip(self._noise_view(size, batch), sources, indices, strict=True):
                    if STEP_TRANSITIONS[index][1] > 0:
                        source.draw_into(noise)
                self._runner.run(("step", size, batch))
                self._synchronize()
            self._stepped = dict(zip(slots, enumerate(indices), strict=True))
        except PidError:
            for source, state in zip(sources, before, strict=True):
                source.restore(state)
            raise

    @torch.inference_mode()
    def preview(self, slot: Slot) -> np.ndarray:
        """Return the preview of an image that was part of the last step, and wait for it."""
        size = self._sizes[slot]
        position, index = self._stepped[slot]
        with device_errors():
            self._slot_index[0].fill_(slot)
            self._noise_index[0].fill_(position)
            self._step_index[0].fill_(index)
            self._runner.run(("preview", size))
            return self._preview_view(size).to("cpu", copy=True).numpy()

    @torch.inference_mode()
    def finish(self, slot: Slot) -> HostRows:
        """Start copying the image to the host."""
        size = self._sizes[slot]
        rows = HostRows(self._host, size)
        try:
            with device_errors():
                self._slot_index[0].fill_(slot)
                if self._copy_stream is None:
                    self._runner.run(("finish", size))
                    rows.fill(self._image_view(size), self._finite)
                else:
                    self._finish_on_cuda(size, rows, self._copy_stream)
        except BaseException:
            rows.close()
            raise
        return rows

    def _finish_on_cuda(self, size: Size, rows: HostRows, copies: torch.cuda.Stream) -> None:
        compute = torch.cuda.current_stream(self.device)
        compute.wait_stream(copies)  # the previous image may still be being copied from the same buffer
        self._runner.run(("finish", size))
        copies.wait_stream(compute)
        with torch.cuda.stream(copies):
            rows.fill(self._image_view(size), self._finite)
        self._update_peak()

    def release(self, slot: Slot) -> None:
        """Release the slot; valid at any stage."""
        self._noise.pop(slot, None)
        self._sizes.pop(slot, None)
        self._arena.release(slot)

    def peak_memory(self) -> int | None:
        """Return the peak of the device memory in use in bytes; None on the CPU and before the warm-up.

        It includes the CUDA context, kernels and TensorRT engines, and what other processes had in use at the warm-up.
        """
        return self._peak_bytes

    def kernel_choices(self) -> Sequence[Choice]:
        """Return the measurements by which the backend chose kernels."""
        return self.backend.choices

    def close(self) -> None:
        """Wait for the device to finish."""
        self._synchronize()

    def _update_peak(self) -> None:
        """Read the allocator's peak, on the device's thread: a hung driver may hold the allocator's lock."""
        self._peak_bytes = torch.cuda.max_memory_reserved(self.device) + self._other_bytes

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _noise_view(self, size: Size, batch: int) -> Tensor:
        return self._step_noise[: batch * 3 * size.area].view(batch, 3, *size)

    def _preview_view(self, size: Size) -> Tensor:
        small = preview_size(size)
        return self._preview[: 3 * small.area].view(*small, 3)

    def _image_view(self, size: Size) -> Tensor:
        return self._image[: 3 * size.area].view(*size, 3)
