"""The interface of a runtime, which decodes a latent in the stages condition, steps and finish to rows of uint8."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from engines.runtime.kernels.choice import Choice

from engines.runtime.tiles import TilePlan, smallest_tiled_size, tiles_of
from engines.size import Size

Slot = int
PREVIEW_WIDTH = 512  # maximum width of a preview in pixels


@dataclass(frozen=True)
class RuntimeInfo:
    """Decoder, limits and device of a runtime."""

    decoder: str
    latent_space: str
    latent_channels: int
    pixels_per_cell: int
    upscale: int
    sigma_frame: str
    caption_tokens: int  # exact length of every caption: there is no attention mask, so captions cannot be padded
    caption_width: int
    sizes: tuple[Size, ...]
    max_batch: int
    slots: int  # maximum number of images between start and release
    precision: str
    kind: str  # "torch", "simulated", …
    device: str
    notes: tuple[str, ...] = ()
    max_pixels: int | None = None  # largest area of an image that is decoded in tiles; None: no image is

    @property
    def cell_side(self) -> int:
        """Output pixels along one latent cell."""
        return self.pixels_per_cell * self.upscale

    @property
    def smallest_tiled_size(self) -> Size | None:
        """The smallest size that is decoded in tiles; None if no image is."""
        limit = self.max_pixels
        return None if limit is None else smallest_tiled_size(self.sizes, self.cell_side, limit)

    def with_tiles(self, max_pixels: int | None) -> RuntimeInfo:
        """Return the properties of a runtime that decodes images of at most `max_pixels` in tiles, if there are any."""
        info = replace(self, max_pixels=max_pixels)
        return info if info.smallest_tiled_size is not None else replace(self, max_pixels=None)

    def latent_size(self, size: Size) -> Size:
        """Return the size of the latent that decodes to an image of `size`."""
        return Size(size.height // self.cell_side, size.width // self.cell_side)

    def tiles(self, size: Size) -> TilePlan | None:
        """Return the tiles of an image; None if it is decoded as a whole, or not supported."""
        if self.max_pixels is None or size in self.sizes:
            return None
        return tiles_of(size, self.sizes, self.cell_side, self.max_pixels)


@dataclass(frozen=True)
class Sample:
    """One image to decode."""

    latent: Tensor  # [c, h, w] float32 on the CPU
    size: Size
    sigma: float = 0.0
    seed: int = 0
    caption: Tensor | None = None  # [T, E] float32 or bfloat16 on the CPU; None is the empty caption


def preview_factor(size: Size) -> int:
    """Return the factor by which the preview of an image is scaled down, so that it has at most `PREVIEW_WIDTH`."""
    return -(-size.width // PREVIEW_WIDTH)


def preview_size(size: Size) -> Size:
    """Return the size of the preview of an image; pixels that are left over at an edge count as a whole one."""
    factor = preview_factor(size)
    return Size(-(-size.height // factor), -(-size.width // factor))


class Rows(Protocol):
    """A finished image that is being copied to the host. Call `close` when its pixels are no longer needed."""

    pixels: np.ndarray  # [H, W, 3] uint8; rows are valid once `wait` has returned for them

    def wait(self, stop: int) -> None:
        """Wait until rows 0..stop of `pixels` have arrived. May be called from any thread.

        Raises:
            NonFiniteImageError: The image contains NaN or infinity.
        """

    def close(self) -> None:
        """Release the buffer behind `pixels`."""


class CompleteRows:
    """Rows that are all on the host and need no release; implements `Rows`."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels

    def wait(self, stop: int) -> None:
        """Return immediately."""

    def close(self) -> None:
        """Do nothing."""


class Runtime(Protocol):
    """A decoder on one device. All its methods are called from one thread; those of `Rows` from any thread.

    An image for which `info.tiles` has a plan is decoded in tiles. Each of its steps takes as many calls of `step` as
    there are tiles, with the same index. Between these calls, other images can be stepped.

    Methods raise DecodeError if only this work failed, DeviceMemoryError if it does not fit into the device's memory,
    and DeviceLostError if the device no longer works.
    """

    info: RuntimeInfo

    def warm_up(self) -> None:
        """Allocate and compile everything that decoding needs. Requests allocate no memory after that."""

    def start(self, sample: Sample) -> Slot:
        """Condition on latent and caption, and draw the starting noise, in a free slot.

        An image in tiles is conditioned in each call of `step` instead, tile by tile.
        """

    def step(self, slots: Sequence[Slot], indices: Sequence[int]) -> None:
        """Run one step, or its next tile, and return when the device has finished. It can be repeated if it fails.

        Args:
            slots: At most `info.max_batch` slots with images of the same size; an image in tiles must be alone.
            indices: Step index of each slot, a row of `sampler.STEP_TRANSITIONS`.
        """

    def preview(self, slot: Slot) -> np.ndarray:
        """Return what the decoder predicts after the last step, which the slot must have been part of.

        Not after `finish`, and of an image in tiles only after the last tile of a step.

        Returns:
            Pixels [h, w, 3] uint8 of the size `preview_size`, which later work does not change.
        """

    def finish(self, slot: Slot) -> Rows:
        """Start copying the image to the host, from the top row down. The slot remains in use until `release`."""

    def release(self, slot: Slot) -> None:
        """Release the slot; valid at any stage."""

    def offload(self) -> None:
        """Move the weights to host memory, so that those of another decoder fit on the device. Images in slots remain.

        Until `restore`, only `release`, `peak_memory`, `kernel_choices` and `close` may be called.
        """

    def restore(self) -> None:
        """Move the weights back to the device.

        Raises:
            DeviceMemoryError: They do not fit; they are still in host memory.
        """

    def peak_memory(self) -> int | None:
        """Return the peak memory of this runtime on its device in bytes, or None if it is unknown."""

    def kernel_choices(self) -> Sequence[Choice]:
        """Return the measurements by which the warm-up chose kernels; none if there was no choice."""

    def close(self) -> None:
        """Wait for the device to finish. The memory is free once nothing refers to the runtime any more."""
