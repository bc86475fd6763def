"""API keys of a load test, by name."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path

from engines.errors import ConfigError


def read_keys(path: Path) -> dict[str, str]:
    """Read the file that the server got as --api-keys: one name:key per line; lines that begin with # are comments.

    Raises:
        ConfigError: The file cannot be read or has no keys; the message never quotes a key.
    """
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except OSError as error:
        raise ConfigError(f"Cannot read the API key file {path}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"The API key file {path} is not UTF-8 text.") from None
    pairs = (line.partition(":") for line in lines if line and not line.startswith("#"))
    keys = {name.strip(): key.strip() for name, _, key in pairs}
    if not all(keys.values()) or not keys:
        raise ConfigError(f"The API key file {path} must have one name:key per line.")
    return keys


def create_keys(path: Path, names: Iterable[str]) -> dict[str, str]:
    """Write a file with a random key for each name, readable only by its owner, and return the keys by name."""
    keys = {name: secrets.token_hex(16) for name in names}
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_text("".join(f"{name}:{key}\n" for name, key in keys.items()))
    return keys


def authorization(keys: Mapping[str, str], name: str | None = None) -> dict[str, str]:
    """Return the Authorization header for the key called `name`, or for the first key; none if there are no keys.

    Raises:
        ConfigError: No key has this name.
    """
    if name is None and not keys:
        return {}
    name = next(iter(keys)) if name is None else name
    if name not in keys:
        raise ConfigError(f"The scenario needs the API key {name}; add it to the file given as --api-keys.")
    return {"Authorization": f"Bearer {keys[name]}"}
