"""Stages two and three: the folded network must compute what the live one does, and survive its precision."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engines.errors import PidError
from engines.manifest import Precision, Verification
from engines.pid import FoldedDecoder, PidConfig, PidDecoder
from engines.pid.sampler import MAX_STEPS, MODEL_TIMESTEPS, TIMESTEPS
from engines.size import Size

SIGMAS = (0.0, 0.6)
TOLERANCE = 1e-4  # of folding, relative, in float32; rounding alone makes about 1e-6
_CAPTION_TOKENS = 4
_SEED = 0


class VerificationError(PidError):
    """The built network does not compute what the checkpoint does."""

    code = "verification-failed"


@dataclass(frozen=True)
class Probe:
    """Random inputs: one small image for every time and every sigma, in one batch."""

    size: Size
    x: Tensor  # [N, 3, H, W]
    latent: Tensor  # [N, c, h, w]
    caption: Tensor  # [N, T, E]
    times: Tensor  # [N], each of MODEL_TIMESTEPS twice in a row
    sigmas: Tensor  # [N]


def make_probe(config: PidConfig) -> Probe:
    # Few tokens: a full-size network on a CPU is in question, half precision slow there, and folding blind to size.
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


def ends_of(probe: Probe) -> tuple[Probe, list[int]]:
    """Of a probe, a finished latent's images at the sampler's first and last time, and which they are in the probe."""
    rows = [MODEL_TIMESTEPS.index(t) * len(SIGMAS) for t in (TIMESTEPS[0], TIMESTEPS[MAX_STEPS - 1])]
    x, latent, caption = probe.x[rows], probe.latent[rows], probe.caption[rows]
    return Probe(probe.size, x, latent, caption, probe.times[rows], probe.sigmas[rows]), rows


@torch.inference_mode()
def velocities(decoder: PidDecoder | FoldedDecoder, probe: Probe) -> Tensor:
    """The velocity of every image of the probe, [N, 3, H, W] float32.

    Raises VerificationError, naming the first layer it came from, if anything is infinite or not a number.
    """
    with _watched(decoder) as bad_layers:
        conditioning = decoder.condition(probe.latent, probe.caption, probe.size)
        velocity = decoder.velocity(probe.x, probe.times, conditioning, probe.sigmas)
    if bad_layers or not velocity.isfinite().all():
        where = bad_layers[0] if bad_layers else "the output"
        dtype = str(decoder.dtype).removeprefix("torch.")
        advice = " Choose bf16 or fp32." if decoder.dtype == torch.float16 else " The weights are damaged."
        raise VerificationError(f"In {dtype} the network overflows at {where}.{advice}")
    return velocity


def relative_errors(actual: Tensor, expected: Tensor) -> tuple[float, ...]:
    """Errors of a whole probe's images, the larger of both sigmas, for each of MODEL_TIMESTEPS."""
    return tuple(image_errors(actual, expected).view(len(MODEL_TIMESTEPS), len(SIGMAS)).amax(dim=1).tolist())


def image_errors(actual: Tensor, expected: Tensor) -> Tensor:
    """‖actual − expected‖ / ‖expected‖ of each image, [N]."""
    return (actual - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)


def check_folding(folded: FoldedDecoder, probe: Probe, expected: Tensor) -> tuple[float, ...]:
    """Errors of the folded network in float32. Raises VerificationError where they are more than rounding."""
    errors = relative_errors(velocities(folded, probe), expected)
    if not max(errors) <= TOLERANCE:
        raise VerificationError(
            f"The folded network differs from the live one by {max(errors):.1e}, more than {TOLERANCE:.0e}."
        )
    return errors


def cast(folded: FoldedDecoder, dtype: torch.dtype) -> None:
    """Bring the weights to `dtype` in place, one at a time; the tables of times stay float32."""
    for key, parameter in folded.named_parameters():
        parameter.data = parameter.data.to(dtype).contiguous()
        if not parameter.data.isfinite().all():
            name = str(dtype).removeprefix("torch.")
            raise VerificationError(f"{key} holds values that are not finite in {name}.")


def summarise(probe: Probe, precision: Precision, folding: tuple[float, ...], cast_error: float) -> Verification:
    return Verification(
        velocity_error=folding,
        max_velocity_error=max(folding),
        precision_error=cast_error,
        method=(
            f"Relative velocity error against the live network in float32 on the CPU, over {len(probe.x)} random "
            f"images of {probe.size} with {probe.caption.shape[1]} caption tokens, at sigma "
            f"{' and '.join(f'{sigma:g}' for sigma in SIGMAS)}: folded in float32 at each time, "
            f"then the largest with weights and activations in {precision}."
        ),
    )


@contextlib.contextmanager
def _watched(module: nn.Module) -> Iterator[list[str]]:
    """Collects the names of layers whose output is not finite, in the order they ran."""
    bad: list[str] = []

    def watch(name: str, layer: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(_layer: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                bad.append(name)

        return layer.register_forward_hook(hook)

    handles = [watch(name, layer) for name, layer in module.named_modules() if name]
    try:
        yield bad
    finally:
        for handle in handles:
            handle.remove()
