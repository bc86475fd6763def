"""Reads the safetensors files that are passed as options of the builder."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from engines.errors import ConfigError


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Load a safetensors file that was passed as an option. The tensors do not depend on the file afterwards.

    Raises:
        ConfigError: The file cannot be read, or its header does not match its content.
    """
    try:
        return load(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    except (SafetensorError, ValueError, KeyError) as error:
        raise ConfigError(f"{path} is damaged or not a safetensors file: {error}.") from error


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor contains only finite floating-point numbers."""
    return tensor.is_floating_point() and bool(tensor.float().isfinite().all())
