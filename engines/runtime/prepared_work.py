"""The work of a runtime that is prepared at the warm-up, one piece per size and batch, and its buffers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from engines.pid.sampler import STEP_TRANSITIONS
from engines.pixels import to_uint8
from engines.runtime.backend import Backend
from engines.runtime.buffers import DeviceBuffers
from engines.runtime.cuda_graphs import EagerRunner, GraphRunner, preparing
from engines.runtime.previews import preview
from engines.runtime.protocol import RuntimeInfo, Slot, preview_size
from engines.runtime.slots import LazyGather, select, slot_state
from engines.size import Size


class PreparedWork:
    """Condition, steps, preview and finish, per size and batch, with the restrictions that `Backend` documents.

    Each size uses the first part of the same buffers, which other runtimes of the device use too.

    Attributes:
        states: State of the images, by size.
        latent: Latent for the condition.
        caption: Caption for the condition, [1, T, E].
        step_noise: Noise of a step, float32, at least for the largest size and batch.
        image: The finished image, uint8, at least for the largest image.
        finite: Bool, true if all values of the finished image are finite.
    """

    def __init__(self, backend: Backend, info: RuntimeInfo, buffers: DeviceBuffers) -> None:
        self._backend, self._info, self._buffers = backend, info, buffers
        self._runner: GraphRunner = EagerRunner()

    def prepare(self) -> None:
        """Allocate all buffers, and prepare the work, largest first."""
        self._runner = runner = self._buffers.runner()
        with preparing, runner.stream():
            self._backend.prepare(self._info, self._buffers)
            self._use_buffers()
        for size in sorted(self._info.sizes, key=lambda size: size.area, reverse=True):
            for batch in range(self._info.max_batch, 0, -1):
                runner.prepare(("step", size, batch), partial(self._step_work, size, batch))
            runner.prepare(("condition", size), partial(self._condition_work, size))
            runner.prepare(("finish", size), partial(self._finish_work, size))
            runner.prepare(("preview", size), partial(self._preview_work, size))

    def _use_buffers(self) -> None:
        info, backend, buffers = self._info, self._backend, self._buffers
        buffers.allocate()
        self.states = {
            size: slot_state(buffers.tensor("slots"), backend.config, size, info.caption_tokens, backend.dtype)
            for size in info.sizes
        }
        self._slot_index, self._step_index = buffers.tensor("slot index"), buffers.tensor("step index")
        self._noise_index = buffers.tensor("noise index")
        self.step_noise = buffers.tensor("step noise")
        self.latent, self.caption = buffers.staged("latent"), buffers.staged("caption")
        self._next_t = torch.tensor([next_t for _, next_t in STEP_TRANSITIONS], device=backend.device)  # by step index
        self._preview, self.image = buffers.tensor("preview"), buffers.tensor("image")
        self.finite = buffers.tensor("finite")[0]

    def close(self) -> None:
        """Drop the prepared work, which refers to this object: garbage collection would come late."""
        self._runner = EagerRunner()

    def condition(self, slot: Slot, size: Size) -> None:
        """Condition on `latent` and `caption`, in a slot."""
        self._slot_index[0].fill_(slot)  # an assignment would wait for the device
        self._runner.run(("condition", size))

    def step(self, slots: Sequence[Slot], indices: Sequence[int], size: Size) -> None:
        """Run a step of the images in these slots, with the noise in `noise_view`."""
        self._slot_index[: len(slots)] = torch.tensor(slots)
        self._step_index[: len(slots)] = torch.tensor(indices)
        self._runner.run(("step", size, len(slots)))

    def preview(self, slot: Slot, size: Size, position: int, index: int) -> Tensor:
        """Preview an image that was at a position in the batch of the last step; return [h, w, 3] uint8."""
        self._slot_index[0].fill_(slot)
        self._noise_index[0].fill_(position)
        self._step_index[0].fill_(index)
        self._runner.run(("preview", size))
        return self._preview_view(size)

    def finish(self, slot: Slot, size: Size) -> None:
        """Write the image of a slot to `image` and `finite`."""
        self._slot_index[0].fill_(slot)
        self._runner.run(("finish", size))

    def latent_view(self, size: Size) -> Tensor:
        """Return the latent of an output size, [1, c, h, w]."""
        return self.latent.view((1, self._info.latent_channels, *self._info.latent_size(size)))

    def caption_view(self) -> Tensor:
        """Return the caption, [1, T, E]."""
        return self.caption.view((1, self._info.caption_tokens, self._info.caption_width))

    def noise_view(self, size: Size, batch: int) -> Tensor:
        """Return the noise of a step, [batch, 3, H, W]."""
        return self.step_noise[: batch * 3 * size.area].view(batch, 3, *size)

    def image_view(self, size: Size) -> Tensor:
        """Return the finished image, [H, W, 3]."""
        return self.image[: 3 * size.area].view(*size, 3)

    def _preview_view(self, size: Size) -> Tensor:
        small = preview_size(size)
        return self._preview[: 3 * small.area].view(*small, 3)

    def _condition_work(self, size: Size) -> None:
        state, index = self.states[size], self._slot_index[:1]
        values = self._backend.condition(size, self.latent_view(size), self.caption_view())
        for target, value in zip((state.caption, *state.tokens), values, strict=True):
            target.index_copy_(0, index, value)

    def _step_work(self, size: Size, batch: int) -> None:
        state, index = self.states[size], self._slot_index[:batch]
        next_x = self._backend.step(
            size,
            select(state.x, index),  # [b, 3, H, W]
            state.sigma.index_select(0, index)[:, 0],
            self._step_index[:batch],
            self.noise_view(size, batch),
            select(state.caption, index),
            LazyGather(state.tokens, index),
        )
        state.x.index_copy_(0, index, next_x)

    def _finish_work(self, size: Size) -> None:
        x = select(self.states[size].x, self._slot_index[:1])[0]  # [3, H, W]
        self.image_view(size).copy_(to_uint8(x).permute(1, 2, 0))
        self.finite.copy_(x.isfinite().all())

    def _preview_work(self, size: Size) -> None:
        x = select(self.states[size].x, self._slot_index[:1])  # [1, 3, H, W]
        noise = self.noise_view(size, self._info.max_batch).index_select(0, self._noise_index)
        self._preview_view(size).copy_(preview(x, noise, self._next_t.index_select(0, self._step_index[:1])))
