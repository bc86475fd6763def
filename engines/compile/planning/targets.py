"""The machines that bundles can be built for, and the packages that compile engines for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engines.compile.planning.options import Compiler
from engines.compile.planning.torch_tensorrt_package import distribution, installed_version
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
    packages: tuple[Package, ...] = ()  # TensorRT packages in order of preference; empty: PyTorch runs the weights
    gpu: str = "any"
    compute_capability: tuple[int, int] | None = None  # None: any
    memory_gb: int | None = None  # per device

    @property
    def compiled(self) -> bool:
        """Whether bundles for this target hold compiled engines instead of weights."""
        return bool(self.packages)

    @property
    def compilers(self) -> tuple[Compiler, ...]:
        """The compilers that an operator may choose from."""
        return (*self.packages, "torch-tensorrt") if self.compiled else ()

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
        Target("cpu", ("fp32", "bf16", "fp16", "fp8", "fp4")),
        Target("cuda", ("bf16", "fp8", "fp16", "fp32", "fp4")),
        Target("rtx5090", (*_ENGINE_PRECISIONS, "fp4"), ("tensorrt-rtx", "tensorrt"), "RTX 5090", (12, 0), 32),
        Target("gb200", (*_ENGINE_PRECISIONS, "fp4"), ("tensorrt",), "GB200", (10, 0), 186),
        Target("h200", _ENGINE_PRECISIONS, ("tensorrt",), "H200", (9, 0), 141),  # has no FP4 products
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


def engine_package(target: Target, compiler: Compiler | None) -> Package:
    """Return the TensorRT package that engines of a compiler run with; None is the default compiler.

    Torch-TensorRT uses the first package of the target.
    """
    return target.packages[0] if compiler is None or compiler == "torch-tensorrt" else compiler


def required_machine(target: Target, compiler: Compiler) -> str:
    """Describe the machines on which a compiler can compile engines for a target."""
    if engine_package(target, compiler) == "tensorrt-rtx":
        gpu = "with an NVIDIA GPU" if compiler == "torch-tensorrt" else "with or without a GPU"
        return f"a Linux machine (x86-64) {gpu}"
    article = "an" if target.gpu[0] in "HR" else "a"  # H and R are pronounced with a leading vowel
    return f"a machine with {article} {target.gpu}"


def compiler_name(tensorrt: TensorRT, compiler: Compiler | None) -> str:
    """Return the name and version of a compiler that is installed."""
    name = f"{tensorrt.package} {tensorrt.version}"
    if compiler != "torch-tensorrt":
        return name
    return f"{distribution(tensorrt.package)} {installed_version(tensorrt.package)} and {name}"


def find_compiler(target: Target, requested: Compiler | None = None) -> TensorRT:
    """Return the TensorRT package that compiles engines for a target on this machine.

    Args:
        target: A compiled target.
        requested: The compiler to use; by default the first of the target's TensorRT packages that works.

    Raises:
        CannotCompileError: No compiler works on this machine; the message names the machines that can compile.
    """
    compilers: tuple[Compiler, ...] = (requested,) if requested else target.packages
    reasons = []
    for compiler in compilers:
        obstacle = _missing_gpu(target, compiler) or _missing_package(target, compiler)
        if obstacle is None:
            return trt.import_package(engine_package(target, compiler))
        reasons.append(f"{compiler} needs {required_machine(target, compiler)}, but {obstacle}")
    raise CannotCompileError(f"Engines for {target.name} cannot be compiled on this machine: {'; '.join(reasons)}.")


def check_torch_tensorrt(target: Target) -> None:
    """Check that Torch-TensorRT is installed, if this machine has the GPU that it needs for a target.

    Without the GPU, a build ends before the compilation, and is continued on another machine.

    Raises:
        ConfigError: A package is missing or does not match the others.
    """
    if _missing_gpu(target, "torch-tensorrt") is None and (problem := _missing_package(target, "torch-tensorrt")):
        raise ConfigError(f"{problem}.")


def _missing_gpu(target: Target, compiler: Compiler) -> str | None:
    """Return why the GPU of this machine cannot be used for compiling, or None if it can or is not needed."""
    if compiler == "tensorrt-rtx":
        return None
    if (problem := cuda_problem()) is not None:
        return problem
    if engine_package(target, compiler) == "tensorrt" and not target.gpu_present:
        return f"this machine has {device_name(default_device())}"
    return None


def _missing_package(target: Target, compiler: Compiler) -> str | None:
    """Return why the packages of a compiler cannot be used, or None if they can."""
    package = engine_package(target, compiler)
    try:
        trt.import_package(package)
        if compiler == "torch-tensorrt":
            installed_version(package)
    except ConfigError as error:
        return str(error).rstrip(".")
    return None
