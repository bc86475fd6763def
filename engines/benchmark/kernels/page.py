"""Resources, ceilings and predicted times of the kernels of this project, next to the measured ones.

python -m engines.benchmark.kernels.page

Prints docs/measurements/kernels.md. It needs Triton and about two minutes, but no GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, get_args

from engines.benchmark.kernels.steps import TARGETS, attention_ceiling, bases, predicted_step
from engines.benchmark.kernels.times import MULTIPROCESSORS, times
from engines.benchmark.kernels.work import (
    JOINT,
    MODES,
    PIXEL,
    all_work,
    attention_work,
    gated_work,
    heads_work,
    pixel_work,
)
from engines.benchmark.predictions import GPUS, Gpu

if TYPE_CHECKING:
    from engines.runtime.triton.architectures import Architecture

_ATTENTIONS = {"bf16": MODES[:1], "bf16 or FP8": MODES}
_ARCHITECTURES = {"sm_90": "H100, H200", "sm_100": "GB200", "sm_120": "RTX 5090"}
# What was measured on the H200, in ms: of the kernel, and of the operations that PyTorch computes instead.
_MEASURED: Mapping[str, tuple[str, str]] = {
    str(heads_work(JOINT, MODES[0])): ("0.0907", ""),
    str(heads_work(JOINT, MODES[1])): ("0.0792", ""),
    str(heads_work(PIXEL, MODES[0])): ("0.0845", ""),
    str(heads_work(PIXEL, MODES[1])): ("0.0805", ""),
    str(attention_work(JOINT, MODES[0])): ("2.78", "3.93"),
    str(attention_work(JOINT, MODES[1])): ("2.71", ""),
    str(attention_work(PIXEL, MODES[0])): ("2.50", "3.03"),
    str(attention_work(PIXEL, MODES[1])): ("2.32", ""),
    str(gated_work()): ("0.324", "0.304, without the gate"),
    str(pixel_work()): ("0.0200", "0.0879"),
}


def page() -> str:
    """Return the page as Markdown. This compiles all kernels, in this process."""
    import triton

    from engines.runtime.triton.architectures import Architecture

    resources = [
        _section(f"### {architecture}: {_ARCHITECTURES[architecture]}\n", _resource_table(architecture))
        for architecture in get_args(Architecture)
    ]
    return "\n".join((_INTRODUCTION.format(version=triton.__version__), *resources, calculated_sections()))


def calculated_sections() -> str:
    """Return the sections of the page that do not depend on the compiler."""
    return "\n".join(
        (
            _section(_CEILINGS, _rate_table()),
            _PREDICTIONS,
            *(_section(f"### {gpu.name}\n", _time_table(gpu)) for gpu in GPUS),
            _section(_STEPS, _step_table()),
            _section(_TARGETS, _target_table()),
        )
    )


def _section(text: str, table: Iterator[str]) -> str:
    return f"{text}\n" + "".join(f"{row}\n" for row in table)


def _table(*columns: str) -> Iterator[str]:
    yield _row(*columns)
    yield _row(*("---" for _ in columns))


def _row(*cells: str) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


def _resource_table(architecture: Architecture) -> Iterator[str]:
    from engines.benchmark.kernels.cases import cases

    yield from _table("kernel", "tiles", "registers", "spilled", "shared memory", "matrix instructions")
    for case in cases(architecture):
        used = max(case.compile(architecture), key=lambda variant: (variant.spilled, variant.registers))
        numbers = (str(used.registers), f"{used.spilled} B", f"{used.shared / 1024:.1f} KiB")
        yield _row(str(case.work), case.tiles, *numbers, ", ".join(used.matrix_instructions))


def _rate_table() -> Iterator[str]:
    yield from _table("GPU", "multiprocessors", "clock", "FLOP per clock and multiprocessor", "special functions")
    for gpu in GPUS:
        processors = MULTIPROCESSORS[gpu.name]
        yield _row(
            gpu.name,
            str(processors.count),
            f"{processors.clock(gpu) / 1e9:.2f} GHz",
            f"{processors.flops_per_clock:,}",
            f"{processors.special_rate(gpu) / 1e12:.2f} T/s",
        )


def _time_table(gpu: Gpu) -> Iterator[str]:
    measured = ("measured", "PyTorch, measured") if gpu.name == "H200" else ()
    parts = ("calls", "products", "special functions", "memory")
    yield from _table("kernel", *parts, "ceiling", "bound", "predicted", *measured)
    for work in all_work():
        call = times(gpu, work)
        cells = [_ms(seconds) for seconds in (call.products, call.special, call.memory, call.ceiling)]
        found = _MEASURED.get(str(work), ("", "")) if measured else ()
        yield _row(str(work), str(work.calls), *cells, call.bound, _ms(call.predicted), *found)


def _step_table() -> Iterator[str]:
    parts = ("attention", "heads", "gated product", "pixel update", "rest")
    yield from _table("GPU", "attention in", "step before", *parts, "step", "decode before", "decode")
    for basis in bases():
        for name, modes in _ATTENTIONS.items():
            step = predicted_step(basis, modes)
            seconds = (step.attention, step.heads, step.gated, step.pixels, step.rest, step.seconds)
            decodes = (f"{1000 * seconds:.0f}" for seconds in (basis.decode, step.decode))
            yield _row(basis.name, name, *(f"{1000 * s:.1f}" for s in (basis.step, *seconds)), *decodes)


def _target_table() -> Iterator[str]:
    allowed = ("target", "a step may need", "so attention may need")
    yield from _table("GPU", "attention in", *allowed, "its ceiling", "share of the ceiling", "predicted")
    for basis in bases():
        if (target := TARGETS.get(basis.gpu.name)) is None:
            continue
        for name, modes in _ATTENTIONS.items():
            step, ceiling = predicted_step(basis, modes), attention_ceiling(basis.gpu, modes)
            allowance = step.allowed_attention(target)
            times_ms = [f"{1000 * s:.1f}" for s in (basis.allowed_step(target), allowance, ceiling)]
            shares = (f"{ceiling / allowance:.0%}", f"{1000 * step.attention:.1f} ({ceiling / step.attention:.0%})")
            yield _row(basis.name, name, f"{1000 * target:.0f}", *times_ms, *shares)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:#.3g}" if seconds else ""


_INTRODUCTION = """\
# Kernels

This page has what the compiler reports about the kernels in
[engines/runtime/triton](../../engines/runtime/triton), the least time that each can need on a GPU, the time that was
expected of it, and what was [measured on an H200](README.md#kernels-of-this-project). On other GPUs, nothing was
measured. The page is the output of `python -m engines.benchmark.kernels.page`
([engines/benchmark/kernels/page.py](../../engines/benchmark/kernels/page.py)).

The shapes are those of flux-2kto4k-v1.5 with FP8 layers, one image of 2048×2048. Each attention exists in three modes:
all operands in bf16; queries and keys in FP8 ("FP8 scores"); all operands in FP8. The kernel that makes the heads
writes them in the same three formats. On Hopper, the runtime does not use values in FP8, because its tensor cores keep
too few bits of such sums; the times are for comparison.

## Resources

Compiled with Triton {version}, for sm_90 too with its newer assembler (ptxas-blackwell). The times below were measured
with Triton 3.6, whose registers and spills may differ. Registers are per thread, at most 255. Spilled bytes are those
of local memory per thread. A multiprocessor has 65,536 registers, and a program can use 227 KiB of its shared memory
(sm_90, sm_100) or 99 KiB (sm_120). Triton compiles a kernel several times if, for example, the softmax can have a bound
on the scores or not. A row then has the variant that spills most, or else the one with the most registers.
"""

_CEILINGS = """\
## Ceilings

A call needs at least the longest of three times:

- **Products**, at the published rate of the tensor cores for the dtype.
- **Special functions**: exponentials, reciprocals and reciprocal roots, of which a multiprocessor computes 16 per clock
  (table of arithmetic instructions in NVIDIA's CUDA programming guide; unchanged
  [from Hopper to Blackwell](https://www.together.ai/blog/flashattention-4)). Attention needs one exponential per query,
  key and head. Its kernel can compute a quarter of them as polynomials, on other units. The ceilings do not contain
  this quarter.
- **Memory**, at the published rate: each input is read once and each output is written once.

The published rates are those of the [predictions](predictions.md#rates). The clock is the one at which the
multiprocessors reach the published rate in bf16; the rate of the special functions follows from it. On Hopper, this is
one special function per 256 FLOP of products in bf16. Attention with 64 channels needs one exponential per 256 FLOP, so
without polynomials both need the same time, and FP8 makes only the products faster.

Other instructions are not counted. They can be the bound too, in particular with values in FP8: numerators are then
rescaled and converted.
"""

_PREDICTIONS = """\
## Times

All times are in ms per call; calls are per step. The predicted time is the longer of two: that of the memory at 80 % of
its published rate, as in the predictions; and the sum of the times of the products and of all special functions,
divided by an assumed efficiency. It is a sum because kernels overlap the two only in part. The efficiencies are
judgements:

- **Attention on H100 and H200: 1.** Other Triton kernels were [measured](README.md#fp8-attention-on-hopper) on the
  H200. They needed 1.12 times the sum in bf16 and 1.13 times with FP8 scores, and cuDNN 1.15 times: not less than if
  nothing overlapped. The kernel here is written so that the product with the values overlaps the exponentials, and
  needs no maximum if the scores are bounded. It is assumed to need the sum.
- **Attention with values in FP8: 0.85 of that.** The measured kernel needed 1.36 times the sum. Numerators in FP8 have
  to be converted, and need the maximum of the scores.
- **Attention on GB200: 0.475.** For heads of 128 channels in bf16 on a B200, FlashAttention 4 was reported to reach
  1,605 TFLOP/s and to be up to [2.7 times as fast as Triton](https://www.together.ai/blog/flashattention-4). With the
  rates of a GB200, this is 0.475 of the sum.
- **Attention on RTX 5090: 1**, as the assumed rate in the predictions is close to the published one.
- **72 channels** are computed as 80, and in FP8 scores as 96.
- **Gated product**: the efficiency of FP8 layers in the predictions, 60 % on Hopper, 95 % on RTX 5090 and 50 % on
  GB200.
- **Pixel update**: 60 %.

The predictions were written before the measurements. "PyTorch, measured" is what PyTorch needs for the operation that
the kernel replaces; for the pixel update, it is from another run. Where it is empty, that operation was not measured
separately.
"""

_STEPS = """\
## Step and decode

These are predictions of a step and a decode at 2048×2048 with FP8 layers, in ms, with the faster one of PyTorch and the
kernel for each part. "Predicted" starts from the [predictions](predictions.md), "measured" from what the
[H200](README.md#where-the-time-goes) needed without the kernels, with which the decode includes the copy to the host.
`condition` had been measured with 29.4 ms instead of the predicted 8.3 ms, so there are rows with either time.

**Measured on an H200**: 319.0 ms for a decode and 77.9 ms for a step, with attention in bf16 and 6.2 ms for
`condition`. The row with the predicted time of `condition` has 345 ms. The times in the table above are of later
kernels; with them and a faster gather, a decode would need about 295 ms (calculated, not measured).

Where the kernels are not used, the code that Inductor generates moves 876 MB per patch block for the heads (the kernel
moves 302 MB for the image in bf16), 335 MB for the gate between the products, and 230 MB per chunk for the pixel update
(the kernel: 59 MB). This was counted in the generated code. These bytes are assumed to need 80 % of the published rate.
For the heads of the pixel blocks, the same ratio is assumed. On a GB200, the attention of PyTorch is predicted to be
the fastest.
"""

_TARGETS = """\
## Is the target reachable?

The target of a decode is 210 ms on an H200 and 240 ms on an H100. The table has the time per step, in ms, that remains
for the attention if everything else is as fast as in the table above, and the share of its ceiling that attention would
have to reach. More than 100 % is impossible.

**On an H200, 210 ms are not reachable** with this network in four steps, as far as measurements tell. With everything
else as in the measured decode (28.5 ms of a step, 7.5 ms outside the steps), attention may need 22.1 ms per step. That
is 121 % of its ceiling in bf16, which is impossible, and 90 % in FP8. The rows "H200, measured" below start from the
measurements without the kernels. If everything else were as fast as predicted, attention would have to reach 65 % in
FP8 or 89 % in bf16. The kernel here reaches 62 % in bf16 and 48 % with scores in FP8 (joint attention), cuDNN 44 % in
bf16.

**On an H100, 240 ms need** 55 % of the ceiling in FP8, or 75 % in bf16, if everything else is as fast as predicted. On
the H200, attention has not reached that, and the rest was slower than predicted.

Attention is the reason: even at its ceiling, it needs 79 ms of a decode in FP8. In bf16, it needed 197 ms in the
measured decode, and would need 176 ms with the later tiles (calculated). Faster FP8 products do not change the
exponentials. Fewer steps, or attention between fewer tokens, would.
"""


if __name__ == "__main__":
    sys.stdout.write(page())
