"""All decoders by name: the released ones, and the one that ships with the project."""

from __future__ import annotations

from engines.bundled import decoder as bundled
from engines.errors import ConfigError
from engines.pid.released import DecoderDescription, released


def find_decoder(name: str) -> DecoderDescription:
    """Look up a released decoder by name or alias, or the bundled decoder.

    Raises:
        ConfigError: The name is unknown.
    """
    if name == bundled.NAME:
        return bundled.DESCRIPTION
    try:
        return released(name)
    except ConfigError as error:
        raise ConfigError(f"{error} The decoder that ships with the project is {bundled.NAME}.") from error
