"""Reads the safetensors files that are passed as options of the builder."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from engines.errors import ConfigError


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Load a safetensors file that was passed as an option.

    Raises:
        ConfigError: The file cannot be read.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is not a valid safetensors file: {error}.") from error


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor contains only finite floating-point numbers."""
    return tensor.is_floating_point() and bool(tensor.float().isfinite().all())
