"""Closed-form fit of the best linear decoder of `dct` latents, from which training starts (`initialise`).

It is the sum of two maps from 3×3 cells to the patch in their middle. Each is behind one of the network's sigma-aware
gates: the fine one closes quickly as sigma grows, the coarse one slowly.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engines.bundled import dct
from engines.pid.config import PATCH
from engines.size import Size
from engines.training import photos
from engines.training.flow import SIGMA_MAX, diffuse, residual

BATCHES = 60
BATCH_CROPS, CROP = 8, Size(256, 256)
BORDER_WEIGHT = 16.0  # of the error's differences across patch borders, relative to the error
FINE_RANK, COARSE_RANK = 80, 32
_PATCH_VALUES = 3 * PATCH * PATCH
_TAPS = 9 * (dct.CHANNELS + len(dct.DC_CHANNELS)) + 1  # inputs of one map


class Gate(NamedTuple):
    """Initial parameters of a sigma-aware gate, sigmoid(bias − exp(log_alpha)·sigma)."""

    bias: float
    log_alpha: float

    def openness(self, sigma: Tensor) -> Tensor:
        """Return the value of the gate relative to that at sigma 0."""
        logit = torch.as_tensor(self.bias)
        return torch.sigmoid(logit - math.exp(self.log_alpha) * sigma) / torch.sigmoid(logit)


FINE_GATE, COARSE_GATE = Gate(3.0, 2.7), Gate(2.0, 0.0)


class LinearMap(NamedTuple):
    """A low-rank map from cells to patches: features of about unit mean square, and the patch of each."""

    kernels: Tensor  # [R, 9·19 + 1], the last column is a constant
    patches: Tensor  # [R, 3·256]

    def matrix(self) -> Tensor:
        """Return the map [9·19 + 1, 3·256]."""
        return self.kernels.T @ self.patches


def fit_linear(
    photo_set: list[np.ndarray], random: np.random.Generator, batches: int = BATCHES
) -> tuple[LinearMap, LinearMap]:
    """Fit the coarse and the fine map to `batches` of random crops of photos, over all noise levels."""
    fit = BorderAwareFit(photo_set, random, batches)
    coarse, fine = fit.solve().chunk(2)
    reduced = _reduce(coarse, fit.gram[:_TAPS, :_TAPS], COARSE_RANK)
    return reduced, _reduce(fine + coarse - reduced.matrix(), fit.gram[_TAPS:, _TAPS:], FINE_RANK)


def weighted_examples(
    photo_set: list[np.ndarray], random: np.random.Generator, crop: Size = CROP
) -> tuple[Tensor, Tensor]:
    """Return cells [h, w, B, 2·taps] and their patches [h, w, B, 3·256] of random crops at all noise levels, float64.

    A cell has its features twice, for the coarse and the fine map, each scaled by its gate. Cells with a larger
    expected error have less weight.
    """
    image = photos.random_crops(photo_set, BATCH_CROPS, crop, random, photos.CANDIDATES)
    latent = dct.encode(dct.downscale(image))
    sigma = torch.linspace(-0.4, SIGMA_MAX, len(image)).clamp(min=0).view(-1, 1, 1, 1)
    latent = diffuse(latent, sigma, torch.from_numpy(random.standard_normal(latent.shape, np.float32)))
    features = F.pad(_features(latent), (1, 1, 1, 1), mode="replicate")
    cells = F.pad(F.unfold(features, 3), (0, 0, 0, 1), value=1.0).unflatten(2, latent.shape[2:])  # [B, taps, h, w]
    weight = residual(latent, sigma) ** -0.5  # [B, 1, h, w]
    both = weight * torch.cat([gate.openness(sigma) * cells for gate in (COARSE_GATE, FINE_GATE)], dim=1)
    patches = weight * F.pixel_unshuffle(image, PATCH)
    return both.permute(2, 3, 0, 1).double(), patches.permute(2, 3, 0, 1).double()


def _features(latent: Tensor) -> Tensor:
    """Append the mean of each plane over 3×3 cells: [B, 16, h, w] -> [B, 19, h, w]."""
    means = F.avg_pool2d(F.pad(latent[:, dct.DC_CHANNELS], (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return torch.cat((latent, means), dim=1)


def _borders() -> list[tuple[int, Tensor, Tensor]]:
    """Return (axis, indices, indices of the neighbour) for both axes of the patch grid.

    The former are the values of a patch [3·256] that touch the next patch along the axis, the latter the values of that
    patch which they touch.
    """
    index = torch.arange(_PATCH_VALUES).view(3, PATCH, PATCH)
    return [
        (0, index[:, -1].flatten(), index[:, 0].flatten()),
        (1, index[:, :, -1].flatten(), index[:, :, 0].flatten()),
    ]


class BorderAwareFit:
    """Normal equations of a linear decoder whose error should also be continuous across patch borders.

    Beyond the edge of the image, the error counts as zero.
    """

    def __init__(
        self, photo_set: list[np.ndarray], random: np.random.Generator, batches: int = BATCHES, crop: Size = CROP
    ) -> None:
        self.gram, self.cross = (
            torch.zeros(2 * _TAPS, 2 * _TAPS).double(),
            torch.zeros(2 * _TAPS, _PATCH_VALUES).double(),
        )
        self.next_gram = [torch.zeros_like(self.gram) for _ in range(2)]  # of neighbours: below, to the right
        self.weight = torch.ones(_PATCH_VALUES).double()
        for _, here, there in _borders():
            self.weight[here] += BORDER_WEIGHT
            self.weight[there] += BORDER_WEIGHT
        for _ in range(batches):
            self._add(*weighted_examples(photo_set, random, crop))
        self.gram += 1e-5 * self.gram.trace() / len(self.gram) * torch.eye(len(self.gram))

    def _add(self, cells: Tensor, patches: Tensor) -> None:
        self.gram += torch.einsum("hwbt,hwbu->tu", cells, cells)
        self.cross += torch.einsum("hwbt,hwbp->tp", cells, patches) * self.weight
        for axis, here, there in _borders():
            length = cells.shape[axis] - 1
            (c1, p1), (c2, p2) = [[x.narrow(axis, i, length) for x in (cells, patches)] for i in (0, 1)]
            self.next_gram[axis] += torch.einsum("hwbt,hwbu->tu", c1, c2)
            self.cross[:, here] -= BORDER_WEIGHT * torch.einsum("hwbt,hwbp->tp", c1, p2[..., there])
            self.cross[:, there] -= BORDER_WEIGHT * torch.einsum("hwbt,hwbp->tp", c2, p1[..., here])

    def apply(self, solution: Tensor) -> Tensor:
        """Return the left-hand side of the equations for a map [2·taps, 768]."""
        result = self.gram @ solution * self.weight
        for axis, here, there in _borders():
            result[:, here] -= BORDER_WEIGHT * self.next_gram[axis] @ solution[:, there]
            result[:, there] -= BORDER_WEIGHT * self.next_gram[axis].T @ solution[:, here]
        return result

    def solve(self, steps: int = 60) -> Tensor:
        """Solve for the map [2·taps, 768] by conjugate gradients, preconditioned without the coupling of neighbours."""
        factor = torch.linalg.cholesky(self.gram)
        solution = torch.cholesky_solve(self.cross / self.weight, factor)
        residual = self.cross - self.apply(solution)
        direction, before = torch.zeros_like(residual), math.inf
        for _ in range(steps):
            reduced = torch.cholesky_solve(residual / self.weight, factor)
            now = (residual * reduced).sum().item()
            direction = reduced + now / before * direction
            image = self.apply(direction)
            step = now / (direction * image).sum()
            solution, residual, before = solution + step * direction, residual - step * image, now
        return solution


def _reduce(solution: Tensor, gram: Tensor, rank: int) -> LinearMap:
    """Return the map of the given rank closest to `solution` [taps, 768], on cells with that Gram matrix."""
    patches = torch.linalg.eigh(solution.T @ gram @ solution).eigenvectors[:, -rank:]  # [768, R]
    kernels = solution @ patches  # [taps, R]
    spread = (kernels * (gram @ kernels)).sum(dim=0).div(gram[-1, -1]).sqrt()
    return LinearMap((kernels / spread).T, (patches * spread).T)
