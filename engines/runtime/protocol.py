"""What a runtime is: something that takes a latent through condition, steps and finish, and hands out uint8 rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

from engines.size import Size

Slot = int


@dataclass(frozen=True)
class RuntimeInfo:
    """What a runtime decodes, and with what."""

    decoder: str
    latent_space: str
    latent_channels: int
    pixels_per_cell: int
    upscale: int
    sigma_frame: str
    caption_tokens: int  # exactly this many in every caption: all are attended to, so none can be filled in
    caption_width: int
    sizes: tuple[Size, ...]
    max_batch: int
    slots: int  # images that may be between start and release at once
    precision: str
    kind: str  # "torch", "simulated", …
    device: str
    notes: tuple[str, ...] = ()

    def latent_size(self, size: Size) -> Size:
        cell = self.pixels_per_cell * self.upscale
        return Size(size.height // cell, size.width // cell)


@dataclass(frozen=True)
class Sample:
    """One image to decode."""

    latent: Tensor  # [c, h, w] float32 on the CPU
    size: Size
    sigma: float = 0.0
    seed: int = 0
    caption: Tensor | None = None  # [T, E] float32 on the CPU; None is the empty caption


class Rows(Protocol):
    """A finished image on its way to the host. `close` must be called once the pixels are no longer needed."""

    pixels: np.ndarray  # [H, W, 3] uint8, valid as far as `wait` has said

    def wait(self, stop: int) -> None:
        """Return when rows 0..stop of `pixels` have arrived; from any thread. Raises DecodeError on a broken image."""

    def close(self) -> None: ...


class Runtime(Protocol):
    """All methods but those of `Rows` are called from one thread.

    Errors: DecodeError (this work failed, the device is fine), DeviceMemoryError, DeviceLostError.
    """

    info: RuntimeInfo

    def warm_up(self) -> None:
        """Allocate and compile everything that decoding will need; afterwards requests allocate nothing."""

    def start(self, sample: Sample) -> Slot:
        """Condition on the latent and caption and draw the starting noise, in a free slot."""

    def step(self, slots: Sequence[Slot], indices: Sequence[int]) -> None:
        """Advance each slot by its own step (a row of `sampler.STEP_TRANSITIONS`); returns when the device has done it.

        All slots hold images of one size; at most `info.max_batch` of them.
        """

    def finish(self, slot: Slot) -> Rows:
        """Begin copying the image to the host, rows from the top; the slot stays taken until `release`."""

    def release(self, slot: Slot) -> None:
        """Give the slot back, at whatever stage it is."""

    def peak_memory(self) -> int | None:
        """Peak bytes that this runtime has held on its device, where that can be told."""

    def close(self) -> None: ...
