"""Decorator that compiles the inner loops of this package with numba."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numba

log = logging.getLogger(__name__)

_uncached: list[str] = []


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` at its first call, to run without the GIL; cache the machine code on disk if possible.

    Kernels that call each other belong in one file, because numba discards cached code only if the caller's own file
    changes.
    """
    try:
        return numba.njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # numba found no writable directory
        _uncached.append(function.__name__)
        return numba.njit(nogil=True, error_model="numpy")(function)


def warn_if_uncached() -> None:
    """Log a warning, once, if kernels could not be cached and are compiled at every start."""
    if _uncached:
        log.warning(
            "numba has no writable cache directory, so kernels are compiled at every start; "
            "set NUMBA_CACHE_DIR to a writable directory"
        )
        _uncached.clear()
