"""Registers, spills and shared memory of Triton kernels, by compiling them for an architecture. Needs no GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from engines.runtime.triton.architectures import Architecture
from engines.runtime.triton.assembler import use_correct_assembler

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_MATRIX = re.compile(r"\b(?:HGMMA|QGMMA|HMMA|QMMA|OMMA|UTC[A-Z]*MMA)\b")


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs."""

    kernel: str
    registers: int  # per thread
    spilled: int  # bytes per thread of local memory: registers that did not fit, and arrays
    shared: int  # bytes per block
    warps: int  # per block
    matrix_instructions: tuple[str, ...]  # instructions of the tensor cores that occur, such as HGMMA


def compiled_resources(architecture: Architecture, launch: Callable[[], object]) -> tuple[Resources, ...]:
    """Compile the kernels that `launch` launches, on tensors without data, and return what each needs.

    Raises:
        RuntimeError: Triton has no assembler that compiles the kernels correctly.
        Exception: A kernel cannot be compiled.
    """
    if reason := use_correct_assembler(architecture):
        raise RuntimeError(reason)
    with _compile_only(architecture) as kernels:
        launch()
    return tuple(map(_resources, kernels))


class _Target:
    """Stands in for the driver of a GPU while kernels are compiled."""

    def __init__(self, architecture: Architecture) -> None:
        self._capability = int(architecture.removeprefix("sm_"))

    def get_current_device(self) -> int:
        return self._capability  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)


@contextmanager
def _compile_only(architecture: Architecture) -> Iterator[list[Any]]:
    """Compile kernels instead of launching them; yield the list of compiled kernels."""
    kernels: list[Any] = []
    run, active = JITFunction.run, driver._active

    def compile_kernel(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernels.append(run(self, *args, grid=grid, warmup=True, **options))

    JITFunction.run = compile_kernel
    driver.set_active(_Target(architecture))
    try:
        yield kernels
    finally:
        JITFunction.run, driver._active = run, active


def _resources(kernel: Any) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = _cuobjdump("-res-usage", file.name), _cuobjdump("-sass", file.name)

    def number(name: str) -> int:
        found = re.search(rf"\b{name}:(\d+)", usage)
        if found is None:
            raise RuntimeError(f"cuobjdump did not report {name} of {kernel.metadata.name}: {usage}")
        return int(found[1])

    return Resources(
        kernel=kernel.metadata.name,
        registers=number("REG"),
        spilled=number("STACK"),
        shared=kernel.metadata.shared,
        warps=kernel.metadata.num_warps,
        matrix_instructions=tuple(sorted(set(_MATRIX.findall(code)))),
    )


def _cuobjdump(option: str, file: str) -> str:
    return subprocess.run(  # noqa: S603  a program of the package, a file of our own
        [_TOOLS / "cuobjdump", option, file], capture_output=True, text=True, check=True
    ).stdout
