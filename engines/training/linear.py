"""Fits the best linear decoder of `dct` latents in closed form, from which training starts (engines/training/start.py).

It is the sum of two maps from 3×3 cells to the patch in their middle. Each stands behind one of the network's
sigma-aware gates: the fine one closes quickly as sigma grows, the coarse one slowly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engines.bundled import dct
from engines.training import photos
from engines.training.flow import SIGMA_MAX, residual

BATCHES = 60  # of eight crops
BORDER_WEIGHT = 16.0  # of errors' differences across the borders of patches, against errors
FINE_RANK, COARSE_RANK = 80, 32
FINE_GATE, COARSE_GATE = (3.0, 2.7), (2.0, 0.0)  # bias and log alpha: fine detail goes first as sigma grows


@dataclass(frozen=True)
class LinearMap:
    """Features of cells, of about unit mean square, and the patch that belongs to each."""

    kernels: Tensor  # [R, 9·19 + 1], the last for the constant
    patches: Tensor  # [R, 3·256]

    def matrix(self) -> Tensor:
        return self.kernels.T @ self.patches


def fit_linear(photo_set: list[np.ndarray], random: np.random.Generator) -> tuple[LinearMap, LinearMap]:
    """Coarse and fine maps from 3×3 cells of features to the patch in their middle; noisy latents lose the fine one."""
    fit = _Fit(photo_set, random)
    coarse, fine = fit.solve().chunk(2)
    taps = len(coarse)
    kept = _reduce(coarse, fit.gram[:taps, :taps], COARSE_RANK)
    return kept, _reduce(fine + coarse - kept.matrix(), fit.gram[taps:, taps:], FINE_RANK)


def _features(latent: Tensor) -> Tensor:
    """What the linear decoder sees: latents [B, 16, h, w], and each plane's mean over 3×3 cells -> [B, 19, h, w]."""
    means = F.avg_pool2d(F.pad(latent[:, dct.MEANS], (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return torch.cat((latent, means), dim=1)


def _gate(bias: float, log_alpha: float, sigma: Tensor) -> Tensor:
    """How far a gate of that bias closes at sigma, against sigma 0."""
    logit = torch.as_tensor(bias)
    return torch.sigmoid(logit - math.exp(log_alpha) * sigma) / torch.sigmoid(logit)


def _examples(photo_set: list[np.ndarray], random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Cells [h, w, B, 2·taps] and their patches [h, w, B, 3·256] of crops at all noise levels, float64.

    A cell has its features twice, for the coarse and the fine map, each as far as its gate is open. It weighs
    less where a larger error is expected.
    """
    image = photos.random_crops(photo_set, 8, (256, 256), random, photos.CHOICE)
    latent = dct.encode(dct.downscale(image))
    sigma = torch.linspace(-0.4, SIGMA_MAX, len(image)).clamp(min=0).view(-1, 1, 1, 1)
    noise = torch.from_numpy(random.standard_normal(latent.shape, np.float32))
    latent = (1 - sigma) * latent + sigma * noise
    features = F.pad(_features(latent), (1, 1, 1, 1), mode="replicate")
    cells = F.pad(F.unfold(features, 3), (0, 0, 0, 1), value=1.0).unflatten(2, latent.shape[2:])  # [B, taps, h, w]
    weight = residual(latent, sigma) ** -0.5  # [B, 1, h, w]
    both = weight * torch.cat([_gate(*gate, sigma) * cells for gate in (COARSE_GATE, FINE_GATE)], dim=1)
    patches = weight * F.pixel_unshuffle(image, 16)
    return both.permute(2, 3, 0, 1).double(), patches.permute(2, 3, 0, 1).double()


def _borders() -> list[tuple[int, Tensor, Tensor]]:
    """For each axis of the grid: which of a patch's 768 values touch the next patch, and which of that one's."""
    index = torch.arange(768).view(3, 16, 16)
    return [
        (0, index[:, -1].flatten(), index[:, 0].flatten()),
        (1, index[:, :, -1].flatten(), index[:, :, 0].flatten()),
    ]


class _Fit:
    """The normal equations of a linear decoder whose error must also be alike on both sides of every patch border.

    At the edge of the picture the other side counts as having none.
    """

    def __init__(self, photo_set: list[np.ndarray], random: np.random.Generator) -> None:
        taps = 2 * (9 * (dct.CHANNELS + len(dct.MEANS)) + 1)
        self.gram, self.cross = torch.zeros(taps, taps).double(), torch.zeros(taps, 768).double()
        self.next_gram = [torch.zeros_like(self.gram) for _ in range(2)]  # of neighbours: down, right
        self.weight = torch.ones(768).double()
        for _, here, there in _borders():
            self.weight[here] += BORDER_WEIGHT
            self.weight[there] += BORDER_WEIGHT
        for _ in range(BATCHES):
            cells, patches = _examples(photo_set, random)
            self.gram += torch.einsum("hwbt,hwbu->tu", cells, cells)
            self.cross += torch.einsum("hwbt,hwbp->tp", cells, patches) * self.weight
            for axis, here, there in _borders():
                length = cells.shape[axis] - 1
                (c1, p1), (c2, p2) = [[x.narrow(axis, i, length) for x in (cells, patches)] for i in (0, 1)]
                self.next_gram[axis] += torch.einsum("hwbt,hwbu->tu", c1, c2)
                self.cross[:, here] -= BORDER_WEIGHT * torch.einsum("hwbt,hwbp->tp", c1, p2[..., there])
                self.cross[:, there] -= BORDER_WEIGHT * torch.einsum("hwbt,hwbp->tp", c2, p1[..., here])
        self.gram += 1e-5 * self.gram.trace() / taps * torch.eye(taps)

    def apply(self, solution: Tensor) -> Tensor:
        """The equations' left side for a map [2·taps, 768]."""
        result = self.gram @ solution * self.weight
        for axis, here, there in _borders():
            result[:, here] -= BORDER_WEIGHT * self.next_gram[axis] @ solution[:, there]
            result[:, there] -= BORDER_WEIGHT * self.next_gram[axis].T @ solution[:, here]
        return result

    def solve(self, steps: int = 60) -> Tensor:
        """Conjugate gradients, preconditioned by the equations without their coupling of neighbours."""
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
    """A map [taps, 768] at the rank that loses least of what it makes of cells with that Gram matrix."""
    patches = torch.linalg.eigh(solution.T @ gram @ solution).eigenvectors[:, -rank:]  # [768, R]
    kernels = solution @ patches  # [taps, R]
    spread = (kernels * (gram @ kernels)).sum(dim=0).div(gram[-1, -1]).sqrt()
    return LinearMap((kernels / spread).T, (patches * spread).T)
