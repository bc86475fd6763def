"""All decoders by name: the released ones, and the one that ships with the project."""

from __future__ import annotations

from engines.bundled import decoder as bundled
from engines.pid.released import (
    LATENT_SPACES,
    DecoderDescription,
    LatentSpace,
    find_description,
    released,
    released_names,
)


def find_decoder(name: str) -> DecoderDescription:
    """Look up a released decoder by name or alias, or the bundled decoder, in any spelling.

    Raises:
        ConfigError: The name is unknown.
    """
    return find_description(name, (*map(released, released_names()), bundled.DESCRIPTION))


def find_latent_space(name: str) -> LatentSpace | None:
    """Return the latent space with this name, or None if it is unknown."""
    return next(
        (space for space in (*LATENT_SPACES.values(), bundled.DESCRIPTION.latent_space) if space.name == name), None
    )
