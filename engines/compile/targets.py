"""The machines that bundles are built for, and what can compile engines for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engines.errors import ConfigError, PidError
from engines.machine import device_name
from engines.manifest import Package, Precision
from engines.runtime import trt
from engines.runtime.trt import TensorRT


class CannotCompileError(PidError):
    """The machine at hand cannot compile engines for the target; another can."""

    code = "cannot-compile"


@dataclass(frozen=True)
class Target:
    """What a bundle's builder has to know of the machine it builds for."""

    name: str
    precisions: tuple[Precision, ...]  # the default first
    compilers: tuple[Package, ...] = ()  # the preferred first; none: PyTorch runs the weights as they are
    gpu: str = "any"
    compute_capability: tuple[int, int] | None = None  # None: any
    memory_gb: int | None = None  # on one device

    @property
    def compiled(self) -> bool:
        return bool(self.compilers)


_ENGINES: tuple[Precision, ...] = ("bf16", "fp8", "fp16")

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("cpu", ("fp32", "bf16", "fp16", "fp8")),
        Target("cuda", ("bf16", "fp8", "fp16", "fp32")),
        Target("rtx5090", _ENGINES, ("tensorrt-rtx", "tensorrt"), "RTX 5090", (12, 0), 32),
        Target("gb200", _ENGINES, ("tensorrt",), "GB200", (10, 0), 186),
        Target("h200", _ENGINES, ("tensorrt",), "H200", (9, 0), 141),
    )
}


def find_target(name: str) -> Target:
    """Raises ConfigError where there is no target of that name."""
    if name not in TARGETS:
        raise ConfigError(f"There is no target called {name!r}. Known are {', '.join(TARGETS)}.")
    return TARGETS[name]


def where(target: Target, package: Package) -> str:
    """On which machines the package compiles engines for the target."""
    if package == "tensorrt-rtx":
        return "any machine with Linux or Windows on x86-64, with or without a GPU"
    article = "an" if target.gpu[0] in "HR" else "a"  # as the letters are spoken
    return f"a machine with {article} {target.gpu}"


def find_compiler(target: Target, asked: Package | None = None) -> TensorRT:
    """The TensorRT that compiles for the target here, the asked one or the first that can.

    Raises CannotCompileError that says what would be needed.
    """
    obstacles = []
    for package in (asked,) if asked else target.compilers:
        obstacle = _obstacle(target, package)
        if obstacle is None:
            return trt.find(package)
        obstacles.append(f"{package} compiles for it on {where(target, package)}, but {obstacle}")
    raise CannotCompileError(f"Engines for {target.name} cannot be compiled here: {'; '.join(obstacles)}.")


def _obstacle(target: Target, package: Package) -> str | None:
    if package == "tensorrt":
        if not torch.cuda.is_available():
            return "this machine has no CUDA device"
        capability = torch.cuda.get_device_capability()
        if capability != target.compute_capability:
            return f"this machine has {device_name(torch.device('cuda'))}"
    try:
        trt.find(package)
    except ConfigError as error:
        return str(error).rstrip(".")
    return None
