"""Description of a server and its decoders."""

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
class DecoderInfo:
    """A decoder of a server."""

    name: str  # the value of the option `decoder`
    model: str  # such as `flux-2k`
    latent_space: LatentSpace
    upscale: int  # factor between the sides of the autoencoder's image and those of the output
    sizes: tuple[ImageSize, ...]
    document: Mapping[str, Any]  # the JSON object of the decoder

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> DecoderInfo:
        """Read a decoder in the JSON object of `GET /info`."""
        space = document["latent_space"]
        return cls(
            document["name"],
            document["model"],
            LatentSpace(*(space[name] for name in LatentSpace._fields)),
            document["upscale"],
            tuple(ImageSize(tuple(size["output"]), tuple(size["latent"])) for size in document["sizes"]),
            document,
        )


@dataclass(frozen=True)
class ServerInfo:
    """The main members of the server's `GET /info`."""

    decoders: tuple[DecoderInfo, ...]
    document: Mapping[str, Any]  # the whole JSON object

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> ServerInfo:
        """Read the JSON object of `GET /info`."""
        return cls(tuple(DecoderInfo.read(decoder) for decoder in document["decoders"]), document)

    def decoder(self, name: str | None = None) -> DecoderInfo:
        """Return the decoder with this name; without a name, the only decoder of the server.

        Raises:
            ValueError: the server has no decoder with this name, or no name was passed and it has several decoders.
        """
        found = [decoder for decoder in self.decoders if name in (None, decoder.name)]
        if len(found) == 1:
            return found[0]
        names = ", ".join(decoder.name for decoder in self.decoders)
        if name is None:
            raise ValueError(f"The server has several decoders; name one of {names}.")
        raise ValueError(f"The server has no decoder {name!r}, only {names}.")
