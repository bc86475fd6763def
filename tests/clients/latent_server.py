"""Run the server on a simulated decoder whose images show what it was given, so that clients can be compared exactly.

`python -m tests.clients.latent_server --latent-space sdxl [--step-seconds 0.01] [flags of the server]`
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping

import numpy as np

from engines.captions.simulated import SimulatedTextEncoder
from engines.pid.released import LATENT_SPACES
from engines.runtime.protocol import CompleteRows, RuntimeInfo, Sample, Slot
from engines.runtime.simulated import SimulatedCost, SimulatedRuntime
from engines.size import Size
from server import logs
from server.command_line import read_settings
from server.main import serve
from server.process.listen import listening
from server.swaps import FixedDecoders

SIZES = (Size(256, 256), Size(256, 384))  # of latents of 8×8 and 8×12 cells of 8 pixels
CAPTION_TOKENS, CAPTION_WIDTH = 2, 4
MAX_LATENT = 4.0  # larger values are clipped


def show(sample: Sample) -> np.ndarray:
    """Return an image [H, W, 3]: red shows the latent, each cell divided into its channels; green shows the seed.

    Blue shows the mean of the caption.
    """
    channels, height, width = sample.latent.shape
    rows = 2 ** (channels.bit_length() // 2)  # 2×2, 4×4 or 8×16 channels per cell
    cells = sample.latent.numpy().reshape(rows, channels // rows, height, width).transpose(2, 0, 3, 1)
    grid = cells.reshape(height * rows, width * channels // rows)
    image = np.zeros((*sample.size, 3), np.uint8)
    square = np.ones((sample.size.height // grid.shape[0], sample.size.width // grid.shape[1]), np.uint8)
    image[..., 0] = np.kron(shown(grid), square)
    image[..., 1] = sample.seed % 256
    image[..., 2] = 0 if sample.caption is None else shown(sample.caption.float().numpy().mean())
    return image


def shown(values: np.ndarray) -> np.ndarray:
    """Return latent or caption values as 0..255."""
    return np.rint((np.clip(values / MAX_LATENT, -1, 1) + 1) * 127.5).astype(np.uint8)


class LatentRuntime(SimulatedRuntime):
    """Returns images that show the latent, the seed and the caption."""

    def __init__(self, space: str, step_seconds: float = 0.0) -> None:
        description = LATENT_SPACES[space]
        super().__init__(
            dict.fromkeys(SIZES, SimulatedCost(step=step_seconds)),
            latent_channels=description.channels,
            pixels_per_cell=description.pixels_per_cell,
        )
        self.info = dataclasses.replace(
            self.info,
            decoder=f"{space}-simulated",
            latent_space=space,
            sigma_frame=description.sigma_frame,
            caption_tokens=CAPTION_TOKENS,
            caption_width=CAPTION_WIDTH,
        )
        self._samples: dict[Slot, Sample] = {}

    def start(self, sample: Sample) -> Slot:
        slot = super().start(sample)
        self._samples[slot] = sample
        return slot

    def finish(self, slot: Slot) -> CompleteRows:
        super().finish(slot)
        return CompleteRows(show(self._samples.pop(slot)))


def text_encoder(decoders: Mapping[str, RuntimeInfo]) -> SimulatedTextEncoder:
    info = next(iter(decoders.values()))  # all have captions of the same shape
    return SimulatedTextEncoder(info.caption_tokens, info.caption_width)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--latent-space", required=True)
    parser.add_argument("--step-seconds", type=float, default=0.0)
    chosen, flags = parser.parse_known_args()
    settings = read_settings(["--bundle", ".", *flags])
    logs.configure(settings.log_level, settings.log_format)
    runtimes = {"simulated": {"simulated": LatentRuntime(chosen.latent_space, chosen.step_seconds)}}
    with listening(settings.address) as listener:
        sys.exit(serve(settings, listener, FixedDecoders(runtimes), open_captions=text_encoder))
