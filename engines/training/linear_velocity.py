"""The best linear velocity, and a time embedding that computes its coefficients.

Let f be a linear decode of the latent, and r the root mean square of its error. The best linear estimate of a pixel
from f and x_t = (1 − t)·x0 + t·ε weighs the two by their variances. Its velocity is linear in x_t and f:

    v = x + g·((1 + s)·x − f)  with  g = t / (r²(1 − t)² + t²)  and  s = −t − r²(1 − t)(2 − t)/t
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.pid.sampler import MODEL_TIMESTEPS
from engines.training.flow import MIN_T

# Root mean squares, for images in [-1, 1]: of an image, and of the error of its linear decode (r above).
IMAGE_RMS, RESIDUAL_RMS = 0.5, 0.06
_FIT_STEPS, _FIT_RATE, _FIT_BATCH = 1500, 3e-3, 1000
_WAVES, _TIME_SCALE, _MAX_PERIOD = 128, 1000.0, 10.0  # as in TimeEmbedder


def velocity_gate(t: Tensor) -> Tensor:
    """Return g of the module's formula."""
    return t / (RESIDUAL_RMS**2 * (1 - t) ** 2 + t**2)


def velocity_scale(t: Tensor) -> Tensor:
    """Return s of the module's formula."""
    return -t - RESIDUAL_RMS**2 * (1 - t) * (2 - t) / t


@dataclass(frozen=True)
class _TimeTargets:
    """Curves that the time embedding has to represent, at all timesteps of the fit."""

    times: Tensor  # [N]
    values: Tensor  # [N, 3], s, g and 1 − t in their units
    weights: Tensor  # [N, 3], of errors


def _time_targets(units: Tensor) -> _TimeTargets:
    """Return the curves. Errors are weighted by their effect on the velocity, relative to its expected error."""
    t = torch.cat((torch.linspace(MIN_T, 1, 3000), torch.linspace(MIN_T, 0.2, 1000), torch.tensor(MODEL_TIMESTEPS)))
    s, g = velocity_scale(t), velocity_gate(t)
    x = ((1 - t) ** 2 * IMAGE_RMS**2 + t**2).sqrt()  # RMS of x_t
    difference = (((1 + s) * (1 - t) - 1) ** 2 * IMAGE_RMS**2 + ((1 + s) * t) ** 2).sqrt()  # RMS of (1 + s)·x − f
    weights = torch.stack((g * x, difference, 0.1 * g), dim=1) * units / (RESIDUAL_RMS * (g / t).sqrt())[:, None]
    return _TimeTargets(t, torch.stack((s, g, 1 - t), dim=1) / units, weights)


def fit_time_embedding(mlp: nn.Sequential, units: Tensor) -> Tensor:
    """Train the first layer of the time embedder until s, g and 1 − t are linear in its activations.

    The input waves oscillate much faster than s and g vary, so a random first layer is not sufficient.

    Args:
        mlp: Linear, SiLU, Linear of the time embedder; its first layer is changed.
        units: Scales of s, g and 1 − t, [3]. The fitted curves are divided by them.

    Returns:
        The linear maps from the D activations to the three curves, [3, D].
    """
    first = mlp[0]
    assert isinstance(first, nn.Linear)  # noqa: S101
    targets = _time_targets(units)
    frequencies = torch.exp(-math.log(_MAX_PERIOD) / _WAVES * torch.arange(_WAVES, dtype=torch.float32))
    angles = _TIME_SCALE * targets.times[:, None] * frequencies
    waves = torch.cat((angles.cos(), angles.sin()), dim=1)
    readout = torch.zeros(3, first.out_features, requires_grad=True)
    optimizer = torch.optim.Adam([first.weight, first.bias, readout], lr=_FIT_RATE)
    for step in range(_FIT_STEPS):
        optimizer.param_groups[0]["lr"] = _FIT_RATE * (1 - step / _FIT_STEPS)
        some = torch.randint(len(waves), (_FIT_BATCH,))
        error = F.silu(first(waves[some])) @ readout.T - targets.values[some]
        optimizer.zero_grad()
        (targets.weights[some] * error).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        return _least_squares(F.silu(first(waves)).double(), targets)


def _least_squares(activations: Tensor, targets: _TimeTargets) -> Tensor:
    """Return the best linear maps from activations [N, D] to the target curves, [3, D]."""
    rows = []
    for values, weights in zip(targets.values.double().T, targets.weights.double().T, strict=True):
        weighted = weights[:, None] * activations
        gram = weighted.T @ weighted + 1e-6 * len(activations) * torch.eye(activations.shape[1])
        rows.append(torch.linalg.solve(gram, weighted.T @ (weights * values)))
    return torch.stack(rows).float()
