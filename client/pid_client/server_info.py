"""Description of a server and its decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class LatentSpace(NamedTuple):
    """Latents that the decoder expects."""

    name: str  # such as `flux`
    channels: int
    pixels_per_cell: int  # pixels of the autoencoder's image along one side of a latent cell
    sigma_frame: str  # `flow` or `variance-preserving`


class ImageSize(NamedTuple):
    """A supported size, each as (height, width)."""

    output: tuple[int, int]  # pixels
    latent: tuple[int, int]  # cells


@dataclass(frozen=True)
class ServerInfo:
    """The main members of the server's `GET /info`."""

    decoder: str
    latent_space: LatentSpace
    upscale: int  # factor between the sides of the autoencoder's image and those of the output
    sizes: tuple[ImageSize, ...]
    document: Mapping[str, Any]  # the whole JSON object

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> ServerInfo:
        """Read the JSON object of `GET /info`."""
        space = document["latent_space"]
        return cls(
            document["decoder"],
            LatentSpace(*(space[name] for name in LatentSpace._fields)),
            document["upscale"],
            tuple(ImageSize(tuple(size["output"]), tuple(size["latent"])) for size in document["sizes"]),
            document,
        )
