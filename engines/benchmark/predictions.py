"""Predicted times of a decode, from counted work and published rates: written before any measurement.

python -m engines.benchmark.predictions

Prints docs/measurements/predictions.md. `gpu_check` shows the same predictions next to its measurements.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

from engines.benchmark.predictions_text import FP4, INTRODUCTION, RATES, TIMES
from engines.benchmark.work import Kind, Product, Work, count_work
from engines.manifest import Precision
from engines.pid.fp4 import FP4_BYTES
from engines.pid.released import released
from engines.pid.sampler import MAX_STEPS
from engines.size import Size

DECODER = "flux-2kto4k-v1.5"
SIZES = (Size(1024, 1024), Size(2048, 2048), Size(4096, 4096))
PRECISIONS: tuple[Precision, ...] = ("bf16", "fp8", "fp4")

# Bytes that compiled pointwise kernels move, relative to the activations that the matrix products move. Inductor's own
# count of the generated code, at 2048×2048 for compute capability 9.0: 31.7 GB in bf16, 33.2 GB in FP8.
POINTWISE_SHARE: Mapping[Precision, float] = {"bf16": 1.48, "fp8": 1.77}
# Kernels process heads of 72 channels as heads of 96.
PADDING_OF_PIXEL_HEADS = 72 / 96


@dataclass(frozen=True)
class Gpu:
    """Published peak rates of a GPU, and the fractions of them that are assumed to be reached."""

    name: str  # occurs in the product name
    bf16: float  # FLOP per second, dense, summed in float32
    fp8: float  # the same
    memory: float  # bytes per second
    linear: float  # fraction of `bf16`
    fp8_linear: float  # fraction of `fp8`
    attention: float  # fraction of `bf16`, for heads of 64 channels
    bandwidth: float = 0.8  # fraction of `memory`
    convolution: float = 0.4  # fraction of `bf16`
    fp4: float = 0.0  # as `bf16`; 0: the tensor cores do not have FP4
    fp4_linear: float = 0.0  # fraction of `fp4`
    fp8_attention: float = 0.0  # fraction of `fp8`, for heads of 64 channels; 0: no kernels are known to exist

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """The precisions that there are predictions for."""
        return tuple(precision for precision in PRECISIONS if precision != "fp4" or self.fp4)

    def rate(self, kind: Kind) -> float:
        """Return the assumed FLOP per second of products of this kind."""
        return {
            "linear": self.bf16 * self.linear,
            "FP8 linear": self.fp8 * self.fp8_linear,
            "FP4 linear": self.fp4 * self.fp4_linear,
            "joint attention": self.bf16 * self.attention,
            "pixel attention": self.bf16 * self.attention * PADDING_OF_PIXEL_HEADS,
            "convolution": self.bf16 * self.convolution,
        }[kind]

    @property
    def memory_rate(self) -> float:
        """Assumed bytes per second."""
        return self.memory * self.bandwidth

    def with_fp8_attention(self) -> Gpu:
        """Return this GPU with attention at its rate in FP8."""
        return replace(self, attention=self.fp8 * self.fp8_attention / self.bf16)


GPUS = (
    Gpu("H100", 989e12, 1979e12, 3.35e12, linear=0.70, fp8_linear=0.60, attention=0.45),
    Gpu("H200", 989e12, 1979e12, 4.8e12, linear=0.70, fp8_linear=0.60, attention=0.45),
    Gpu(
        "RTX 5090",
        209.5e12,
        419e12,
        1.792e12,
        linear=1.05,
        fp8_linear=0.95,
        attention=0.95,
        fp4=1676e12,
        fp4_linear=0.60,
        fp8_attention=0.70,
    ),
    Gpu("GB200", 2500e12, 5000e12, 8e12, linear=0.65, fp8_linear=0.50, attention=0.45, fp4=10_000e12, fp4_linear=0.35),
)


def find_gpu(product_name: str) -> Gpu | None:
    """Return the GPU with this product name, such as "NVIDIA H200"; None if it has no predictions."""
    return next((gpu for gpu in GPUS if gpu.name in product_name), None)


@dataclass(frozen=True)
class Prediction:
    """Predicted seconds of one image."""

    condition: float
    step: float

    @property
    def decode(self) -> float:
        """Seconds of a decode in four steps, without the copy of the image to the host."""
        return self.condition + MAX_STEPS * self.step


@cache
def predict(gpu: Gpu, size: Size, precision: Precision) -> Prediction:
    """Predict the times of a decode with torch.compile and CUDA graphs; those in FP4, with an engine.

    Raises:
        ValueError: There are no predictions for this precision.
    """
    if precision not in gpu.precisions:
        raise ValueError(f"There are no predictions for {precision} on {gpu.name}.")
    work = decoder_work(size, precision)
    return Prediction(_seconds(gpu, work.condition, precision), _seconds(gpu, work.step, precision))


@cache
def decoder_work(size: Size, precision: Precision) -> Work:
    """Return the work of the decoder that the predictions are for."""
    return count_work(released(DECODER).config, size, precision)


def pointwise_bytes(products: Sequence[Product], precision: Precision) -> float:
    """Estimate the bytes that the kernels between the products move, with those that quantise to FP4."""
    activations = sum(product.activation_bytes for product in products)
    if precision != "fp4":
        return POINTWISE_SHARE[precision] * activations
    # The kernels between the products write 16 bits, as in bf16. Others read that, and write FP4 for the products.
    in_16_bits = activations + (2 - FP4_BYTES) * sum(product.fp4_inputs for product in products)
    return POINTWISE_SHARE["bf16"] * in_16_bits + quantisation_bytes(products)


def quantisation_bytes(products: Sequence[Product]) -> float:
    """Return the bytes that the kernels move that quantise to FP4, one before each FP4 product."""
    return (2 + FP4_BYTES) * sum(product.fp4_inputs for product in products)


def _seconds(gpu: Gpu, products: Sequence[Product], precision: Precision) -> float:
    """Add the times of all kernels: a product is bound by its operations or its bytes, the others by their bytes."""
    return _product_seconds(gpu, products) + pointwise_bytes(products, precision) / gpu.memory_rate


def _product_seconds(gpu: Gpu, products: Sequence[Product], *kinds: Kind) -> float:
    return sum(
        max(product.flops / gpu.rate(product.kind), product.nbytes / gpu.memory_rate)
        for product in _of_kinds(products, kinds)
    )


def page() -> str:
    """Return the page of predictions as Markdown."""
    texts, tables = (INTRODUCTION, RATES, TIMES, FP4), (_work_table(), _rate_table(), _time_table(), _fp4_table())
    return "\n".join(
        f"{text}\n" + "".join(f"{row}\n" for row in rows) for text, rows in zip(texts, tables, strict=True)
    )


def _work_table() -> Iterator[str]:
    kinds = ("linear", "FP8 linear", "FP4 linear", "attention")
    yield f"| output | precision | condition | {' | '.join(kinds)} | step | products | pointwise | bytes |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for size in SIZES:
        for precision in PRECISIONS:
            work = decoder_work(size, precision)
            flops = [
                _flops(work.condition),
                _flops(work.step, "linear"),
                _flops(work.step, "FP8 linear"),
                _flops(work.step, "FP4 linear"),
                _flops(work.step, "joint attention", "pixel attention"),
                _flops(work.step),
            ]
            moved = sum(product.nbytes for product in work.step), pointwise_bytes(work.step, precision)
            cells = [*(f"{count / 1e12:.3g}" for count in flops), *(f"{b / 1e9:.3g}" for b in (*moved, sum(moved)))]
            yield f"| {_title(size)} | {_title(precision)} | {' | '.join(cells)} |"


def _flops(products: Sequence[Product], *kinds: Kind) -> int:
    return sum(product.flops for product in _of_kinds(products, kinds))


def _of_kinds(products: Sequence[Product], kinds: Sequence[Kind]) -> Iterator[Product]:
    """Yield the products of these kinds; all of them if no kind is given."""
    return (product for product in products if not kinds or product.kind in kinds)


def _rate_table() -> Iterator[str]:
    names = ("bf16", "FP8", "FP4", "memory", "linear", "FP8 linear", "FP4 linear", "attention, 64 wide")
    yield f"| GPU | {' | '.join(names)} | attention in FP8 | memory, assumed |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for gpu in GPUS:
        peaks = [f"{peak / 1e12:g}" if peak else "–" for peak in (gpu.bf16, gpu.fp8, gpu.fp4, gpu.memory)]
        assumed = [
            _assumed_rate(gpu.bf16, gpu.linear),
            _assumed_rate(gpu.fp8, gpu.fp8_linear),
            _assumed_rate(gpu.fp4, gpu.fp4_linear),
            _assumed_rate(gpu.bf16, gpu.attention),
            _assumed_rate(gpu.fp8, gpu.fp8_attention),
            f"{gpu.memory_rate / 1e12:.2f} ({gpu.bandwidth:.0%})",
        ]
        yield f"| {gpu.name} | {' | '.join((*peaks, *assumed))} |"


def _assumed_rate(peak: float, fraction: float) -> str:
    return f"{peak * fraction / 1e12:.0f} ({fraction:.0%})" if peak * fraction else "–"


def _time_table() -> Iterator[str]:
    yield "| GPU | precision | output | condition | step | decode | images per second |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for gpu in GPUS:
        for precision in gpu.precisions:
            yield from _time_rows(gpu, precision, _title(precision))
            if gpu.fp8_attention and precision != "bf16":
                yield from _time_rows(gpu.with_fp8_attention(), precision, f"{_title(precision)}, attention in FP8")


def _time_rows(gpu: Gpu, precision: Precision, title: str) -> Iterator[str]:
    for size in SIZES:
        times = predict(gpu, size, precision)
        cells = [f"{_milliseconds(seconds)} ms" for seconds in (times.condition, times.step, times.decode)]
        yield f"| {gpu.name} | {title} | {_title(size)} | {' | '.join(cells)} | {1 / times.decode:.2g} |"


def _fp4_table() -> Iterator[str]:
    yield "| GPU | output | products, FP8 | FP4 | other kernels, FP8 | FP4 | quantising | step, FP8 | FP4 | less |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for gpu in (gpu for gpu in GPUS if gpu.fp4):
        for size in SIZES:
            fp8, fp4 = (decoder_work(size, precision).step for precision in ("fp8", "fp4"))
            quantising = quantisation_bytes(fp4)
            steps = [predict(gpu, size, precision).step for precision in ("fp8", "fp4")]
            seconds = [
                _product_seconds(gpu, fp8, "FP8 linear"),
                _product_seconds(gpu, fp4, "FP4 linear"),
                pointwise_bytes(fp8, "fp8") / gpu.memory_rate,
                (pointwise_bytes(fp4, "fp4") - quantising) / gpu.memory_rate,
                quantising / gpu.memory_rate,
                *steps,
            ]
            cells = [*map(_milliseconds, seconds), f"{1 - steps[1] / steps[0]:.1%}"]
            yield f"| {gpu.name} | {_title(size)} | {' | '.join(cells)} |"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.0f}" if seconds >= 0.1 else f"{1000 * seconds:.3g}"


def _title(value: Size | Precision) -> str:
    return f"{value.height}×{value.width}" if isinstance(value, Size) else value.replace("fp", "FP")


if __name__ == "__main__":
    sys.stdout.write(page())
