"""What a build will take, before it starts: stages, bytes, and on which machine each stage can run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from engines.bundle import DTYPES
from engines.compile.plan import BuildPlan
from engines.compile.quantise import choose, linear_layers
from engines.compile.targets import CannotCompileError, find_compiler, where
from engines.errors import ConfigError
from engines.pid import FoldedDecoder, PidConfig, PidDecoder
from engines.pid.sampler import MODEL_TIMESTEPS

_COMPILER_COPIES = 3.6  # of an engine's weights in the compiler's memory; seen with TensorRT for RTX 1.7


@dataclass(frozen=True)
class BuildStage:
    name: str
    what: str
    where: str
    memory: float  # bytes at its peak, about
    disk: float  # bytes it leaves, until the build is done


def stages(plan: BuildPlan) -> Iterator[BuildStage]:
    """The stages that a plan has, in order."""
    live, folded = (_parameters(plan.description.config, kind) for kind in (PidDecoder, FoldedDecoder))
    weights = _weight_bytes(plan, folded)
    here = "here"
    yield BuildStage("load, fold", f"{live / 1e6:,.0f} M parameters to {folded / 1e6:,.0f} M", here, 4.4 * live, 0)
    if plan.precision == "fp8":
        device = "here, on the GPU" if torch.cuda.is_available() else "here, on the CPU: latents cropped to 256x256"
        yield BuildStage("calibrate", f"from {_calibration(plan)}", device, 5 * folded, 0)
        yield BuildStage("quantise", "to e4m3, and measure each layer's error", here, 5.3 * folded, 0)
    yield BuildStage("cast", f"to {plan.precision}", here, 4.4 * folded, weights)
    if not plan.target.compiled:
        return
    yield BuildStage("check", "exported graphs by ONNX Runtime against PyTorch, at a small size", here, 9 * folded, 0)
    for size in plan.sizes:
        yield BuildStage("export", f"both graphs for {size} to ONNX", here, 3 * weights, weights)
    try:
        compiler = find_compiler(plan.target, plan.compiler)
        machine, package = "here", f"{compiler.package} {compiler.version}"
    except CannotCompileError:
        asked = plan.compiler or plan.target.compilers[0]
        machine, package = where(plan.target, asked), asked
    for size in plan.sizes:
        yield BuildStage(
            "compile", f"both engines for {size} by {package}", machine, _COMPILER_COPIES * weights, weights
        )
    gpu = torch.cuda.is_available() and torch.cuda.get_device_capability() == plan.target.compute_capability
    yield BuildStage(
        "verify", "engines against PyTorch", "here" if gpu else f"skipped: no {plan.target.gpu} here", 0, 0
    )


def check_disk(plan: BuildPlan) -> None:
    """Raise ConfigError where the disk cannot hold what the build leaves on it."""
    needed = sum(stage.disk for stage in stages(plan))
    parent = next(folder for folder in plan.output.resolve().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ConfigError(
            f"This build needs about {needed / 1e9:.1f} GB in {parent}, but {free / 1e9:.1f} GB are free there."
        )


def describe(plan: BuildPlan) -> str:
    """The plan as a table for people."""
    rows = [("stage", "what", "where", "memory", "disk")]
    found = list(stages(plan))
    rows += [(s.name, s.what, s.where, _gigabytes(s.memory), _gigabytes(s.disk)) for s in found]
    peak, total = max(s.memory for s in found), sum(s.disk for s in found)
    rows.append(("in all", str(plan.output), "", _gigabytes(peak), _gigabytes(total)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join((*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4])) for row in rows
    ]
    return "\n".join((*lines, *(f"warning: {warning}" for warning in plan.warnings)))


def _calibration(plan: BuildPlan) -> str:
    if plan.calibration is not None:
        return f"the latents in {plan.calibration}"
    return "the bundled photo" if plan.demo else "made-up latents"


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count else "-"


@cache
def _parameters(config: PidConfig, kind: type[nn.Module]) -> int:
    with torch.device("meta"):
        module = PidDecoder(config) if kind is PidDecoder else FoldedDecoder(config, MODEL_TIMESTEPS)
    return sum(parameter.numel() for parameter in module.parameters())


def _weight_bytes(plan: BuildPlan, folded: int) -> int:
    if plan.precision != "fp8":
        return folded * DTYPES[plan.precision].itemsize
    with torch.device("meta"):
        network = FoldedDecoder(plan.description.config, MODEL_TIMESTEPS)
    rules = choose(linear_layers(network), plan.keep)
    in_fp8 = sum(network.get_parameter(f"{name}.weight").numel() for name, rule in rules.items() if rule.fp8)
    return in_fp8 + 2 * (folded - in_fp8)
