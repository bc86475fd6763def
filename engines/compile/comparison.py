"""Compares two implementations of the decode graphs, step by step and over whole decodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engines.compile.verify_fold import VerificationError, image_errors
from engines.pid import FoldedDecoder, graphs
from engines.pid.config import PidConfig
from engines.pid.sampler import MAX_STEPS, STEP_TRANSITIONS, step_indices
from engines.size import Size


class DecodeGraphs(Protocol):
    """An implementation of the two graphs of a decode, see `engines.pid.graphs`."""

    def condition(self, latent: Tensor, caption: Tensor) -> list[Tensor]:
        """Return caption tokens and adapter tokens for one image."""

    def step(self, x: Tensor, sigma: Tensor, index: Tensor, noise: Tensor, tokens: list[Tensor]) -> Tensor:
        """Return the next x; `tokens` has the format that `condition` returns."""


class TorchGraphs:
    """The graphs of a network, executed by PyTorch."""

    def __init__(self, network: FoldedDecoder, caption_tokens: int) -> None:
        self._network = network
        self._condition, self._step = graphs.ConditionGraph(network), graphs.StepGraph(network, caption_tokens)

    def condition(self, latent: Tensor, caption: Tensor) -> list[Tensor]:
        """Return caption tokens and adapter tokens for one image."""
        return list(self._condition(latent, caption))

    def step(self, x: Tensor, sigma: Tensor, index: Tensor, noise: Tensor, tokens: list[Tensor]) -> Tensor:
        """Return the next x."""
        geometry = self._network.geometry(Size(*x.shape[2:]), x.device)
        result: Tensor = self._step(x, sigma, index, noise, tokens[0], tokens[1:], geometry)
        return result


@dataclass(frozen=True)
class DecodeInputs:
    """Inputs for decoding a batch of B images."""

    latent: Tensor  # [B, c, h, w]
    caption: Tensor  # [B, T, E]
    sigma: Tensor  # [B]
    noise: Tensor  # [1 + steps, B, 3, H, W]


def random_decode_inputs(config: PidConfig, size: Size, caption_tokens: int, batch: int = 2) -> DecodeInputs:
    """Make random inputs on the CPU; every second latent, starting with the second one, is noisy."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return DecodeInputs(
        normal(batch, config.latent_channels, *config.latent_size(size)),
        normal(batch, caption_tokens, config.caption_width),
        torch.tensor([0.0, 0.5]).repeat(batch)[:batch],
        normal(MAX_STEPS + 1, batch, 3, *size),
    )


class NonFiniteReferenceError(VerificationError):
    """The network to compare with produces infinity or NaN."""


@dataclass(frozen=True)
class Comparison:
    """Differences between two implementations of the graphs."""

    velocity_error: tuple[float, ...]  # relative, per step, both given the same x; the maximum over the batch
    image_psnr: float  # dB, between two separate decodes


@torch.inference_mode()
def compare(
    reference: DecodeGraphs, other: DecodeGraphs, inputs: DecodeInputs, name: str, steps: int = MAX_STEPS
) -> Comparison:
    """Decode the same inputs with both implementations and measure the differences.

    Args:
        reference: The graphs in PyTorch.
        other: Another implementation.
        inputs: Inputs of both.
        name: The other implementation, as the subject of a message.
        steps: Steps of each decode.

    Raises:
        NonFiniteReferenceError: The reference produces infinity or NaN.
        VerificationError: The other implementation does.
    """
    tokens, other_tokens = (_condition(implementation, inputs) for implementation in (reference, other))
    x = other_x = inputs.noise[0]
    errors = []
    for position, row in enumerate(step_indices(steps)):
        t, next_t = STEP_TRANSITIONS[row]
        index, noise = torch.full((len(x),), row, device=x.device), inputs.noise[position + 1]
        expected = reference.step(x, inputs.sigma, index, noise, tokens)
        actual = other.step(x, inputs.sigma, index, noise, other_tokens)
        velocity, other_velocity = (_velocity(x, next_x, noise, t, next_t) for next_x in (expected, actual))
        errors.append(image_errors(other_velocity, velocity).max().item())
        other_x = other.step(other_x, inputs.sigma, index, noise, other_tokens)
        x = expected
        if not x.isfinite().all():
            raise NonFiniteReferenceError("PyTorch produces infinity or NaN. Build with another --precision.")
        if not (actual.isfinite().all() and other_x.isfinite().all()):
            raise VerificationError(f"{name} produces infinity or NaN. Build with another --precision.")
    return Comparison(tuple(errors), psnr(x.clamp(-1, 1), other_x.clamp(-1, 1)))


def psnr(a: Tensor, b: Tensor) -> float:
    """Return the PSNR in dB of two images, or of all values of two batches, in [-1, 1].

    Unlike `training.metrics.psnr`, it is capped at 99, the value of identical images. NaN if an image contains NaN.
    """
    error = (a.float() - b.float()).square().mean().item()
    return float(np.minimum(99.0, -10 * np.log10(np.maximum(error / 4, 1e-30))))  # min and max may ignore NaN


def _velocity(x: Tensor, next_x: Tensor, noise: Tensor, t: float, next_t: float) -> Tensor:
    """Return the velocity of a step from its result: the inverse of `sampler.advance`."""
    x0 = (next_x - next_t * noise) / (1 - next_t)
    return (x - x0) / t


def _condition(implementation: DecodeGraphs, inputs: DecodeInputs) -> list[Tensor]:
    """Condition one image at a time, as the condition graph requires, and batch the results."""
    each = [
        implementation.condition(inputs.latent[i : i + 1], inputs.caption[i : i + 1]) for i in range(len(inputs.latent))
    ]
    return [torch.cat(parts) for parts in zip(*each, strict=True)]
