"""All decoders by name: the released ones, and the one that ships with the project."""

from __future__ import annotations

from engines.bundled import decoder as bundled
from engines.pid.released import DecoderDescription, find_description, released, released_names


def find_decoder(name: str) -> DecoderDescription:
    """Look up a released decoder by name or alias, or the bundled decoder, in any spelling.

    Raises:
        ConfigError: The name is unknown.
    """
    return find_description(name, (*map(released, released_names()), bundled.DESCRIPTION))
