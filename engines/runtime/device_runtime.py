"""A runtime on the CPU or on CUDA, whatever computes: slots, noise, batches, captured graphs, rows to the host."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from engines.errors import DecodeError, PidError
from engines.pid.config import PidConfig
from engines.pid.sampler import STEP_TRANSITIONS, NoiseSource
from engines.pixels import to_uint8
from engines.runtime.cuda_graphs import CudaGraphRunner, EagerRunner, GraphRunner, device_errors
from engines.runtime.host_rows import BufferPool, HostRows
from engines.runtime.protocol import RuntimeInfo, Sample, Slot
from engines.runtime.slots import Arena, LazyGather
from engines.size import Size


class Backend(Protocol):
    """The two graphs of a decode, see `engines.pid.graphs`: all in which runtimes differ.

    `condition` and `step` are captured as CUDA graphs, one for each size and batch. They may not allocate outside a
    graph's pool, wait for the host, or read Python state that changes between requests.
    """

    config: PidConfig
    dtype: torch.dtype  # of the caption tokens and the adapter's
    device: torch.device
    non_torch_bytes: int  # bytes on the device that PyTorch's allocator does not know of

    def prepare(self, info: RuntimeInfo) -> None:
        """Allocate and choose whatever condition and step need, anew each time."""

    def condition(self, size: Size, latent: Tensor, caption: Tensor) -> Sequence[Tensor]:
        """Inputs and outputs of `ConditionGraph`; the inputs are buffers that never move."""

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
        """Inputs and output of `StepGraph`; step_index and noise are buffers that never move."""

    def warmed_up(self) -> None:
        """All that will be captured has been."""


class DeviceRuntime:
    """Decodes with two `Backend`.

    Every piece of work (condition, step, finish; per size and batch) runs over fixed buffers: the arena of slots and a
    few inputs. On CUDA each is a graph, captured at warm-up, largest first. A step gathers its images from their slots,
    so any images of one size can share a step, whatever step each is at.
    """

    def __init__(self, stages: Backend, empty_caption: Tensor, info: RuntimeInfo) -> None:
        """empty_caption [info.caption_tokens, E]."""
        self.stages, self.info, self.device = stages, info, stages.device
        self._empty_caption = empty_caption
        self._noise: dict[Slot, NoiseSource] = {}
        self._sizes: dict[Slot, Size] = {}
        self._execution: GraphRunner

    @torch.inference_mode()
    def warm_up(self) -> None:
        with device_errors():
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # of this thread; graphs are captured on the current device
            self._execution = CudaGraphRunner(self.device) if self.device.type == "cuda" else EagerRunner()
            self.stages.prepare(self.info)
            self._allocate()
            by_area = sorted(self.info.sizes, key=lambda size: size[0] * size[1], reverse=True)
            for size in by_area:
                for batch in range(self.info.max_batch, 0, -1):
                    self._execution.prepare(("step", size, batch), partial(self._step_work, size, batch))
                self._execution.prepare(("condition", size), partial(self._condition_work, size))
                self._execution.prepare(("finish", size), partial(self._finish_work, size))
            self._synchronize()
            self.stages.warmed_up()

    def _allocate(self) -> None:
        info, device = self.info, self.device
        self._arena = Arena(self.stages.config, info.sizes, info.caption_tokens, info.slots, self.stages.dtype, device)
        pixels = max(height * width for height, width in info.sizes)
        batch = info.max_batch
        # Inputs of the prepared work; the same addresses for every size, each using the part that it needs.
        self._slot_index = torch.zeros(batch, dtype=torch.long, device=device)
        self._step_index = torch.zeros(batch, dtype=torch.long, device=device)
        self._step_noise = torch.zeros(batch * 3 * pixels, device=device)
        cells = max(h * w for h, w in map(info.latent_size, info.sizes))
        self._latent = torch.zeros(info.latent_channels * cells, device=device)
        self._caption = torch.zeros(1, info.caption_tokens, info.caption_width, device=device)
        self._image = torch.zeros(3 * pixels, dtype=torch.uint8, device=device)
        self._finite = torch.ones((), dtype=torch.bool, device=device)
        self._host = BufferPool(info.slots + 1, 3 * pixels, pinned=device.type == "cuda")
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    # The prepared work; what holds for `Backend` holds here.

    def _condition_work(self, size: Size) -> None:
        fields, index = self._arena.fields[size], self._slot_index[:1]
        values = self.stages.condition(size, self._latent_view(size), self._caption)
        for field, value in zip((fields.caption, *fields.tokens), values, strict=True):
            field.index_copy_(0, index, value)

    def _step_work(self, size: Size, batch: int) -> None:
        fields, index = self._arena.fields[size], self._slot_index[:batch]
        next_x = self.stages.step(
            size,
            fields.x.index_select(0, index),  # [b, 3, H, W]
            fields.sigma.index_select(0, index)[:, 0],
            self._step_index[:batch],
            self._noise_view(size, batch),
            fields.caption.index_select(0, index),
            LazyGather(fields.tokens, index),
        )
        fields.x.index_copy_(0, index, next_x)

    def _finish_work(self, size: Size) -> None:
        x = self._arena.fields[size].x.index_select(0, self._slot_index[:1])[0]  # [3, H, W]
        self._image_view(size).copy_(to_uint8(x).permute(1, 2, 0))
        self._finite.copy_(x.isfinite().all())

    # The runtime's methods.

    @torch.inference_mode()
    def start(self, sample: Sample) -> Slot:
        if sample.size not in self._arena.fields:
            raise DecodeError(f"This runtime does not decode to {sample.size}.")
        slot = self._arena.take()
        try:
            with device_errors():
                caption = self._empty_caption if sample.caption is None else sample.caption
                self._latent_view(sample.size).copy_(sample.latent[None])
                self._caption.copy_(caption[None])
                self._slot_index[0] = slot
                fields = self._arena.fields[sample.size]
                fields.sigma[slot] = sample.sigma
                self._noise[slot] = NoiseSource(sample.seed, self.device)
                self._noise[slot].draw_into(fields.x[slot])
                self._sizes[slot] = sample.size
                self._execution.run(("condition", sample.size))
                self._synchronize()  # what a stage costs is told by its own time, not by the next one's
        except BaseException:
            self.release(slot)
            raise
        return slot

    @torch.inference_mode()
    def step(self, slots: Sequence[Slot], indices: Sequence[int]) -> None:
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
                self._execution.run(("step", size, batch))
                self._synchronize()
        except PidError:
            for source, state in zip(sources, before, strict=True):  # the step may be tried again
                source.restore(state)
            raise

    @torch.inference_mode()
    def finish(self, slot: Slot) -> HostRows:
        size = self._sizes[slot]
        rows = HostRows(self._host, size)
        try:
            with device_errors():
                self._slot_index[0] = slot
                if self._copy_stream is None:
                    self._execution.run(("finish", size))
                    rows.fill(self._image_view(size), self._finite.clone())
                else:
                    self._finish_on_cuda(size, rows, self._copy_stream)
        except BaseException:
            rows.close()
            raise
        return rows

    def _finish_on_cuda(self, size: Size, rows: HostRows, copies: torch.cuda.Stream) -> None:
        compute = torch.cuda.current_stream(self.device)
        compute.wait_stream(copies)  # the image before this one may still be leaving
        self._execution.run(("finish", size))
        copies.wait_stream(compute)
        with torch.cuda.stream(copies):
            rows.fill(self._image_view(size), self._finite.to("cpu", non_blocking=True))

    def release(self, slot: Slot) -> None:
        self._noise.pop(slot, None)
        self._sizes.pop(slot, None)
        self._arena.give_back(slot)

    def peak_memory(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) + self.stages.non_torch_bytes
        return None

    def close(self) -> None:
        self._synchronize()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _latent_view(self, size: Size) -> Tensor:
        shape = (1, self.info.latent_channels, *self.info.latent_size(size))
        return self._latent[: shape[1] * shape[2] * shape[3]].view(shape)

    def _noise_view(self, size: Size, batch: int) -> Tensor:
        return self._step_noise[: batch * 3 * size[0] * size[1]].view(batch, 3, *size)

    def _image_view(self, size: Size) -> Tensor:
        return self._image[: 3 * size[0] * size[1]].view(*size, 3)
