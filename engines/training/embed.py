"""Put a trained `PixelNetwork` into a decoder whose weights were set by `initialise_velocity`.

The adapter computes the features of all pixels of a cell. The two parts of the output reach the pixel block's condition
by different paths. The coarse one passes the first gate of the patch blocks and, in ± pairs, the SiLU after
them. The fine one is added behind that SiLU, through its own gate.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.pid import PidDecoder
from engines.pid.config import PATCH_PIXELS
from engines.training.initialise import IMAGE_CHANNELS, pixel_shift
from engines.training.pixel_network import (
    CELL,
    CELL_PIXELS,
    COARSE_GATE,
    FINE_GATE,
    PixelNetwork,
    cell_kernel,
    output_map,
    plane_patches,
    to_image,
)

COARSE_RANK = 24
FINE_RANK = IMAGE_CHANNELS - 2 * COARSE_RANK


class LinearMap(NamedTuple):
    """A map from the features of a cell to its patch, of rank R: intermediate values, and the patch of each."""

    readout: Tensor  # [16·C, R]
    patches: Tensor  # [R, 3·256]


def reduce_rank(matrix: Tensor, moments: Tensor, rank: int) -> LinearMap:
    """Return the map of the given rank closest to `matrix` [F, P], on features with second moments [F, F]."""
    patches = torch.linalg.eigh(matrix.T @ moments @ matrix).eigenvectors[:, -rank:]  # [P, R]
    readout = matrix @ patches
    spread = (readout * (moments @ readout)).sum(dim=0).sqrt()
    return LinearMap(readout / spread, (patches * spread).T)


@torch.no_grad()
def embed(network: PixelNetwork, moments: Tensor, decoder: PidDecoder) -> None:
    """Make the decoder compute the image of a pixel network, except for a loss of rank at the end.

    Args:
        network: The trained network.
        moments: Second moments [16·C, 16·C] of the features of cells (`cell_features`), float64.
        decoder: Prepared by `initialise_velocity`, float32 on the CPU.
    """
    weights = decoder.state_dict()
    _set_convolutions(network, weights)
    for gate, initial in (("lq_proj.gate_modules.0", COARSE_GATE), ("pit_lq_gate", FINE_GATE)):
        weights[gate + ".content_proj.bias"].fill_(initial.bias)
        weights[gate + ".log_alpha"].fill_(initial.log_alpha)
    coarse = reduce_rank(output_map(network.coarse).double(), moments, COARSE_RANK)
    missing = output_map(network.fine + network.coarse).double() - coarse.readout @ coarse.patches
    shared = missing @ torch.linalg.pinv(coarse.patches)  # what the coarse patches can represent
    fine = reduce_rank(missing - shared @ coarse.patches, moments, FINE_RANK)
    _set_heads(weights, coarse.readout, torch.cat((shared, fine.readout), dim=1))
    patches = torch.cat((coarse.patches, -coarse.patches, fine.patches)).float()  # [D', 3·256]
    weight, bias = pixel_shift(decoder)
    weight.zero_()
    weight[..., :IMAGE_CHANNELS] = -patches.view(-1, 3, PATCH_PIXELS).permute(2, 1, 0)
    bias.copy_(-to_image(network.bias[None]).view(3, PATCH_PIXELS).T)


def cell_features(features: Tensor) -> Tensor:
    """Arrange the features of pixels [B, C, 4h, 4w] by cells, as the adapter has them: [B, h, w, 16·C]."""
    return F.pixel_unshuffle(features, CELL).permute(0, 2, 3, 1)


def _set_convolutions(network: PixelNetwork, weights: dict[str, Tensor]) -> None:
    """Set the adapter up to its heads; it then computes `network.features`, arranged by cells."""
    for name, tensor in network.state_dict().items():
        layer, *rest = name.split(".")
        if layer == "first" and rest == ["weight"]:
            cells = torch.einsum("fpnm,pz->fznm", cell_kernel(tensor).double(), plane_patches())
        elif tensor.ndim == 4:
            cells = cell_kernel(tensor)
        elif tensor.ndim == 3:
            cells = tensor.flatten()  # a bias for each position in a cell
        else:
            cells = tensor.repeat_interleave(CELL_PIXELS)  # of a group norm
        if layer == "blocks":
            weights[".".join(("lq_proj.latent_proj", str(3 + int(rest[0])), *rest[1:]))].copy_(cells)
        elif layer in ("first", "second"):
            weights[".".join(("lq_proj.latent_proj", "0" if layer == "first" else "2", *rest))].copy_(cells)


def _set_heads(weights: dict[str, Tensor], coarse: Tensor, fine: Tensor) -> None:
    """Move values from the adapter to the hidden channels: coarse, −coarse, and fine ones, some on those of coarse."""
    fine_gain, coarse_gain = (1 / torch.tensor(gate.bias).sigmoid() for gate in (FINE_GATE, COARSE_GATE))
    pixel, *injections = (
        weights[f"lq_proj.{head}.weight"] for head in ("pit_head", "output_heads.0", "output_heads.1")
    )
    pixel[:IMAGE_CHANNELS] = 0
    pixel[:COARSE_RANK] = fine_gain * fine.T[:COARSE_RANK]
    pixel[2 * COARSE_RANK : IMAGE_CHANNELS] = fine_gain * fine.T[COARSE_RANK:]
    for injection in injections:
        injection[: 2 * COARSE_RANK] = 0
    injections[0][: 2 * COARSE_RANK] = coarse_gain * torch.cat((coarse, -coarse), dim=1).T
