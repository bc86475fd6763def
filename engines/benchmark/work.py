"""Work of one decode, counted without computing it: operations and bytes of every matrix product, by kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from engines.benchmark.roofline import NO_CHUNKING
from engines.compile.planning.layer_rules import rule_for
from engines.manifest import Precision
from engines.pid import FoldedDecoder, PidConfig
from engines.pid.blocks import JointAttention, SelfAttention
from engines.pid.fp4 import FP4_BYTES
from engines.pid.sampler import MODEL_TIMESTEPS
from engines.size import Size

LinearKind = Literal["linear", "FP8 linear", "FP4 linear"]
Kind = LinearKind | Literal["joint attention", "pixel attention", "convolution"]

_BYTES: Mapping[LinearKind, float] = {"linear": 2, "FP8 linear": 1, "FP4 linear": FP4_BYTES}  # per input or weight
_QUANTISED: Mapping[Precision, LinearKind] = {"fp8": "FP8 linear", "fp4": "FP4 linear"}


@dataclass(frozen=True)
class Product:
    """One matrix product, attention or convolution, in 16 bits unless it is a quantised layer."""

    kind: Kind
    flops: int
    activation_bytes: int  # inputs read and outputs written
    weight_bytes: int
    fp4_inputs: int = 0  # numbers that another kernel has to quantise to FP4 before

    @property
    def nbytes(self) -> int:
        """Bytes that the product moves."""
        return self.activation_bytes + self.weight_bytes


@dataclass(frozen=True)
class Work:
    """The products of one call of each graph, for one image."""

    condition: Sequence[Product]
    step: Sequence[Product]


def count_work(config: PidConfig, size: Size, precision: Precision) -> Work:
    """Count the products of a decode in bf16, FP8 or FP4, on the meta device: nothing is computed.

    In FP8 and FP4, all layers have this precision that may be quantised. Attention stays in 16 bits.
    """
    products: list[Product] = []
    with torch.device("meta"), torch.no_grad():
        decoder = FoldedDecoder(config, MODEL_TIMESTEPS)
        decoder.pixel_memory_budget = NO_CHUNKING
        for name, module in decoder.named_modules():
            if (count := _counter(name, module, precision)) is not None:
                module.register_forward_hook(_record(products, count))
        latent = torch.empty(1, config.latent_channels, *config.latent_size(size))
        caption = torch.empty(1, config.caption_tokens, config.caption_width)
        conditioning = decoder.condition(latent, caption, size)
        condition, products[:] = tuple(products), []
        step_index = torch.zeros(1, dtype=torch.long)
        decoder.velocity_at(torch.empty(1, 3, *size), step_index, conditioning, torch.empty(1))
    return Work(condition, tuple(products))


_Counter = Callable[[Sequence[Tensor], Tensor], Product]  # of the inputs and the output of a module


def _record(products: list[Product], count: _Counter) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        products.append(count(inputs, output))

    return hook


def _counter(name: str, module: nn.Module, precision: Precision) -> _Counter | None:
    if isinstance(module, nn.Linear):
        kind = _QUANTISED.get(precision, "linear") if rule_for(name).quantised else "linear"
        return lambda inputs, output: _linear(module, inputs[0], output, kind)
    if isinstance(module, nn.Conv2d):
        return lambda inputs, output: _convolution(module, inputs[0], output)
    if isinstance(module, JointAttention):
        return lambda inputs, output: _joint_attention(module, inputs[0], inputs[1])
    if isinstance(module, SelfAttention):
        return lambda inputs, output: _attention("pixel attention", inputs[0].shape[1], inputs[0].shape[1], inputs[0])
    return None


def _linear(layer: nn.Linear, x: Tensor, output: Tensor, kind: LinearKind) -> Product:
    rows = x.numel() // layer.in_features
    return Product(
        kind,
        flops=2 * rows * layer.in_features * layer.out_features,
        activation_bytes=int(_BYTES[kind] * x.numel()) + 2 * output.numel(),  # outputs are in 16 bits
        weight_bytes=int(_BYTES[kind] * layer.weight.numel()),
        fp4_inputs=x.numel() if kind == "FP4 linear" else 0,
    )


def _convolution(layer: nn.Conv2d, x: Tensor, output: Tensor) -> Product:
    flops = 2 * output.numel() * layer.in_channels * math.prod(layer.kernel_size)
    return Product("convolution", flops, 2 * (x.numel() + output.numel()), 2 * layer.weight.numel())


def _joint_attention(module: JointAttention, x: Tensor, y: Tensor) -> Product:
    image, caption = x.shape[1], y.shape[1]
    return _attention("joint attention", image + (caption if module.caption_output else 0), image + caption, x)


def _attention(kind: Kind, queries: int, keys: int, x: Tensor) -> Product:
    width = x.shape[-1]
    return Product(kind, 4 * queries * keys * width, 2 * width * (2 * queries + 2 * keys), 0)
