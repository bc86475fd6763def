"""The file with the instruction text that is put in front of each prompt."""

from __future__ import annotations

import codecs
from pathlib import Path

from engines.errors import ConfigError

MAX_BYTES = 64 * 2**10  # far more than the tokens that a text encoder supports


def read_prefix(path: Path) -> str:
    """Return the content of a text file in UTF-8, unchanged: line ends and a final newline are part of the text.

    Raises:
        ConfigError: The file cannot be read, is empty, too large, not UTF-8, or begins with a byte order mark.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"The prefix {path} cannot be read: {error.strerror}.") from error
    if len(content) > MAX_BYTES:
        raise ConfigError(f"The prefix {path} has more than {MAX_BYTES:,} bytes; it should be a short instruction.")
    if not content:
        raise ConfigError(f"The prefix {path} is empty; omit the option to encode prompts without a prefix.")
    if content.startswith(codecs.BOM_UTF8):
        raise ConfigError(f"The prefix {path} begins with a byte order mark; save it as UTF-8 without one.")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"The prefix {path} is not UTF-8: invalid byte at offset {error.start}.") from error
