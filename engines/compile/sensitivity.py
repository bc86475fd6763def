"""Measures the error that FP4 and FP8 cause in each linear layer alone, and FP8 in each attention alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from engines.compile import verify_fold
from engines.compile.variants import QuantisedLayers, set_fp8_attention, shallow_copy
from engines.compile.verify_fold import Probe
from engines.manifest import Quantised
from engines.pid import FoldedDecoder
from engines.pid.fp8_attention import AttentionRange


@dataclass(frozen=True)
class Error:
    """Relative velocity error with one layer or attention quantised."""

    name: str
    precision: Quantised
    value: float


def measure_errors(
    network: FoldedDecoder,
    layers: QuantisedLayers,
    attention_ranges: Mapping[str, AttentionRange],
    precisions: tuple[Quantised, ...],
    probe: Probe,
    expected: Tensor,
) -> Iterator[Error]:
    """Measure the relative velocity error of each layer alone in each precision, then of each attention alone in FP8.

    There are over a hundred, and a full-size network takes seconds per run on a CPU. Therefore only the first and the
    last step at sigma 0 are measured, and an error is the larger one of both steps.

    Args:
        network: The network before quantisation, on the CPU.
        layers: Its quantised layers.
        attention_ranges: Ranges of the attentions to measure.
        precisions: Precisions of the layers; a layer that cannot have one of them is left out.
        probe: Inputs of all timesteps and sigmas.
        expected: Velocities of the original network for `probe`.
    """
    trial = shallow_copy(network)
    small_probe, rows = verify_fold.first_and_last_step(probe)

    def error() -> float:
        return verify_fold.image_errors(verify_fold.velocities(trial, small_probe), expected[rows]).max().item()

    for name in layers.largest_inputs:
        for precision in precisions:
            if layers.supports(name, precision):
                trial.set_submodule(name, layers.make(name, precision))
                yield Error(name, precision, error())
        trial.set_submodule(name, layers.make(name, "16bit"))
    for name, found in attention_ranges.items():
        set_fp8_attention(trial, {name: found})
        yield Error(name, "fp8", error())
