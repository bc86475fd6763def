"""The machines that bundles can be built for, and the packages that compile engines for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engines.errors import ConfigError, PidError
from engines.machine import device_name
from engines.manifest import Package, Precision
from engines.runtime import trt
from engines.runtime.devices import cuda_problem, default_device
from engines.runtime.trt import TensorRT


class CannotCompileError(PidError):
    """This machine cannot compile engines for the target, but another one can."""

    code = "cannot-compile"


@dataclass(frozen=True)
class Target:
    """A machine that bundles can be built for."""

    name: str
    precisions: tuple[Precision, ...]  # the first is the default
    compilers: tuple[Package, ...] = ()  # in order of preference; empty: PyTorch runs the weights
    gpu: str = "any"
    compute_capability: tuple[int, int] | None = None  # None: any
    memory_gb: int | None = None  # per device

    @property
    def compiled(self) -> bool:
        """Whether bundles for this target hold compiled engines instead of weights."""
        return bool(self.compilers)

    @property
    def gpu_present(self) -> bool:
        """Whether the first GPU is of the kind that engines for this target run on.

        Raises:
            ConfigError: CUDA cannot use it.
        """
        device = default_device()
        return device.type == "cuda" and torch.cuda.get_device_capability(device) == self.compute_capability


# Not fp16: TensorRT's attention kernels for float16 also sum in it, so large images overflow without an error.
_ENGINE_PRECISIONS: tuple[Precision, ...] = ("bf16", "fp8")

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("cpu", ("fp32", "bf16", "fp16", "fp8")),
        Target("cuda", ("bf16", "fp8", "fp16", "fp32")),
        Target("rtx5090", _ENGINE_PRECISIONS, ("tensorrt-rtx", "tensorrt"), "RTX 5090", (12, 0), 32),
        Target("gb200", _ENGINE_PRECISIONS, ("tensorrt",), "GB200", (10, 0), 186),
        Target("h200", _ENGINE_PRECISIONS, ("tensorrt",), "H200", (9, 0), 141),
    )
}


def find_target(name: str) -> Target:
    """Look up a target.

    Raises:
        ConfigError: The name is unknown.
    """
    if name not in TARGETS:
        raise ConfigError(f"Unknown target {name!r}. Available targets: {', '.join(TARGETS)}.")
    return TARGETS[name]


def required_machine(target: Target, package: Package) -> str:
    """Describe the machines on which a package can compile engines for a target."""
    if package == "tensorrt-rtx":
        return "a Linux machine (x86-64), with or without a GPU"
    article = "an" if target.gpu[0] in "HR" else "a"  # H and R are pronounced with a leading vowel
    return f"a machine with {article} {target.gpu}"


def find_compiler(target: Target, requested: Package | None = None) -> TensorRT:
    """Return the TensorRT package that compiles engines for a target on this machine.

    Args:
        target: A compiled target.
        requested: The package to use; by default the first of the target's packages that works.

    Raises:
        CannotCompileError: No package works on this machine; the message names the machines that can compile.
    """
    reasons = []
    for package in (requested,) if requested else target.compilers:
        obstacle = _obstacle(target, package)
        if obstacle is None:
            return trt.import_package(package)
        reasons.append(f"{package} needs {required_machine(target, package)}, but {obstacle}")
    raise CannotCompileError(f"Engines for {target.name} cannot be compiled on this machine: {'; '.join(reasons)}.")


def _obstacle(target: Target, package: Package) -> str | None:
    """Return why a package cannot compile on this machine, or None if it can."""
    if package == "tensorrt":
        if (problem := cuda_problem()) is not None:
            return problem
        if not target.gpu_present:
            return f"this machine has {device_name(default_device())}"
    try:
        trt.import_package(package)
    except ConfigError as error:
        return str(error).rstrip(".")
    return None
