"""ESRGAN, the published network that the evaluation compares the bundled decoder with.

The weights are those of `models/x4` in the npm package `@upscalerjs/esrgan-thick` (MIT), in the layers format of
TensorFlow.js: `model.json` describes float32 tensors, which follow one another in the files that it names. The network
consists of residual-in-residual dense blocks as in ESRGAN (arXiv:1809.00219), with ReLU and one pixel shuffle.
"""

from __future__ import annotations

import json
import math
from itertools import count, takewhile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.errors import CheckpointError

PACKAGE = "@upscalerjs/esrgan-thick"
UPSCALE = 4
_RESIDUAL_SCALE = 0.2  # of a block's output, before its input is added
_PADDING = 4  # in low-resolution pixels; wider padding improves nothing

Weights = dict[str, Tensor]


class Esrgan(nn.Module):
    """The network, built from its weights by Keras names; RGB in [0, 1]."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.head = _convolution(weights, "Pre_blocks_conv")
        self.blocks = nn.Sequential(*(_Block(weights, i) for i in _numbers(weights, "LFF_{}_1")))
        self.tail = _convolution(weights, "post_blocks_conv")
        self.before_shuffle = _convolution(weights, "PreShuffle")
        self.output = _convolution(weights, "SR")

    def forward(self, image: Tensor) -> Tensor:
        """Upscale [B, 3, h, w] to [B, 3, 4h, 4w]."""
        features = self.head(image)
        features = features + self.tail(self.blocks(features))
        return self.output(_depth_to_space(self.before_shuffle(features)))

    @torch.no_grad()
    def upscale(self, low: Tensor) -> Tensor:
        """Upscale RGB [B, 3, h, w] in [-1, 1] to [B, 3, 4h, 4w], clamped to [-1, 1].

        The image is extended by its border pixels. Otherwise the network, which pads with zeros, would darken the
        borders, and crops would lose up to 9 dB of PSNR.
        """
        border = UPSCALE * _PADDING
        padded = F.pad((low + 1) / 2, (_PADDING,) * 4, mode="replicate")
        large = torch.cat([self(image[None]) for image in padded])  # one by one: less memory, and faster on a CPU
        return (2 * large - 1).clamp(-1, 1)[:, :, border:-border, border:-border]


class _Block(nn.Module):
    """Residual-in-residual dense block."""

    def __init__(self, weights: Weights, block: int) -> None:
        super().__init__()
        dense = (_DenseBlock(weights, f"{block}_{i}") for i in _numbers(weights, f"LFF_{block}_{{}}"))
        self.dense_blocks = nn.Sequential(*dense)

    def forward(self, features: Tensor) -> Tensor:
        return features + _RESIDUAL_SCALE * self.dense_blocks(features)


class _DenseBlock(nn.Module):
    """Convolutions that each see the input and the outputs of all earlier ones, then one that fuses all of them."""

    def __init__(self, weights: Weights, name: str) -> None:
        super().__init__()
        layers = (_convolution(weights, f"F_{name}_{i}") for i in _numbers(weights, f"F_{name}_{{}}"))
        self.layers = nn.ModuleList(layers)
        self.fusion = _convolution(weights, f"LFF_{name}")

    def forward(self, features: Tensor) -> Tensor:
        seen = features
        for layer in self.layers:
            seen = torch.cat((seen, layer(seen).relu()), dim=1)
        return features + _RESIDUAL_SCALE * self.fusion(seen)


def _numbers(weights: Weights, name: str) -> list[int]:
    """Return 1, 2, … up to the last consecutive number that makes the template `name` the name of a layer."""
    return list(takewhile(lambda i: f"{name.format(i)}/kernel" in weights, count(1)))


def _convolution(weights: Weights, name: str) -> nn.Conv2d:
    kernel, bias = weights[f"{name}/kernel"], weights[f"{name}/bias"]  # [side, side, in, out], [out]
    side, _, inputs, outputs = kernel.shape
    layer = nn.Conv2d(inputs, outputs, side, padding="same")
    layer.load_state_dict({"weight": kernel.permute(3, 2, 0, 1), "bias": bias})
    return layer


def _depth_to_space(values: Tensor) -> Tensor:
    """Shuffle [B, 16·C, h, w] to [B, C, 4h, 4w] in TensorFlow's channel order: the colour varies fastest."""
    grouped = values.unflatten(1, (UPSCALE**2, -1)).transpose(1, 2)  # [B, C, 16, h, w]
    return F.pixel_shuffle(grouped.flatten(1, 2), UPSCALE)


def _read_weights(folder: Path) -> Weights:
    """Return the tensors by name of a model in the layers format of TensorFlow.js."""
    (group,) = json.loads((folder / "model.json").read_text())["weightsManifest"]
    data = b"".join((folder / name).read_bytes() for name in group["paths"])
    values = torch.from_numpy(np.frombuffer(data, "<f4").copy())
    specs = {spec["name"]: spec["shape"] for spec in group["weights"]}
    tensors = values.split([math.prod(shape) for shape in specs.values()])
    return {name: tensor.view(shape) for (name, shape), tensor in zip(specs.items(), tensors, strict=True)}


def load(package: Path) -> Esrgan:
    """Load the 4× network of an unpacked npm package, the folder that contains `models`.

    Raises:
        CheckpointError: The files are missing, damaged, or those of a different network.
    """
    folder = package / "models" / f"x{UPSCALE}"
    try:
        return Esrgan(_read_weights(folder)).eval()
    except OSError as error:
        raise CheckpointError(
            f"Cannot read {error.filename} ({error.strerror}); {package} must be the folder `package` of the unpacked "
            f"npm package {PACKAGE}."
        ) from error
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder} does not contain the network of the npm package {PACKAGE}.") from error
