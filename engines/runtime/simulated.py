"""Runtime with a cost table instead of a network, but with the same slots and errors as the others."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from engines.errors import ConfigError, DecodeError
from engines.runtime.protocol import CompleteRows, RuntimeInfo, Sample, Slot, preview_factor
from engines.size import Size

if TYPE_CHECKING:  # it imports torch
    from engines.runtime.kernels.choice import Choice

STEPS = 4  # of a full decode; equals sampler.MAX_STEPS, whose module imports torch


@dataclass(frozen=True)
class SimulatedCost:
    """Device time for one size in seconds; a step of b images lasts step · (1 + (b − 1) · batch_slope)."""

    condition: float = 0.0
    step: float = 0.0
    finish: float = 0.0
    preview: float = 0.0
    batch_slope: float = 1.0  # 1: batching does not help, as at 2048², where one image fills a GPU
    estimated: bool = False  # neither measured nor published

    def step_of(self, batch: int) -> float:
        """Return the seconds of one step of a batch."""
        return self.step * (1 + (batch - 1) * self.batch_slope)

    def service(self, steps: int = STEPS) -> float:
        """Return the service time of one image decoded alone, in seconds."""
        return self.condition + steps * self.step + self.finish


@dataclass(frozen=True)
class SimulatedTable:
    """Costs of a device and properties of its decoder.

    Attributes:
        name: Name of the device.
        source: Where the costs come from.
        costs: Costs by output size.
        restore: Seconds to move the weights of a decoder from host memory to the device.
    """

    name: str
    source: str
    costs: Mapping[Size, SimulatedCost]
    latent_channels: int = 16
    pixels_per_cell: int = 8
    max_batch: int = 1
    restore: float = 0.0

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        """Return the shape (c, h, w) of the latent that decodes to an image of `size`."""
        cell = 4 * self.pixels_per_cell
        return self.latent_channels, size.height // cell, size.width // cell


def load_table(path: Path) -> SimulatedTable:
    """Read a cost table: JSON with the fields of `SimulatedTable`, costs keyed by size as "2048x2048", in seconds.

    Raises:
        ConfigError: The file cannot be read or is not a cost table.
    """
    try:
        fields: dict[str, Any] = json.loads(path.read_text())
        costs = {Size.parse(size): SimulatedCost(**cost) for size, cost in fields.pop("costs").items()}
        table = SimulatedTable(**fields, costs=costs)
    except OSError as error:
        raise ConfigError(f"The cost table {path} cannot be read: {error.strerror}.") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path} is not a cost table: {error}.") from None
    if not costs:
        raise ConfigError(f"The cost table {path} has no sizes.")
    return table


class SimulatedRuntime:
    """Sleeps for the times in the cost table and returns a fixed image per size; implements `protocol.Runtime`."""

    def __init__(
        self,
        costs: Mapping[Size, SimulatedCost],
        images: Mapping[Size, np.ndarray] | None = None,
        latent_channels: int = 16,
        pixels_per_cell: int = 8,
        upscale: int = 4,
        max_batch: int = 4,
        slots: int | None = None,
        device: str = "simulated",
        max_pixels: int | None = None,
        restore: float = 0.0,
    ) -> None:
        """Create a runtime.

        Args:
            costs: Costs by output size; also defines the supported sizes.
            images: Image [H, W, 3] uint8 per output size; by default `simulated_image`.
            latent_channels: Channels of the latents.
            pixels_per_cell: Pixels of the low-resolution image per latent cell.
            upscale: Factor from the low-resolution image to the output.
            max_batch: Largest batch.
            slots: Images that may be between start and release; by default `max_batch` + 1.
            device: Name of the device.
            max_pixels: Largest area of an image in tiles; None: no image is decoded in tiles.
            restore: Seconds to move the weights to the device.
        """
        self.info = RuntimeInfo(
            decoder="simulated",
            latent_space="simulated",
            latent_channels=latent_channels,
            pixels_per_cell=pixels_per_cell,
            upscale=upscale,
            sigma_frame="flow",
            caption_tokens=300,
            caption_width=2304,
            sizes=tuple(costs),
            max_batch=max_batch,
            slots=slots or max_batch + 1,
            precision="simulated",
            kind="simulated",
            device=device,
        ).with_tiles(max_pixels)
        self._costs, self._restore, self._offloaded = dict(costs), restore, False
        self._images = dict(images or {})
        self._previews: dict[Size, np.ndarray] = {}
        self._running: dict[Slot, Size] = {}

    @classmethod
    def from_table(
        cls,
        table: SimulatedTable,
        max_batch: int | None = None,
        slots: int | None = None,
        max_pixels: int | None = None,
    ) -> SimulatedRuntime:
        """Create a runtime with the costs and properties of a table."""
        return cls(
            table.costs,
            latent_channels=table.latent_channels,
            pixels_per_cell=table.pixels_per_cell,
            max_batch=max_batch or table.max_batch,
            slots=slots,
            device=table.name,
            max_pixels=max_pixels,
            restore=table.restore,
        )

    def warm_up(self) -> None:
        """Create the images and their previews."""
        for size in self._costs:
            self._small_image(size)

    def start(self, sample: Sample) -> Slot:
        """Use a free slot and sleep for the time of the conditioning."""
        self._check_weights()
        tiled = self.info.tiles(sample.size) is not None
        if sample.size not in self._costs and not tiled:
            raise DecodeError(f"This runtime does not support the size {sample.size}.")
        slot = next((slot for slot in range(self.info.slots) if slot not in self._running), None)
        if slot is None:
            raise DecodeError("All slots of the runtime are in use; release one before starting another image.")
        self._running[slot] = sample.size
        if not tiled:
            _sleep(self._costs[sample.size].condition)
        return slot

    def step(self, slots: Sequence[Slot], indices: Sequence[int]) -> None:
        """Sleep for the time of a step of this batch, or of conditioning and step of one tile."""
        self._check_weights()
        (size,) = {self._running[slot] for slot in slots}
        cost, tiled = self._cost(size), self.info.tiles(size) is not None
        if tiled and len(slots) > 1:
            raise DecodeError("An image in tiles cannot be part of a batch.")
        _sleep(cost.step_of(len(slots)) + (cost.condition if tiled else 0))

    def preview(self, slot: Slot) -> np.ndarray:
        """Sleep for the time of a preview and return the image scaled down."""
        size = self._running[slot]
        _sleep(self._cost(size).preview)
        return self._small_image(size)

    def finish(self, slot: Slot) -> CompleteRows:
        """Sleep for the time of the finish and return the image."""
        size = self._running[slot]
        _sleep(self._cost(size).finish)
        return CompleteRows(self._image(size))

    def release(self, slot: Slot) -> None:
        """Release the slot."""
        if self._running.pop(slot, None) is None:
            raise DecodeError(f"Slot {slot} was released twice.")

    def offload(self) -> None:
        """Reject images until `restore`."""
        self._offloaded = True

    def restore(self) -> None:
        """Sleep for the time of moving the weights, and accept images again."""
        _sleep(self._restore)
        self._offloaded = False

    def _check_weights(self) -> None:
        if self._offloaded:
            raise DecodeError("The weights are in host memory; move them back before decoding.")

    def _cost(self, size: Size) -> SimulatedCost:
        """Return the cost of an image; condition and step of one in tiles are those of a tile."""
        plan = self.info.tiles(size)
        if plan is None:
            return self._costs[size]
        cost, tiles = self._costs[plan.tile], size.area / plan.tile.area
        return replace(cost, finish=cost.finish * tiles, preview=cost.preview * tiles)

    def _image(self, size: Size) -> np.ndarray:
        plan = self.info.tiles(size)
        if plan is not None:
            repeats = -(-size.height // plan.tile.height), -(-size.width // plan.tile.width), 1
            return np.ascontiguousarray(np.tile(self._image(plan.tile), repeats)[: size.height, : size.width])
        if size not in self._images:
            self._images[size] = simulated_image(size)
        return self._images[size]

    def _small_image(self, size: Size) -> np.ndarray:
        if size not in self._costs:  # in tiles, of any size
            return np.asarray(Image.fromarray(self._image(size)).reduce(preview_factor(size)))
        if size not in self._previews:
            self._previews[size] = np.asarray(Image.fromarray(self._image(size)).reduce(preview_factor(size)))
        return self._previews[size]

    def peak_memory(self) -> int | None:
        """Return None: there is no device."""
        return None

    def kernel_choices(self) -> Sequence[Choice]:
        """Return nothing: there are no kernels."""
        return ()

    def close(self) -> None:
        """Do nothing."""


@cache
def simulated_image(size: Size) -> np.ndarray:
    """Return an image [H, W, 3] uint8 that costs about as much to encode as a photograph. It is cached; do not modify.

    It is value noise whose amplitudes fall as 1/f, as in natural images, with independent grain in each channel.
    """
    generator = np.random.default_rng(0)
    octaves = (2, 4, 8, 16, 32, 64, 128)
    rows, columns = (np.hstack([_interpolation(cells, side) for cells in octaves]) for side in size)
    tiles = -(-size.height // 256), -(-size.width // 256)
    pixels = np.empty((*size, 3), np.uint8)
    for channel in range(3):
        corners = [generator.normal(0, 90 / cells**0.8, (cells + 1, cells + 1)) for cells in octaves]
        grain = generator.normal(127, 4, (256, 256)).astype(np.float32)
        plane = rows @ _block_diagonal(corners) @ columns.T + np.tile(grain, tiles)[: size.height, : size.width]
        pixels[..., channel] = plane.clip(0, 255)
    return pixels


def _interpolation(cells: int, side: int) -> np.ndarray:
    """Return the matrix [side, cells + 1] that interpolates linearly between the corners of `cells` equal cells."""
    positions = np.linspace(0, cells, side, endpoint=False)
    return np.maximum(0, 1 - np.abs(positions[:, None] - np.arange(cells + 1))).astype(np.float32)


def _block_diagonal(blocks: Sequence[np.ndarray]) -> np.ndarray:
    matrix = np.zeros((sum(len(block) for block in blocks),) * 2, np.float32)
    offset = 0
    for block in blocks:
        stop = offset + len(block)
        matrix[offset:stop, offset:stop] = block
        offset = stop
    return matrix


def _sleep(seconds: float) -> None:
    if seconds > 0:
        time.sleep(seconds)
