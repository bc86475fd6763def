"""Variants of a folded network that share its tensors: another dtype, quantised layers and attention, fewer blocks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.compile.choose_layers import Assignment
from engines.compile.verify_fold import VerificationError
from engines.manifest import LayerPrecision
from engines.pid import FoldedDecoder
from engines.pid.blocks import attentions
from engines.pid.fp4 import Fp4Linear
from engines.pid.fp8 import Fp8Linear
from engines.pid.fp8_attention import AttentionRange, Fp8Attention, quantise_attention
from engines.pid.quantised import KINDS, quantise
from engines.pid.quantised_linear import QuantisedLinear


def shallow_copy(network: FoldedDecoder, dtype: torch.dtype | None = None) -> FoldedDecoder:
    """Copy the modules of a network but not its tensors, so that layers can be replaced in the copy only.

    Args:
        network: The network to copy.
        dtype: Dtype of the copy's parameters. Tables and quantised layers are not converted.
    """
    parameters = {name for name, _ in network.named_parameters()}
    state = {
        name: tensor.to(dtype) if dtype is not None and name in parameters else tensor
        for name, tensor in network.state_dict().items()
    }
    result = FoldedDecoder.for_state(network.config, network.timesteps, state)
    result.load_state_dict(state, strict=True, assign=True)
    result.pixel_memory_budget = network.pixel_memory_budget
    return result.eval().requires_grad_(False)


def cast(folded: FoldedDecoder, dtype: torch.dtype) -> None:
    """Cast the parameters in place, one at a time to save memory; the tables stay float32.

    Raises:
        VerificationError: A value is not finite in `dtype`.
    """
    for key, parameter in folded.named_parameters():
        parameter.data = parameter.data.to(dtype).contiguous()
        if not parameter.data.isfinite().all():
            name = str(dtype).removeprefix("torch.")
            raise VerificationError(f"The parameter {key} contains infinity or NaN in {name}.")


class QuantisedLayers:
    """The quantised forms of a network's linear layers, each made once, because that takes seconds for a large one."""

    def __init__(self, network: FoldedDecoder, largest_inputs: Mapping[str, float]) -> None:
        """Quantise layers of a network that is not quantised; `largest_inputs` are the inputs to expect, by layer."""
        self._network, self.largest_inputs = network, largest_inputs
        self._made: dict[tuple[str, LayerPrecision], QuantisedLinear] = {}

    def supports(self, name: str, precision: LayerPrecision) -> bool:
        """Return whether a layer can have a precision."""
        return precision != "fp4" or Fp4Linear.supports(self._linear(name))

    def make(self, name: str, precision: LayerPrecision) -> nn.Module:
        """Return a layer in a precision, on the CPU; in 16 bit it is the layer of the network."""
        linear = self._linear(name)
        if precision == "16bit":
            return linear
        key = (name, precision)
        if key not in self._made:
            self._made[key] = KINDS[precision].quantise(linear, self.largest_inputs[name])
        return self._made[key]

    def network(self, mixture: Assignment) -> FoldedDecoder:
        """Return a copy of the network with these precisions; everything else is shared."""
        result = shallow_copy(self._network)
        for name, precision in mixture.items():
            result.set_submodule(name, self.make(name, precision))
        return result

    def _linear(self, name: str) -> nn.Linear:
        layer = self._network.get_submodule(name)
        assert isinstance(layer, nn.Linear)  # noqa: S101  for mypy: the ranges are those of linear layers
        return layer


class TrialNetwork:
    """A network whose layers and attentions switch between precisions, to decode images with each of them.

    On a CPU, quantised weights are expanded when the precision of a layer changes, and not in every step. That is
    several times as fast, and needs memory for a second network.

    Attributes:
        decoder: The network, on the device.
    """

    def __init__(self, network: FoldedDecoder, layers: QuantisedLayers, device: torch.device) -> None:
        """Begin with nothing quantised; `network` is the one that `layers` quantises."""
        self.decoder = shallow_copy(network).to(device)
        self._layers, self._device = layers, device
        self._current: dict[str, LayerPrecision] = dict.fromkeys(layers.largest_inputs, "16bit")

    def set(self, mixture: Assignment, attention_ranges: Mapping[str, AttentionRange]) -> None:
        """Change the precisions of layers, and compute the named attentions in FP8 and all others not."""
        for name, precision in mixture.items():
            if precision != self._current[name]:
                self.decoder.set_submodule(name, self._on_device(self._layers.make(name, precision)))
                self._current[name] = precision
        set_fp8_attention(self.decoder, attention_ranges)

    def _on_device(self, layer: nn.Module) -> nn.Module:
        if self._device.type != "cpu":
            return copy.deepcopy(layer).to(self._device)
        return _ExpandedLinear(layer) if isinstance(layer, QuantisedLinear) else layer


class _ExpandedLinear(nn.Module):
    """Computes what a quantised layer emulates, with its weight expanded to float32 once."""

    def __init__(self, layer: QuantisedLinear) -> None:
        super().__init__()
        self._layer, self._weight = layer, layer.dequantised(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self._layer.round(x), self._weight, self._layer.bias)


def with_quantised(
    network: FoldedDecoder,
    largest_inputs: Mapping[str, float],
    attention_ranges: Mapping[str, AttentionRange] | None = None,
    kind: type[QuantisedLinear] = Fp8Linear,
) -> FoldedDecoder:
    """Return a copy in which the named layers are quantised and the named attentions in FP8; all else is shared."""
    result = shallow_copy(network)
    quantise(result, largest_inputs, kind)
    set_fp8_attention(result, attention_ranges or {})
    return result


def set_fp8_attention(network: FoldedDecoder, ranges: Mapping[str, AttentionRange]) -> None:
    """Compute the named attentions in FP8 and all others not, in place."""
    for name, attention in attentions(network).items():
        attention.fp8 = None
        if name in ranges:
            quantise_attention(attention, ranges[name])


def as_exported(network: FoldedDecoder) -> FoldedDecoder:
    """Return a copy that computes what an exported graph does, in which numerators of a softmax are not rounded."""
    result = shallow_copy(network)
    for module in result.modules():
        if isinstance(module, Fp8Attention):
            module.rounds_numerators = False
    return result


def first_and_last_block(network: FoldedDecoder) -> tuple[FoldedDecoder, dict[str, str]]:
    """Reduce a network to its first and last patch block.

    Returns:
        The small network, which shares tensors with `network`, and its module names -> names in `network`.
    """
    depth = network.config.patch_depth
    blocks = (0, depth - 1) if depth > 1 else (0,)
    config = replace(network.config, patch_depth=len(blocks), injection_interval=len(blocks))
    with torch.device("meta"):
        small = FoldedDecoder(config, network.timesteps)

    def original(name: str) -> str:
        parts = name.split(".")
        if parts[0] == "patch_blocks" and len(parts) > 1:
            parts[1] = str(blocks[int(parts[1])])
        return ".".join(parts)

    state = network.state_dict()
    small_state = {name: state[original(name)] for name in small.state_dict()}
    small_state["modulation_table"] = state["modulation_table"][:, list(blocks)]
    small.load_state_dict(small_state, strict=True, assign=True)
    names = {name: original(name) for name, _ in small.named_modules()}
    return small.eval().requires_grad_(False), names
