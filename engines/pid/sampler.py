"""The distilled student's stochastic sampler: at most four steps at fixed times."""

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


class Velocity(Protocol):
    def velocity(self, x: Tensor, t: Tensor | float, conditioning: Conditioning, sigma: Tensor | float) -> Tensor: ...


def step_times(steps: int) -> tuple[float, ...]:
    """The `steps + 1` times that a decode in `steps` steps visits, from noise to 0."""
    if not 1 <= steps <= MAX_STEPS:
        raise InputError(f"steps must be 1 to {MAX_STEPS}, got {steps}.")
    if steps == 1:
        return (1.0, 0.0)
    return tuple(TIMESTEPS[round(i * MAX_STEPS / steps)] for i in range(steps + 1))


# Every (t, next t) that any number of steps uses; a step index names a row.
STEP_TRANSITIONS: tuple[tuple[float, float], ...] = tuple(
    dict.fromkeys(pair for n in range(MAX_STEPS, 0, -1) for pair in pairwise(step_times(n)))
)
# Every time at which the network is called, the rows of a folded network's tables.
MODEL_TIMESTEPS: tuple[float, ...] = tuple(dict.fromkeys(t for t, _ in STEP_TRANSITIONS))


def step_indices(steps: int) -> tuple[int, ...]:
    """The rows of STEP_TRANSITIONS that a decode in `steps` steps goes through."""
    times = step_times(steps)
    return tuple(STEP_TRANSITIONS.index(pair) for pair in pairwise(times))


def advance(x: Tensor, velocity: Tensor, t: Tensor | float, next_t: Tensor | float, noise: Tensor | None) -> Tensor:
    """One step from t to next_t: x0 = x − t·v, then (1 − t')·x0 + t'·noise. All float32 [B, 3, H, W]; t [B,1,1,1].

    `noise` may be None only where next_t is 0.
    """
    x0 = x - t * velocity
    return x0 if noise is None else (1 - next_t) * x0 + next_t * noise


def sample(
    decoder: Velocity,
    conditioning: Conditioning,
    noise: Tensor,
    sigma: Tensor | float,
    step_noise: Sequence[Tensor],
    steps: int = MAX_STEPS,
) -> Tensor:
    """Decode from start to end.

    noise [B, 3, H, W] float32 is the starting point; step_noise holds the fresh noise after each step but the last,
    `steps - 1` tensors of the same shape; sigma is a float or [B]. Returns the image, about [-1, 1], not clamped.
    """
    times = step_times(steps)
    if len(step_noise) < steps - 1:
        raise InputError(f"A decode in {steps} steps needs {steps - 1} step noises, got {len(step_noise)}.")
    x = noise.float()
    for i, (t, next_t) in enumerate(pairwise(times)):
        velocity = decoder.velocity(x, t, conditioning, sigma)
        x = advance(x, velocity, t, next_t, step_noise[i] if next_t > 0 else None)
    return x


class NoiseSource:
    """The noise of one request: drawn in the published order and shape for a batch of one, whatever it is batched with.

    First the starting point, then one draw a step, float32, from one generator on the device seeded with the request's
    seed (0 .. 2^64 − 1). The same seed draws differently on another kind of device.
    """

    def __init__(self, seed: int, device: torch.device | str) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)

    def draw(self, size: Size) -> Tensor:
        """[3, H, W] unit normal float32."""
        return torch.randn((3, *size), generator=self.generator, device=self.generator.device)

    def draw_into(self, out: Tensor) -> None:
        """Fill `out`, contiguous [3, H, W] float32, with the numbers that `draw` would return; allocates nothing."""
        torch.randn(out.shape, generator=self.generator, out=out)

    def state(self) -> Tensor:
        """What `restore` takes to draw again what is drawn from here on."""
        return self.generator.get_state()

    def restore(self, state: Tensor) -> None:
        self.generator.set_state(state)
