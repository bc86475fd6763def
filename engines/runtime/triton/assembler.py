"""The assembler that Triton uses for Hopper.

Triton includes two versions of NVIDIA's ptxas, and uses the newer one for Blackwell only. The older one, 12.8,
miscompiles attention with 72 channels for Hopper: on an H200, tiles of the last 8 channels were lost or NaN, and the
kernel accessed invalid addresses. With ptxas 12.9 and 13.0 it was correct; later versions have not run there.
"""

from __future__ import annotations

import os

import torch
from triton import knobs

from engines.machine import driver_cuda
from engines.runtime.triton.architectures import Architecture

_OLDEST = (12, 9)
_VARIABLE = "TRITON_PTXAS_PATH"


def use_correct_assembler(architecture: Architecture) -> str | None:
    """Make Triton use an assembler that compiles the kernels of this project correctly for an architecture.

    For Hopper, this can be another one than Triton uses by default. It then assembles everything that Triton compiles
    in this process and in those that it starts. Call this before the first kernel is compiled, because Triton keeps the
    version of the assembler. If the environment variable TRITON_PTXAS_PATH is set, nothing is changed.

    Returns:
        None, or the reason why Triton has no such assembler, as a clause.
    """
    if architecture != "sm_90":
        return None
    try:
        return _use_for_hopper()
    except (AttributeError, OSError, RuntimeError) as error:
        return f"Triton has no assembler for NVIDIA GPUs ({(str(error).splitlines() or [''])[0]})"


def _use_for_hopper() -> str | None:
    if not os.environ.get(_VARIABLE):
        os.environ.pop(_VARIABLE, None)  # an empty path would be used
        if _version(knobs.nvidia.ptxas.version) < _OLDEST:
            newer = knobs.nvidia.ptxas_blackwell
            if _driver_loads(newer.version):
                os.environ[_VARIABLE] = newer.path
    used = knobs.nvidia.ptxas
    if _version(used.version) >= _OLDEST:
        return None
    return (
        f"ptxas {used.version} at {used.path} miscompiles the others; "
        f"set {_VARIABLE} to a version from {'.'.join(map(str, _OLDEST))} to the CUDA version of the driver"
    )


def _driver_loads(version: str) -> bool:
    """Return whether the driver loads code of this version: of the same major version of CUDA, or an older one."""
    supported = driver_cuda() or (None if torch.version.cuda is None else _version(torch.version.cuda)[0])
    return supported is None or _version(version)[0] <= supported


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))
