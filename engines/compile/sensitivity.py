"""Measures the error that FP8 causes in each linear layer and each attention alone."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from engines.compile import verify_fold
from engines.compile.inputs.calibrate import Ranges
from engines.compile.variants import set_fp8_attention, shallow_copy
from engines.compile.verify_fold import Probe
from engines.pid import FoldedDecoder, fp8


def measure_errors(
    network: FoldedDecoder, ranges: Ranges, probe: Probe, expected: Tensor
) -> Iterator[tuple[str, float]]:
    """Measure the relative velocity error that each linear layer and each attention alone causes in FP8.

    There are over a hundred, and a full-size network takes seconds per run on a CPU. Therefore only the first and the
    last step at sigma 0 are measured.

    Args:
        network: The network before quantisation, on the CPU.
        ranges: Ranges of the layers and attentions to measure.
        probe: Inputs of all timesteps and sigmas.
        expected: Velocities of the original network for `probe`.

    Yields:
        Name of a layer or attention, and the larger of the errors of both steps.
    """
    copy = shallow_copy(network)
    small_probe, rows = verify_fold.first_and_last_step(probe)

    def error() -> float:
        return verify_fold.image_errors(verify_fold.velocities(copy, small_probe), expected[rows]).max().item()

    for layer, largest in ranges.inputs.items():
        original = copy.get_submodule(layer)
        fp8.quantise(copy, {layer: largest})
        yield layer, error()
        copy.set_submodule(layer, original)
    for name, found in ranges.attentions.items():
        set_fp8_attention(copy, {name: found})
        yield name, error()
