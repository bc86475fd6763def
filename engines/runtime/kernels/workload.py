"""What kernels are chosen for: the shapes of the largest image, and what may be used."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch

from engines.pid.config import PATCH_PIXELS
from engines.size import Size

if TYPE_CHECKING:
    from engines.runtime.triton.architectures import Architecture

Function = TypeVar("Function", bound=Callable[..., object])


@dataclass(frozen=True)
class Workload:
    """Shapes of one image, and the implementations that may be used.

    Attributes:
        size: Output size of the image.
        caption_tokens: Length of the caption.
        architecture: Architecture whose tile sizes the kernels of this project use; None: only those of PyTorch.
        compiled: Whether torch.compile compiles what PyTorch computes.
        backend: Its backend.
    """

    size: Size
    caption_tokens: int
    architecture: Architecture | None = None
    compiled: bool = False
    backend: str = "inductor"

    @property
    def tokens(self) -> int:
        """Number of image tokens."""
        return self.size.area // PATCH_PIXELS

    def optimise(self, function: Function) -> Function:
        """Return the function as a step runs it: compiled, or as it is."""
        if not self.compiled:
            return function
        return torch.compile(function, dynamic=False, backend=self.backend)  # type: ignore[return-value]


@dataclass(frozen=True)
class Unavailable:
    """Why the kernels of this project cannot run, as a clause."""

    reason: str


def own_kernels(device: torch.device, dtype: torch.dtype) -> Architecture | Unavailable:
    """Return the architecture whose tile sizes the kernels of this project use on a CUDA device, in a dtype."""
    if dtype == torch.float32:
        return Unavailable("the others are for networks in 16 bits and FP8")
    if importlib.util.find_spec("triton") is None:
        return Unavailable("the package triton is not installed")
    from engines.runtime.triton.architectures import architecture

    major, minor = capability = torch.cuda.get_device_capability(device)
    found = architecture(capability)
    if found is None:
        return Unavailable(f"there are no others for compute capability {major}.{minor}")
    from engines.runtime.triton.assembler import use_correct_assembler

    reason = use_correct_assembler(found)
    return found if reason is None else Unavailable(reason)
