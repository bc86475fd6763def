"""Resource estimate of a build: its stages, their memory and disk space, and the machines that can run them."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from engines.bundle import DTYPES
from engines.compile.planning.layer_rules import linear_layers, network_rules
from engines.compile.planning.plan import BuildPlan
from engines.compile.planning.targets import CannotCompileError, compiler_name, find_compiler, required_machine
from engines.errors import ConfigError
from engines.pid import FoldedDecoder, PidConfig, PidDecoder
from engines.pid.fp4 import FP4_BYTES
from engines.pid.sampler import MODEL_TIMESTEPS
from engines.runtime.devices import default_device

_COMPILER_COPIES = 5.2  # peak memory of the compilation per byte of weights, measured with TensorRT for RTX 1.7
_HERE = "this machine"


@dataclass(frozen=True)
class BuildStage:
    """Estimate of one stage."""

    name: str
    task: str
    machine: str
    memory: float  # approximate peak in bytes
    disk: float  # bytes that it leaves in the workspace


def stages(plan: BuildPlan) -> Iterator[BuildStage]:
    """Estimate the stages of a build, in order."""
    live, folded = (_count_parameters(plan.decoder.config, kind) for kind in (PidDecoder, FoldedDecoder))
    weights = _weight_bytes(plan, folded)
    yield BuildStage("load, fold", f"{live / 1e6:,.0f} M parameters to {folded / 1e6:,.0f} M", _HERE, 4.4 * live, 0)
    if plan.quantised:
        yield BuildStage("calibrate", f"with {_calibration(plan)}", _calibration_device(), 5 * folded, 0)
        formats = {"fp8": "e4m3", "fp4": "e2m1 and e4m3"}[plan.quantised]
        task = f"to {formats}, measuring the error of each layer"
        yield BuildStage("quantise", task, _HERE, 11.5 * folded, 0)
    yield BuildStage("cast", f"to {plan.precision}", _HERE, 4.4 * folded, weights)
    if plan.precision == "fp16":
        yield BuildStage("verify", f"range of float16 with {_calibration(plan)}", _calibration_device(), 3 * folded, 0)
    if not plan.target.compiled:
        return
    memory = (14.5 if plan.quantised else 9) * folded  # ONNX Runtime expands quantised weights, and transposes them
    yield BuildStage("check", "exported graphs: ONNX Runtime against PyTorch, small size", _HERE, memory, 0)
    if plan.exports_onnx:
        yield BuildStage("export", "both graphs to ONNX", _HERE, 3 * weights, weights)
    compiler, machine = _compiler(plan)
    task = f"both engines with {compiler}, for {', '.join(map(str, plan.profiles))}"
    yield BuildStage("compile", task, machine, _COMPILER_COPIES * weights, weights)
    gpu = _HERE if plan.target.gpu_present else f"skipped: this machine has no {plan.target.gpu}"
    yield BuildStage("verify", "engines against PyTorch", gpu, 0, 0)


def check_resources(plan: BuildPlan) -> None:
    """Check that there is enough disk space and memory for the build.

    Raises:
        ConfigError: There is not enough.
    """
    estimates = list(stages(plan))
    peak = max(stage.memory for stage in estimates if stage.machine == _HERE)
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if peak > installed:
        raise ConfigError(
            f"Not enough memory: the build needs about {peak / 1e9:.1f} GB, but this machine has only "
            f"{installed / 1e9:.1f} GB."
        )
    needed = sum(stage.disk for stage in estimates)
    parent = next(folder for folder in plan.options.output.resolve().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ConfigError(
            f"Not enough disk space in {parent}: the build needs about {needed / 1e6:,.0f} MB, but only "
            f"{free / 1e6:,.0f} MB are free."
        )


def format_estimate(plan: BuildPlan) -> str:
    """Format the estimate as a text table, followed by the warnings of the plan."""
    found = list(stages(plan))
    rows = [("stage", "task", "machine", "memory", "disk")]
    rows += [(s.name, s.task, s.machine, _gigabytes(s.memory), _gigabytes(s.disk)) for s in found]
    peak, total = max(s.memory for s in found), sum(s.disk for s in found)
    rows.append(("total", str(plan.options.output), "", _gigabytes(peak), _gigabytes(total)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join((*lines, *(f"warning: {warning}" for warning in plan.warnings)))


def _calibration_device() -> str:
    return "this GPU" if default_device().type == "cuda" else "this CPU, latents cropped to 256x256"


def _calibration(plan: BuildPlan) -> str:
    if plan.options.calibration is not None:
        return f"the latents in {plan.options.calibration}"
    return "the bundled photo" if plan.bundled_decoder else "synthetic latents"


def _compiler(plan: BuildPlan) -> tuple[str, str]:
    """Return the compiler's name, with its version if it is installed, and the machine it needs."""
    requested = plan.options.compiler
    try:
        return compiler_name(find_compiler(plan.target, requested), requested), _HERE
    except CannotCompileError:
        compiler = requested or plan.target.packages[0]
        return compiler, required_machine(plan.target, compiler)


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count else "-"


@cache
def _count_parameters(config: PidConfig, kind: type[nn.Module]) -> int:
    with torch.device("meta"):
        module = PidDecoder(config) if kind is PidDecoder else FoldedDecoder(config, MODEL_TIMESTEPS)
    return sum(parameter.numel() for parameter in module.parameters())


def _weight_bytes(plan: BuildPlan, folded: int) -> int:
    if not plan.quantised:
        return folded * DTYPES[plan.precision].itemsize
    with torch.device("meta"):
        network = FoldedDecoder(plan.decoder.config, MODEL_TIMESTEPS)
    rules = network_rules(network, plan.attention_kinds, plan.options.keep)
    quantised = sum(
        network.get_parameter(f"{name}.weight").numel() for name in linear_layers(network) if rules[name].quantised
    )
    share = 0.0 if plan.quantised == "fp8" else 1.0 if plan.options.fp4_share is None else plan.options.fp4_share
    return math.ceil(quantised * (1 - share * (1 - FP4_BYTES))) + 2 * (folded - quantised)
