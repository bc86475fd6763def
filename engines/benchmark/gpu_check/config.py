"""Options of one run: device, network, sizes and deadline; and the parts of a check."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from engines.benchmark.gpu_check.findings import Finding
from engines.pid.released import DecoderDescription, released
from engines.pid.toy import TOY
from engines.size import Size

VECTORS = Path("tests", "parity")  # in a checkout


@dataclass(frozen=True)
class RunConfig:
    """Options of one run, and the deadline of its current part."""

    device: torch.device
    small: bool = False  # toy network and sizes, to rehearse without a GPU
    bundle: Path | None = None  # TensorRT engines to time as well
    vectors: Path = VECTORS  # directory of the reference vectors
    commit: str | None = None  # version of the code, for the report; None: as git says
    deadline: float = math.inf  # value of time.monotonic() when the current part should end

    @property
    def description(self) -> DecoderDescription:
        """The decoder that is measured, with random weights."""
        return TOY if self.small else released("flux-2kto4k-v1.5")

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Output sizes, smallest first."""
        small, full = (Size(32, 32), Size(64, 64), Size(64, 96)), (Size(1024, 1024), Size(2048, 2048), Size(4096, 4096))
        return small if self.small else full

    @property
    def main_size(self) -> Size:
        """The size of the main measurements."""
        return self.sizes[1]

    @property
    def on_cuda(self) -> bool:
        """Whether the device is a CUDA device."""
        return self.device.type == "cuda"

    @property
    def seconds_left(self) -> float:
        """Time until the deadline of the current part."""
        return self.deadline - time.monotonic()


@dataclass(frozen=True)
class Part:
    """One section of the report."""

    name: str
    title: str
    seconds: float  # time budget on one GPU; later parts may use what this one does not need
    run: Callable[[RunConfig], Iterator[Finding]]
    requires: tuple[str, ...] = ()  # modules besides torch, numpy and safetensors
    only_on_cuda: bool = False
