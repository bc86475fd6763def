"""Predicted times of a step with the kernels of this project, and the attention that a target would need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from engines.benchmark.kernels.times import times
from engines.benchmark.kernels.work import (
    MODES,
    SHAPES,
    SIZE,
    AttentionShape,
    KernelWork,
    Mode,
    attention_work,
    gated_work,
    heads_work,
    pixel_work,
)
from engines.benchmark.predictions import GPUS, Gpu, predict
from engines.pid.sampler import MAX_STEPS

# Bytes that the code compiled by Inductor moves per call where the kernels are used. It was counted at 2048×2048 in the
# patch blocks and in the chunks of the pixel blocks. The heads of a pixel block are assumed to have the same ratio.
_HEADS_RATIO = 876 / 302  # to the bytes of the kernel in bf16
_GATE = 335e6
_PIXEL_UPDATE = 230e6

TARGETS = {"H100": 0.240, "H200": 0.210}  # seconds per decode


@dataclass(frozen=True)
class Basis:
    """Times in seconds without the kernels of this project, at 2048×2048 in FP8.

    Attributes:
        name: Origin of the times.
        gpu: The GPU.
        surroundings: A decode without its steps.
        step: A step.
        attention: One call of each attention.
        products: The two products of one gated MLP.
    """

    name: str
    gpu: Gpu
    surroundings: float
    step: float
    attention: tuple[float, float]
    products: float

    @property
    def decode(self) -> float:
        """Time of a decode."""
        return self.surroundings + MAX_STEPS * self.step

    def allowed_step(self, decode: float) -> float:
        """Return the time that a step may need for a decode in a given time."""
        return (decode - self.surroundings) / MAX_STEPS


def predicted_basis(gpu: Gpu) -> Basis:
    """Return the times of predictions.md."""
    prediction, work = predict(gpu, SIZE, "fp8"), attention_work
    joint, pixel = (work(shape, MODES[0]).bf16 for shape in SHAPES)
    return Basis(
        name=f"{gpu.name}, predicted",
        gpu=gpu,
        surroundings=prediction.condition,
        step=prediction.step,
        attention=(joint / gpu.rate("joint attention"), pixel / gpu.rate("pixel attention")),
        products=gated_work().fp8 / gpu.rate("FP8 linear"),
    )


def bases() -> Iterator[Basis]:
    """Yield the predictions for each GPU, and the measurements on the H200."""
    for gpu in GPUS:
        yield predicted_basis(gpu)
        if gpu.name == "H200":
            measured = Basis("H200, measured", gpu, 0.0294 + 0.0015, 0.0973, (0.00396, 0.00321), 2 * 0.000203)
            yield replace(measured, name="H200, measured, condition predicted", surroundings=0.0083 + 0.0015)
            yield measured


@dataclass(frozen=True)
class Step:
    """A step with the kernels: the seconds of its parts."""

    basis: Basis
    attention: float
    heads: float
    gated: float
    pixels: float
    rest: float

    @property
    def seconds(self) -> float:
        """Time of the step."""
        return self.attention + self.heads + self.gated + self.pixels + self.rest

    @property
    def decode(self) -> float:
        """Time of a decode."""
        return self.basis.surroundings + MAX_STEPS * self.seconds

    def allowed_attention(self, decode: float) -> float:
        """Return the time per step that attention may need for a decode in a given time."""
        return self.basis.allowed_step(decode) - (self.seconds - self.attention)


def predicted_step(basis: Basis, modes: Sequence[Mode] = MODES) -> Step:
    """Predict a step in which each part is computed by the faster one of PyTorch and the kernels.

    Args:
        basis: Times without the kernels.
        modes: Modes of the attention kernel that may be used.
    """
    gpu = basis.gpu
    attentions = [_attention(basis, *pair, modes) for pair in zip(SHAPES, basis.attention, strict=True)]
    before = sum(shape.calls * seconds for shape, seconds in zip(SHAPES, basis.attention, strict=True))
    heads_before = sum(_HEADS_RATIO * shape.calls * heads_work(shape, MODES[0]).nbytes for shape in SHAPES)
    gated, pixels = gated_work(), pixel_work()
    gated_before = gated.calls * (basis.products + _GATE / gpu.memory_rate)
    pixels_before = pixels.calls * _PIXEL_UPDATE / gpu.memory_rate
    return Step(
        basis,
        attention=sum(attention for attention, _ in attentions),
        heads=sum(heads for _, heads in attentions),
        gated=min(gated_before, _per_step(gpu, gated)),
        pixels=min(pixels_before, _per_step(gpu, pixels)),
        rest=basis.step - before - heads_before / gpu.memory_rate - gated_before - pixels_before,
    )


def _attention(basis: Basis, shape: AttentionShape, library: float, modes: Sequence[Mode]) -> tuple[float, float]:
    """Return the seconds per step of the fastest attention, and those of the heads that it reads."""
    options = [(shape.calls * library, _per_step(basis.gpu, heads_work(shape, MODES[0])))]
    for mode in modes:
        works = attention_work(shape, mode), heads_work(shape, mode)
        options.append((_per_step(basis.gpu, works[0]), _per_step(basis.gpu, works[1])))
    return min(options, key=sum)


def _per_step(gpu: Gpu, work: KernelWork) -> float:
    return work.calls * times(gpu, work).predicted


def attention_ceiling(gpu: Gpu, modes: Sequence[Mode]) -> float:
    """Return the least seconds per step of attention in the fastest of the modes."""
    return sum(shape.calls * min(times(gpu, attention_work(shape, mode)).ceiling for mode in modes) for shape in SHAPES)
