"""Verifies that the folded network computes what the original one does, and that no value overflows in its dtype."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engines.accuracy import largest
from engines.errors import PidError
from engines.manifest import Precision, Verification
from engines.pid import FoldedDecoder, PidConfig, PidDecoder
from engines.pid.sampler import MAX_STEPS, MODEL_TIMESTEPS, TIMESTEPS
from engines.size import Size

SIGMAS = (0.0, 0.6)
TOLERANCE = 1e-4  # relative error of folding in float32; rounding alone causes about 1e-6
_CAPTION_TOKENS = 4
_SEED = 0


class VerificationError(PidError):
    """The network that was built does not compute what the checkpoint does."""

    code = "verification-failed"


@dataclass(frozen=True)
class Probe:
    """Random inputs: one small image for every timestep and sigma, in one batch."""

    size: Size
    x: Tensor  # [N, 3, H, W]
    latent: Tensor  # [N, c, h, w]
    caption: Tensor  # [N, T, E]
    timesteps: Tensor  # [N], each of MODEL_TIMESTEPS repeated once per sigma
    sigmas: Tensor  # [N]

    def to(self, device: torch.device) -> Probe:
        """Return the probe with its tensors on a device."""
        tensors = (self.x, self.latent, self.caption, self.timesteps, self.sigmas)
        return Probe(self.size, *(tensor.to(device) for tensor in tensors))


def make_probe(config: PidConfig) -> Probe:
    """Make the probe for a network; it is the same for every call."""
    # Few tokens are enough, since folding does not depend on the size; a full-size network is slow on a CPU.
    cells = (2, 3) if config.cell_side <= 16 else (1, 2) if config.cell_side <= 64 else (1, 1)
    size = Size(cells[0] * config.cell_side, cells[1] * config.cell_side)
    batch = len(MODEL_TIMESTEPS) * len(SIGMAS)
    tokens = min(_CAPTION_TOKENS, config.caption_tokens)
    generator = torch.Generator().manual_seed(_SEED)
    return Probe(
        size,
        torch.randn(batch, 3, *size, generator=generator),
        torch.randn(batch, config.latent_channels, *cells, generator=generator),
        torch.randn(batch, tokens, config.caption_width, generator=generator),
        torch.tensor(MODEL_TIMESTEPS).repeat_interleave(len(SIGMAS)),
        torch.tensor(SIGMAS).repeat(len(MODEL_TIMESTEPS)),
    )


def first_and_last_step(probe: Probe) -> tuple[Probe, list[int]]:
    """Reduce a probe to two images at sigma 0: one at the sampler's first timestep, one at its last.

    Returns:
        The small probe, and the indices of its images in `probe`.
    """
    rows = [MODEL_TIMESTEPS.index(t) * len(SIGMAS) for t in (TIMESTEPS[0], TIMESTEPS[MAX_STEPS - 1])]
    x, latent, caption = probe.x[rows], probe.latent[rows], probe.caption[rows]
    return Probe(probe.size, x, latent, caption, probe.timesteps[rows], probe.sigmas[rows]), rows


@torch.inference_mode()
def velocities(decoder: PidDecoder | FoldedDecoder, probe: Probe) -> Tensor:
    """Compute the velocity of every image of the probe, [N, 3, H, W] float32.

    Raises:
        VerificationError: A value is infinite or NaN; the message names the layer where it first occurred.
    """
    with _non_finite_layers(decoder) as layers:
        conditioning = decoder.condition(probe.latent, probe.caption, probe.size)
        velocity = decoder.velocity(probe.x, probe.timesteps, conditioning, probe.sigmas)
    if layers or not velocity.isfinite().all():
        layer = layers[0] if layers else "the output"
        dtype = str(decoder.dtype).removeprefix("torch.")
        advice = "Use --precision bf16 or fp32." if decoder.dtype == torch.float16 else "The weights are damaged."
        raise VerificationError(f"The network produces infinity or NaN in {dtype}, first in {layer}. {advice}")
    return velocity


def relative_errors(actual: Tensor, expected: Tensor) -> tuple[float, ...]:
    """Return the relative error for each of MODEL_TIMESTEPS, the maximum over the sigmas of the probe."""
    return tuple(image_errors(actual, expected).view(len(MODEL_TIMESTEPS), len(SIGMAS)).amax(dim=1).tolist())


def image_errors(actual: Tensor, expected: Tensor) -> Tensor:
    """Return ‖actual − expected‖ / ‖expected‖ per image: [N, 3, H, W] -> [N]."""
    return (actual - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)


def verify_folding(folded: FoldedDecoder, probe: Probe, expected: Tensor) -> tuple[float, ...]:
    """Compare the folded network in float32 with the velocities of the original one.

    Returns:
        The relative error for each of MODEL_TIMESTEPS.

    Raises:
        VerificationError: An error exceeds what rounding can cause.
    """
    errors = relative_errors(velocities(folded, probe), expected)
    worst = largest(errors)
    if not worst <= TOLERANCE:
        raise VerificationError(
            f"The velocity of the folded network differs from the original by {worst:.1e}; "
            f"the limit is {TOLERANCE:.0e}."
        )
    return errors


def summarise(probe: Probe, precision: Precision, folding: tuple[float, ...], precision_error: float) -> Verification:
    """Describe the verification for the manifest.

    Args:
        probe: The inputs that were used.
        precision: Precision of the bundle.
        folding: Result of `verify_folding`.
        precision_error: Maximum relative error with the weights in `precision`.
    """
    return Verification(
        velocity_error=folding,
        max_velocity_error=max(folding),
        precision_error=precision_error,
        method=(
            f"Relative velocity error against the original network in float32 on the CPU, for {len(probe.x)} random "
            f"images of {probe.size} with {probe.caption.shape[1]} caption tokens, at sigma "
            f"{' and '.join(f'{sigma:g}' for sigma in SIGMAS)}: first folded in float32, at each timestep; "
            f"then the maximum with weights and activations in {precision}."
        ),
    )


@contextlib.contextmanager
def _non_finite_layers(module: nn.Module) -> Iterator[list[str]]:
    """Collect the names of layers whose output is not finite, in execution order."""
    names: list[str] = []

    def watch(name: str, layer: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(_layer: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                names.append(name)

        return layer.register_forward_hook(hook)

    handles = [watch(name, layer) for name, layer in module.named_modules() if name]
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()
