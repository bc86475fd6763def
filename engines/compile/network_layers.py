"""Access to the layers of a TensorRT network definition."""

from __future__ import annotations

from typing import Any


def all_layers(network: Any) -> list[Any]:
    """Return the layers of a network in their order."""
    return [network.get_layer(index) for index in range(network.num_layers)]


def producers(network: Any) -> dict[str, Any]:
    """Return the layer that computes each tensor, by the name of the tensor."""
    return {layer.get_output(index).name: layer for layer in all_layers(network) for index in range(layer.num_outputs)}


def as_kind(layer: Any, kind: type) -> Any:
    """Give a layer the interface of its kind; TensorRT returns layers with the common interface."""
    layer.__class__ = kind
    return layer
