"""Predicted times of a decode, from counted work and published rates: written before any measurement.

python -m engines.benchmark.predictions

Prints docs/measurements/predictions.md. `gpu_check` shows the same predictions next to its measurements.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from engines.benchmark.work import Kind, Product, Work, count_work
from engines.manifest import Precision
from engines.pid.released import released
from engines.pid.sampler import MAX_STEPS
from engines.size import Size

DECODER = "flux-2kto4k-v1.5"
SIZES = (Size(1024, 1024), Size(2048, 2048), Size(4096, 4096))
PRECISIONS: tuple[Precision, ...] = ("bf16", "fp8")

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

    def rate(self, kind: Kind) -> float:
        """Return the assumed FLOP per second of products of this kind."""
        return {
            "linear": self.bf16 * self.linear,
            "FP8 linear": self.fp8 * self.fp8_linear,
            "joint attention": self.bf16 * self.attention,
            "pixel attention": self.bf16 * self.attention * PADDING_OF_PIXEL_HEADS,
            "convolution": self.bf16 * self.convolution,
        }[kind]

    @property
    def memory_rate(self) -> float:
        """Assumed bytes per second."""
        return self.memory * self.bandwidth


GPUS = (
    Gpu("H100", 989e12, 1979e12, 3.35e12, linear=0.70, fp8_linear=0.60, attention=0.45),
    Gpu("H200", 989e12, 1979e12, 4.8e12, linear=0.70, fp8_linear=0.60, attention=0.45),
    Gpu("RTX 5090", 209.5e12, 419e12, 1.792e12, linear=1.05, fp8_linear=0.95, attention=0.95),
    Gpu("GB200", 2500e12, 5000e12, 8e12, linear=0.65, fp8_linear=0.50, attention=0.45),
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
    """Predict the times of a decode with torch.compile and CUDA graphs."""
    work = decoder_work(size, precision)
    return Prediction(_seconds(gpu, work.condition, precision), _seconds(gpu, work.step, precision))


@cache
def decoder_work(size: Size, precision: Precision) -> Work:
    """Return the work of the decoder that the predictions are for."""
    return count_work(released(DECODER).config, size, precision)


def pointwise_bytes(products: Sequence[Product], precision: Precision) -> float:
    """Estimate the bytes that the compiled kernels between the products move."""
    return POINTWISE_SHARE[precision] * sum(product.activation_bytes for product in products)


def _seconds(gpu: Gpu, products: Sequence[Product], precision: Precision) -> float:
    """Add the times of all kernels: a product is bound by its operations or its bytes, the others by their bytes."""
    busy = sum(max(product.flops / gpu.rate(product.kind), product.nbytes / gpu.memory_rate) for product in products)
    return busy + pointwise_bytes(products, precision) / gpu.memory_rate


def page() -> str:
    """Return the page of predictions as Markdown."""
    tables = zip((_INTRODUCTION, _RATES, _RESULTS), (_work_table(), _rate_table(), _time_table()), strict=True)
    return "\n".join(f"{text}\n" + "".join(f"{row}\n" for row in table) for text, table in tables)


def _work_table() -> Iterator[str]:
    yield "| output | precision | condition | linear | FP8 linear | attention | step | products | pointwise | bytes |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for size in SIZES:
        for precision in PRECISIONS:
            work = decoder_work(size, precision)
            flops = [
                _flops(work.condition),
                _flops(work.step, "linear"),
                _flops(work.step, "FP8 linear"),
                _flops(work.step, "joint attention", "pixel attention"),
                _flops(work.step),
            ]
            moved = sum(product.nbytes for product in work.step), pointwise_bytes(work.step, precision)
            cells = [*(f"{count / 1e12:.3g}" for count in flops), *(f"{b / 1e9:.3g}" for b in (*moved, sum(moved)))]
            yield f"| {_title(size)} | {_title(precision)} | {' | '.join(cells)} |"


def _flops(products: Sequence[Product], *kinds: Kind) -> int:
    return sum(product.flops for product in products if not kinds or product.kind in kinds)


def _rate_table() -> Iterator[str]:
    yield "| GPU | bf16 | FP8 | memory | linear | FP8 linear | attention, 64 wide | memory, assumed |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for gpu in GPUS:
        cells = [
            f"{gpu.bf16 / 1e12:g}",
            f"{gpu.fp8 / 1e12:g}",
            f"{gpu.memory / 1e12:g}",
            f"{gpu.rate('linear') / 1e12:.0f} ({gpu.linear:.0%})",
            f"{gpu.rate('FP8 linear') / 1e12:.0f} ({gpu.fp8_linear:.0%})",
            f"{gpu.rate('joint attention') / 1e12:.0f} ({gpu.attention:.0%})",
            f"{gpu.memory_rate / 1e12:.2f} ({gpu.bandwidth:.0%})",
        ]
        yield f"| {gpu.name} | {' | '.join(cells)} |"


def _time_table() -> Iterator[str]:
    yield "| GPU | precision | output | condition | step | decode | images per second |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for gpu in GPUS:
        for precision in PRECISIONS:
            for size in SIZES:
                times = predict(gpu, size, precision)
                cells = [f"{_number(1000 * seconds)} ms" for seconds in (times.condition, times.step, times.decode)]
                cells.append(f"{1 / times.decode:.2g}")
                yield f"| {gpu.name} | {_title(precision)} | {_title(size)} | {' | '.join(cells)} |"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _title(value: Size | Precision) -> str:
    return f"{value.height}×{value.width}" if isinstance(value, Size) else value.replace("fp8", "FP8")


_INTRODUCTION = """\
# Predictions

**Nothing on this page is a measurement.** These times were calculated before this code ran on any GPU, so that the
first measurements have something to be compared with. [gpu_check](../engines.md#checking-a-gpu) shows them next to
what it measures. They are not adjusted to measurements: a ratio far from 1 shows that an assumption below is wrong.

The page is the output of `python -m engines.benchmark.predictions`
([engines/benchmark/predictions.py](../../engines/benchmark/predictions.py)). It is for flux-2kto4k-v1.5, one image per
batch, with torch.compile and CUDA graphs.

## Work

The operations, in TFLOP, and the bytes, in GB, of one call of each graph. The operations and the bytes of the products
(linear layers, attention, convolutions) are counted on tensors without data: each product reads its inputs and weights
and writes its output once. The compiled kernels between the products also move bytes. Their share was counted by
Inductor in its generated code at 2048×2048; for the other sizes it is assumed to be the same relative to the
activations of the products. Columns: all operations of `condition`; operations of a step by kind, and all of them;
bytes of a step in its products, between them, and in total.
"""

_RATES = """\
## Rates

Published peak rates, in TFLOP/s (dense, summed in float32) and TB/s, and the rates that are assumed, in the same units
and in percent of the published ones. The assumed rates are judgements. The reasons are:

- **Linear layers.** On H100 and H200, products of 8192×8192 matrices in bf16 reach 81 % (measured on such devices, not
  with this code). The network's products are smaller. The RTX 5090 can run above the clock that its rates are
  published for: between 172 and 236 TFLOP/s were reported for such products ([1][r1], [2][r2], [3][r3]).
- **FP8** gains less than the factor of two of its peak rate, because each product is half as long.
- **Attention** with heads of 64 channels has few operations per exponential. The exponentials limit GPUs with fast
  tensor cores, but hardly the RTX 5090. The heads of the pixel blocks have 72 channels, which kernels process as 96.
- **Convolutions**, only in `condition`: 40 % of the bf16 rate.
- **Memory.** Copies reach 90 % on H100 and H200 (measured on such devices). Compiled kernels read several tensors.

The assumed rates do not contradict the times that the authors of PiD published (below).

Sources of the published rates: NVIDIA's data sheets of the H100 (SXM), the H200 (SXM) and the GB200 (one of the two
GPUs of a superchip), which state rates with sparsity that are twice as high; dense rates as listed for the
[H100](https://glennklockwood.com/garden/processors/h100), the
[H200](https://itkb.uw.cz/2026/06/nvidia-h200-vs-b300-precisions-cores.html) and the
[GB200](https://glennklockwood.com/garden/processors/B200); for the RTX 5090, the appendix of NVIDIA's white paper on
the RTX Blackwell GPU architecture.

[r1]: https://github.com/zzc0721/torch-performance-test-data/issues/200
[r2]: https://github.com/zzc0721/torch-performance-test-data/issues/124
[r3]: https://github.com/zzc0721/torch-performance-test-data/pull/15
"""

_RESULTS = """\
## Times

The time of a graph is the sum over its kernels, which run one after another. A product needs the time of its operations
at the rate of its kind or the time of its bytes, whichever is longer. The other kernels need the time of their bytes. A
decode is one `condition` and four steps. The copy of the image to the host is not included. A batch of n images is
predicted to need n times as long.

For comparison, the authors of PiD published 209 ms and 1.93 s for the GB200 (2048×2048 and 4096×4096) and less than 1 s
for the RTX 5090 (2048×2048), for their implementation in bf16 with torch.compile. It does the same work as this one and
more: modulations and adapter at every step. The [cost tables](../load-testing.md#simulated-devices) of simulated
devices do not use these times.
"""


if __name__ == "__main__":
    sys.stdout.write(page())
