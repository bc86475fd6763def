"""How this package compiles its inner loops."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numba

log = logging.getLogger(__name__)

_uncached: list[str] = []


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` at its first call, to run without the GIL; keep the machine code on disk if there is a place.

    Kernels that call each other belong in one file: numba drops cached code when the caller's file changes, no other.
    """
    try:
        return numba.njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # raised where there is no writable folder
        _uncached.append(function.__name__)
        return numba.njit(nogil=True, error_model="numpy")(function)


def warn_if_uncached() -> None:
    """Say so, once, if kernels have to be compiled at every start."""
    if _uncached:
        log.warning(
            "Numba found no folder it may write to, so kernels are compiled in memory, at every start; "
            "set NUMBA_CACHE_DIR to a writable folder to keep them."
        )
        _uncached.clear()
