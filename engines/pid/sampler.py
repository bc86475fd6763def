"""Stochastic sampler of the distilled decoder: at most four steps at fixed timesteps (arXiv 2605.23902)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from engines.errors import InputError
from engines.pid.network import Conditioning
from engines.size import Size

TIMESTEPS = (0.999, 0.866, 0.634, 0.342, 0.0)
MAX_STEPS = len(TIMESTEPS) - 1


class VelocityNetwork(Protocol):
    """A network that predicts velocities, such as `PidDecoder` or `FoldedDecoder`."""

    def velocity(self, x: Tensor, t: Tensor | float, conditioning: Conditioning, sigma: Tensor | float) -> Tensor:
        """Predict the velocity, see `PidDecoder.velocity`."""


def timesteps_for(steps: int) -> tuple[float, ...]:
    """Return the `steps + 1` timesteps of a decode in `steps` steps, from noise to 0.

    Raises:
        InputError: `steps` is not 1 to 4.
    """
    if not 1 <= steps <= MAX_STEPS:
        raise InputError(f"steps must be 1 to {MAX_STEPS}, got {steps}.")
    if steps == 1:
        return (1.0, 0.0)
    return tuple(TIMESTEPS[round(i * MAX_STEPS / steps)] for i in range(steps + 1))


# Every (t, next t) of a decode in any number of steps. A step index is an index into this table.
STEP_TRANSITIONS: tuple[tuple[float, float], ...] = tuple(
    dict.fromkeys(pair for n in range(MAX_STEPS, 0, -1) for pair in pairwise(timesteps_for(n)))
)
# Every timestep at which the network is evaluated: the rows of a folded network's tables.
MODEL_TIMESTEPS: tuple[float, ...] = tuple(dict.fromkeys(t for t, _ in STEP_TRANSITIONS))


def step_indices(steps: int) -> tuple[int, ...]:
    """Return the rows of STEP_TRANSITIONS that a decode in `steps` steps runs through.

    Raises:
        InputError: `steps` is not 1 to 4.
    """
    return tuple(STEP_TRANSITIONS.index(pair) for pair in pairwise(timesteps_for(steps)))


def advance(x: Tensor, velocity: Tensor, t: Tensor | float, next_t: Tensor | float, noise: Tensor | None) -> Tensor:
    """Take one step from t to next_t: x0 = x − t·v, then (1 − t')·x0 + t'·noise.

    Args:
        x: [B, 3, H, W] float32.
        velocity: [B, 3, H, W] float32.
        t: A float or [B, 1, 1, 1].
        next_t: A float or [B, 1, 1, 1].
        noise: [B, 3, H, W] float32; may be None if next_t is 0.

    Returns:
        The next x.
    """
    x0 = x - t * velocity
    return x0 if noise is None else (1 - next_t) * x0 + next_t * noise


def sample(
    decoder: VelocityNetwork,
    conditioning: Conditioning,
    noise: Tensor,
    sigma: Tensor | float,
    step_noise: Sequence[Tensor],
    steps: int = MAX_STEPS,
) -> Tensor:
    """Run a complete decode.

    Args:
        decoder: The network.
        conditioning: Result of its `condition`.
        noise: Starting point, [B, 3, H, W] float32.
        sigma: Noise level of the latents, a float or [B].
        step_noise: Fresh noise added after each step except the last: `steps - 1` tensors of the shape of `noise`.
        steps: Number of steps.

    Returns:
        The image, [B, 3, H, W] float32, about [-1, 1] and not clamped.

    Raises:
        InputError: `steps` is not 1 to 4, or there is too little noise.
    """
    timesteps = timesteps_for(steps)
    if len(step_noise) < steps - 1:
        raise InputError(f"A decode in {steps} steps needs {steps - 1} noise tensors, got {len(step_noise)}.")
    x = noise.float()
    for i, (t, next_t) in enumerate(pairwise(timesteps)):
        velocity = decoder.velocity(x, t, conditioning, sigma)
        x = advance(x, velocity, t, next_t, step_noise[i] if next_t > 0 else None)
    return x


class NoiseSource:
    """Source of the noise of one request, independent of the batch that the request is part of.

    It draws in the order and shape of the reference implementation for a batch of one: first the starting point, then
    once per step, in float32, from one generator on the device. The seed is 0 to 2^64 − 1. The same seed gives
    different noise on CPU and CUDA.
    """

    def __init__(self, seed: int, device: torch.device | str) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)

    def draw(self, size: Size) -> Tensor:
        """Draw standard normal noise [3, H, W] float32."""
        return torch.randn((3, *size), generator=self.generator, device=self.generator.device)

    def draw_into(self, out: Tensor) -> None:
        """Fill `out`, contiguous [3, H, W] float32, with the values that `draw` would return; allocates no memory."""
        torch.randn(out.shape, generator=self.generator, out=out)

    def state(self) -> Tensor:
        """Return the state of the generator, for `restore`."""
        return self.generator.get_state()

    def restore(self, state: Tensor) -> None:
        """Continue from an earlier `state`, so that the same noise is drawn again."""
        self.generator.set_state(state)
