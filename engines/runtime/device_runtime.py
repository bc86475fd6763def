"""The runtime for CPU and CUDA devices: slots, noise, batches, tiles, and the copies of rows to the host."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engines.errors import DecodeError, PidError
from engines.pid.sampler import STEP_TRANSITIONS, NoiseSource
from engines.runtime.backend import Backend
from engines.runtime.buffers import DeviceBuffers, runtime_needs
from engines.runtime.cuda_graphs import device_errors, other_bytes
from engines.runtime.host_rows import HostRows
from engines.runtime.kernels.choice import Choice
from engines.runtime.prepared_work import PreparedWork
from engines.runtime.protocol import RuntimeInfo, Sample, Slot, preview_size
from engines.runtime.tiled_images import TileBuffers, TiledImage
from engines.runtime.weights import FixedWeights, Weights
from engines.size import Size


class DeviceRuntime:
    """Decodes with a `Backend`; implements `protocol.Runtime`.

    All work (condition, step, preview, finish; per size and batch) runs over fixed buffers: the slots and a few inputs.
    On CUDA each piece of work is a graph, captured during warm-up, largest first. A step gathers its images from their
    slots, so any images of the same size can share a step, even if they are at different steps. Runtimes can share the
    buffers if one thread calls all of them, and previews an image before a step of another runtime.

    To this work, a tile is an image of its size. What it reads from the whole image, and what it adds to it, is copied
    before and after the graphs, because the addresses differ between tiles.

    Attributes:
        backend: Implementation of the two graphs.
        info: Decoder, limits and device.
        device: Device of the backend.
    """

    def __init__(
        self,
        backend: Backend,
        empty_caption: Tensor,
        info: RuntimeInfo,
        buffers: DeviceBuffers | None = None,
        weights: Weights | None = None,
    ) -> None:
        """Create a runtime that decodes after `warm_up`.

        Args:
            backend: Implementation of the two graphs.
            empty_caption: [info.caption_tokens, E].
            info: Decoder, limits and device.
            buffers: Memory that it shares with other runtimes of the device; by default it has its own.
            weights: Weights of the backend; by default, they stay on the device.
        """
        self.backend, self.info, self.device = backend, info, backend.device
        self._empty_caption, self._weights = empty_caption, weights or FixedWeights()
        self._buffers = DeviceBuffers(self.device) if buffers is None else buffers
        self._buffers.reserve(runtime_needs(backend.config, backend.dtype, info, backend.buffer_counts(info)))
        self._work = PreparedWork(backend, info, self._buffers)
        self._noise: dict[Slot, NoiseSource] = {}
        self._sizes: dict[Slot, Size] = {}
        self._tiled: dict[Slot, TiledImage] = {}
        self._stepped: dict[Slot, tuple[int, int]] = {}  # of the last step: position in the batch, and step index
        self._other_bytes = 0  # device memory in use that PyTorch did not allocate
        self._peak_bytes: int | None = None

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Move the weights to the device, allocate the buffers that it does not share yet, and capture CUDA graphs."""
        on_cuda = self.device.type == "cuda"
        with self._buffers.add_plan_to_memory_errors(), device_errors():
            if on_cuda:
                torch.cuda.set_device(self.device)  # per thread; graphs are captured on the current device
            self._weights.restore()
            self._work.prepare()
            self._empty_caption = self._empty_caption.to(self.device)
            self._synchronize()
            self.backend.on_captured()
            self._weights.save()  # some kernels need a memory layout of their own
            if (tiled := self.info.smallest_tiled_size) is not None:
                self._decode_in_tiles(tiled)
            if on_cuda:
                self._other_bytes = other_bytes(self.device) - self._weights.pool_bytes()
                self._update_peak()

    def _decode_in_tiles(self, size: Size) -> None:
        """Run one step of an image in tiles, and preview it: the work around the graphs loads kernels too."""
        slot = self.start(Sample(torch.zeros(self.info.latent_channels, *self.info.latent_size(size)), size))
        for _ in range(len(self.info.tiles(size) or ())):
            self.step([slot], [0])
        self.preview(slot)
        self.finish(slot).close()
        self.release(slot)

    @torch.inference_mode()
    def start(self, sample: Sample) -> Slot:
        """Draw the starting noise in a free slot, and condition on latent and caption unless the image is in tiles."""
        self._check_weights()
        plan = self.info.tiles(sample.size)
        if plan is None and sample.size not in self.info.sizes:
            raise DecodeError(f"This runtime does not support the size {sample.size}.")
        slot = self._buffers.free_slots.acquire()
        try:
            if plan is not None:
                self._tiled[slot] = TiledImage(plan, self.info, TileBuffers.of_slot(self._buffers, slot))
            with device_errors():
                self._start(slot, sample)
                self._synchronize()  # so that the cost is measured here and not as part of the next step
        except BaseException:
            self.release(slot)
            raise
        return slot

    def _start(self, slot: Slot, sample: Sample) -> None:
        work, tiled = self._work, self._tiled.get(slot)
        work.latent.write(sample.latent)
        work.caption.write(self._empty_caption if sample.caption is None else sample.caption)
        state = work.states[sample.size if tiled is None else tiled.plan.tile]
        state.sigma[slot].fill_(sample.sigma)
        self._noise[slot] = NoiseSource(sample.seed, self.device)
        self._sizes[slot] = sample.size
        if tiled is None:
            self._noise[slot].draw_into(state.x[slot])
            work.condition(slot, sample.size)
        else:
            tiled.start(self._noise[slot], work.latent_view(sample.size)[0], work.caption_view())

    @torch.inference_mode()
    def step(self, slots: Sequence[Slot], indices: Sequence[int]) -> None:
        """Run one step of images of the same size, or one tile of it. It can be repeated if it fails."""
        self._check_weights()
        if len(slots) > 1 and not self._tiled.keys().isdisjoint(slots):
            raise DecodeError("An image in tiles cannot be part of a batch.")
        sources = [self._noise[slot] for slot in slots]
        before = [source.state() for source in sources]
        try:
            with device_errors():
                if slots[0] in self._tiled:
                    self._step_tile(slots[0], indices[0])
                else:
                    self._step_batch(slots, indices)
                self._synchronize()
            self._stepped = dict(zip(slots, enumerate(indices), strict=True))
        except PidError:
            for source, state in zip(sources, before, strict=True):
                source.restore(state)
            raise

    def _step_batch(self, slots: Sequence[Slot], indices: Sequence[int]) -> None:
        size = self._sizes[slots[0]]
        for noise, slot, index in zip(self._work.noise_view(size, len(slots)), slots, indices, strict=True):
            if STEP_TRANSITIONS[index][1] > 0:
                self._noise[slot].draw_into(noise)
        self._work.step(slots, indices, size)

    def _step_tile(self, slot: Slot, index: int) -> None:
        image, work = self._tiled[slot], self._work
        tile, tiles = image.plan.tile, len(image.plan)
        if image.next_tile < tiles:  # otherwise `end_step` has failed
            x = work.states[tile].x[slot]
            image.read_tile(x, work.latent_view(tile)[0])
            work.caption_view().copy_(image.caption)
            work.noise_view(tile, 1).zero_()
            work.condition(slot, tile)
            work.step([slot], [index], tile)
            image.add_tile(x)
        if image.next_tile == tiles:
            image.end_step(index, self._noise[slot])

    @torch.inference_mode()
    def preview(self, slot: Slot) -> np.ndarray:
        """Return the preview of an image that was part of the last step, and wait for it."""
        size = self._sizes[slot]
        position, index = self._stepped[slot]
        with device_errors():
            if slot in self._tiled:
                self._wait_for_copies()
                small = self._work.image_view(preview_size(size))  # the buffer for previews can be too small
                self._tiled[slot].write_preview(index, small, scratch=self._work.step_noise)
            else:
                small = self._work.preview(slot, size, position, index)
            return small.to("cpu", copy=True).numpy()

    @torch.inference_mode()
    def finish(self, slot: Slot) -> HostRows:
        """Start copying the image to the host."""
        size, tiled = self._sizes[slot], self._tiled.get(slot)
        rows = HostRows(self._buffers.pool("host image" if tiled is None else "host image in tiles"), size)
        try:
            with device_errors():
                self._wait_for_copies()
                if tiled is None:
                    self._work.finish(slot, size)
                else:
                    tiled.write_pixels(self._work.image_view(size), self._work.finite)
                self._copy_to_host(size, rows)
        except BaseException:
            rows.close()
            raise
        return rows

    def _wait_for_copies(self) -> None:
        """Let later work on the device wait until the previous image has been copied from the same buffer."""
        if (copies := self._buffers.copy_stream) is not None:
            torch.cuda.current_stream(self.device).wait_stream(copies)

    def _copy_to_host(self, size: Size, rows: HostRows) -> None:
        image, finite, copies = self._work.image_view(size), self._work.finite, self._buffers.copy_stream
        if copies is None:
            rows.fill(image, finite)
            return
        copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(copies):
            rows.fill(image, finite)
        self._update_peak()

    def release(self, slot: Slot) -> None:
        """Release the slot; valid at any stage."""
        self._noise.pop(slot, None)
        self._sizes.pop(slot, None)
        self._tiled.pop(slot, None)
        self._buffers.free_slots.release(slot)

    def offload(self) -> None:
        """Move the weights to host memory, so that those of another decoder fit on the device. Images in slots remain.

        Until `restore`, only release, peak_memory, kernel_choices and close may be called.

        Raises:
            ConfigError: The runtime was opened without a pool for its weights.
        """
        with device_errors():
            self._weights.offload()

    def restore(self) -> None:
        """Move the weights back, to the same addresses.

        Raises:
            DeviceMemoryError: They do not fit; they are still in host memory then.
        """
        with device_errors():
            self._weights.restore()

    def peak_memory(self) -> int | None:
        """Return the peak of the device memory in use in bytes; None on the CPU and before the warm-up.

        It includes the CUDA context, kernels and TensorRT engines, and what other processes had in use at the warm-up.
        """
        return self._peak_bytes

    def kernel_choices(self) -> Sequence[Choice]:
        """Return the measurements by which the backend chose kernels."""
        return self.backend.choices

    def close(self) -> None:
        """Wait for the device to finish, and release what keeps the memory of this runtime in use."""
        self._synchronize()
        if (copies := self._buffers.copy_stream) is not None:
            copies.synchronize()
        self._work.close()
        self._weights.close()

    def _check_weights(self) -> None:
        if not self._weights.on_device:
            raise DecodeError("The weights of this decoder are in host memory.")

    def _update_peak(self) -> None:
        """Read the allocator's peak, on the device's thread: a hung driver may hold the allocator's lock."""
        allocated = torch.cuda.max_memory_reserved(self.device) + self._weights.pool_bytes(peak=True)
        self._peak_bytes = allocated + self._other_bytes

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
