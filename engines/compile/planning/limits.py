"""Limits of a build: options that no device or machine can serve are rejected before any work."""

from __future__ import annotations

import math
from collections.abc import Sequence

from engines.bundle import DTYPES
from engines.compile.planning.options import BuildOptions
from engines.compile.planning.targets import Target
from engines.errors import ConfigError
from engines.manifest import MAX_BATCH, SEEDS, Precision
from engines.pid.config import PATCH_PIXELS, PidConfig
from engines.size import MAX_SIZES, Size

_ANY_DEVICE_GB = 1024  # for targets without a fixed device


def check_limits(
    options: BuildOptions, target: Target, config: PidConfig, sizes: Sequence[Size], precision: Precision
) -> None:
    """Check numbers among the options, and the memory that the bundle needs on a device.

    Raises:
        ConfigError: A number is outside its range, a size is not possible, or the target has too little memory.
    """
    if not 1 <= options.max_batch <= MAX_BATCH:
        raise ConfigError(f"--max-batch must be at least 1 and at most {MAX_BATCH}, got {options.max_batch}.")
    if options.random_seed is not None and options.random_seed not in SEEDS:
        raise ConfigError(f"--seed must be from -2^63 to 2^64 - 1, got {options.random_seed}.")
    if not math.isfinite(options.min_psnr):
        raise ConfigError(f"--min-psnr must be a finite number, got {options.min_psnr:g}.")
    if len(sizes) > MAX_SIZES:
        raise ConfigError(f"--sizes has {len(sizes)} sizes; a bundle may have at most {MAX_SIZES}.")
    for size in sizes:
        config.latent_size(size)
        needed = options.max_batch * state_bytes(config, size, precision)
        available = (target.memory_gb or _ANY_DEVICE_GB) << 30
        if needed > available:
            device = f"the {target.gpu}" if target.memory_gb else "any device"
            raise ConfigError(
                f"--sizes {size} with --max-batch {options.max_batch} needs at least {needed / 2**30:,.0f} GiB of "
                f"memory, more than the {available / 2**30:,.0f} GiB of {device}."
            )


def state_bytes(config: PidConfig, size: Size, precision: Precision) -> int:
    """Return the bytes of one image between steps: pixels and noise in float32, and the adapter's tokens."""
    tokens = config.token_sets * config.hidden_size * (size.area // PATCH_PIXELS)
    return 2 * 3 * 4 * size.area + tokens * DTYPES[precision].itemsize
