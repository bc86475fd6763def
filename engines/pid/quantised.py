"""Linear layers with less than 16 bits per weight in a network: quantising them, and restoring them from a state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from engines.pid.fp4 import Fp4Linear
from engines.pid.fp8 import Fp8Linear
from engines.pid.quantised_linear import QuantisedLinear

KINDS: Mapping[str, type[QuantisedLinear]] = {"fp8": Fp8Linear, "fp4": Fp4Linear}
Layer = TypeVar("Layer", bound=nn.Module)


def quantise(network: nn.Module, largest_inputs: Mapping[str, float], kind: type[QuantisedLinear] = Fp8Linear) -> None:
    """Quantise linear layers of a network in place.

    Args:
        network: The network to change.
        largest_inputs: Layer name -> largest |input| to expect.
        kind: What the layers become.

    Raises:
        TypeError: A named module is not a linear layer.
    """
    for name, largest in largest_inputs.items():
        layer = network.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise TypeError(f"{name} is a {type(layer).__name__}, not a linear layer.")
        network.set_submodule(name, kind.quantise(layer, largest))


def replace_with_quantised_layers(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Replace in place, by an empty quantised layer, each linear layer that is quantised in the state dictionary."""
    for name, layer in list(network.named_modules()):
        if not isinstance(layer, nn.Linear) or f"{name}.input_scale" not in state:
            continue
        kind = Fp4Linear if f"{name}.block_scale" in state else Fp8Linear
        with torch.device(layer.weight.device):
            replacement = kind(layer.in_features, layer.out_features, bias=layer.bias is not None)
        network.set_submodule(name, replacement)


def quantised_layers(network: nn.Module, kind: type[Layer]) -> dict[str, Layer]:
    """Return the layers of a kind by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, kind)}


def count_emulated(network: nn.Module, device: torch.device) -> dict[str, int]:
    """Return how many layers of each kind a device emulates, because it cannot multiply their numbers."""
    counts = {
        name: sum(not layer.has_product(device) for layer in quantised_layers(network, kind).values())
        for name, kind in KINDS.items()
    }
    return {name: count for name, count in counts.items() if count}
