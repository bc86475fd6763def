"""Relative durations of what a build does, to estimate the time that it still needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from engines.compile.inputs import photo_calibration
from engines.compile.inputs.calibrate import SYNTHETIC_SIGMAS, calibration_files
from engines.compile.planning.layer_rules import linear_layers, network_rules
from engines.compile.planning.plan import BuildPlan
from engines.compile.quantise import LAYERS_PER_REPORT
from engines.compile.verify_onnx import DTYPES
from engines.pid import FoldedDecoder
from engines.pid.graphs import GRAPHS
from engines.pid.sampler import MODEL_TIMESTEPS


@dataclass(frozen=True)
class Phase:
    """Part of a build that begins with one call of its progress callback."""

    stage: str  # first argument of the call
    work: float  # relative duration


def phases(plan: BuildPlan) -> Iterator[Phase]:
    """Predict the phases of a build, in order.

    The numbers are seconds on two CPU cores, as a constant plus a multiple of the network's parameters. Only their
    ratios matter: the speed of this machine shows while it builds.
    """
    with torch.device("meta"):
        network = FoldedDecoder(plan.decoder.config, MODEL_TIMESTEPS)
    billions = sum(parameter.numel() for parameter in network.parameters()) / 1e9

    def phase(stage: str, constant: float, per_billion: float) -> Phase:
        return Phase(stage, constant + per_billion * billions)

    yield from (phase("load", 0.5, 15), phase("verify", 1, 10), phase("fold", 0.5, 10), phase("verify", 1, 10))
    if plan.quantised:
        assigned = network_rules(network, plan.attention_kinds, plan.options.keep)
        in_fp8 = {name: rule for name, rule in assigned.items() if rule.quantised}
        layers = linear_layers(network) if plan.quantised == "fp4" else ()
        in_fp4 = {name: in_fp8[name] for name in layers if name in in_fp8}
        images = _calibration_images(plan)
        yield from [phase("calibrate", 0.7, 12)] * images
        yield from [phase("measure", 1, 8 if in_fp4 else 4)] * -(-(len(in_fp8) + len(in_fp4)) // LAYERS_PER_REPORT)
        if plan.target.compiled:
            kinds = sum(len({rule.pattern for rule in rules.values()}) for rules in (in_fp8, in_fp4))
            yield from [phase("check", 8, 3)] * kinds
        # The first candidate for FP8 attention usually is chosen, and the first mixture of FP4 and FP8.
        yield from [phase("compare", 0.7, 12)] * images * (2 if in_fp4 else 1)
    yield from (phase("cast", 0.1, 2), phase("verify", 1, 10))
    if plan.precision == "fp16":
        yield from [phase("verify", 0.7, 12)] * _calibration_images(plan)
        yield phase("verify", 0.1, 0)
    if plan.target.compiled:
        yield from [phase("check", 12, 70)] * len(DTYPES)
        if plan.exports_onnx:
            yield from [phase("export", 8, 10)] * len(GRAPHS)
        conversion = (12, 45) if plan.options.compiler == "torch-tensorrt" else (0, 0)
        yield from [phase("compile", 1 + len(plan.sizes) + conversion[0], 5 + conversion[1])] * len(GRAPHS)
        if plan.target.gpu_present:
            yield from [phase("verify", 5, 10)] * len(plan.sizes)
    yield phase("write", 0.1, 1)


def _calibration_images(plan: BuildPlan) -> int:
    if plan.options.calibration is not None:
        return len(calibration_files(plan.options.calibration))
    return photo_calibration.COUNT if plan.bundled_decoder else len(SYNTHETIC_SIGMAS)
