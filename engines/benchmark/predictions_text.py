"""Text of docs/measurements/predictions.md, which `engines.benchmark.predictions` prints around its tables."""

INTRODUCTION = """\
# Predictions

**Nothing on this page is a measurement.** These times were calculated before this code ran on any GPU, so that the
first measurements have something to be compared with. [gpu_check](../engines.md#checking-a-gpu) shows those in bf16 and
FP8 next to what it measures. They are not adjusted to measurements: a ratio far from 1 shows that an assumption below
is wrong. The times in FP4 and those of attention in FP8 were added later, before either had run on an RTX 5090 or a
GB200.

The page is the output of `python -m engines.benchmark.predictions`
([engines/benchmark/predictions.py](../../engines/benchmark/predictions.py)). It is for flux-2kto4k-v1.5, one image per
batch, with torch.compile and CUDA graphs. In FP4, it is for an engine, in which other kernels quantise the inputs. FP4
is predicted for the GPUs whose tensor cores have it. In FP8 and FP4, all layers have this precision that may be
quantised, and attention is in bf16 unless the table says otherwise.

## Work

The operations, in TFLOP, and the bytes, in GB, of one call of each graph. The operations and the bytes of the products
(linear layers, attention, convolutions) are counted on tensors without data: each product reads its inputs and weights
and writes its output once. The compiled kernels between the products also move bytes. Their share was counted by
Inductor in its generated code at 2048×2048; for the other sizes it is assumed to be the same relative to the
activations of the products.

In FP4, inputs and weights take 4.5 bits per number, with their part of the scale that 16 numbers share. Outputs are in
16 bits. The kernels between the products are assumed to move the same bytes as in bf16. In addition, each FP4 product
has a kernel before it that quantises its inputs: it reads 16 bits and writes 4.5 bits per number. It is counted for
every layer, even where two layers have the same input, and its bytes are part of the column "pointwise". If TensorRT
fuses it with other kernels, FP4 is faster than predicted here. In FP8, torch.compile fuses the rounding.

Columns: all operations of `condition`; operations of a step by kind, and all of them; bytes of a step in its products,
between them, and in total.
"""

RATES = """\
## Rates

Published peak rates, in TFLOP/s (dense, summed in float32) and TB/s, and the rates that are assumed, in the same units
and in percent of the published ones. The assumed rates are judgements. The reasons are:

- **Linear layers.** On H100 and H200, products of 8192×8192 matrices in bf16 reach 81 % (measured on such devices, not
  with this code). The network's products are smaller. The RTX 5090 can run above the clock that its rates are
  published for: between 172 and 236 TFLOP/s were reported for such products ([1][r1], [2][r2], [3][r3]).
- **FP8** gains less than the factor of two of its peak rate, because each product is half as long.
- **FP4** reaches a smaller fraction than FP8, because each product is shorter still, and writes as many bytes. The time
  for quantising its inputs is not part of this fraction, but added. On the RTX 5090, the peak rate in FP4 is four times
  that in FP8: summing in float32 halves the rate for FP8, but not for FP4. Reported were 2,019 TFLOP/s for the
  instruction alone at 2.85 GHz ([4][r4]); 1,629 TFLOP/s for products of 8192×8192 matrices on an RTX PRO 6000, the same
  chip with 188 instead of 170 multiprocessors ([5][r5]); and 3,000 to 3,800 TFLOP/s, with cuDNN and CUTLASS on a B200,
  for 1,024 rows of 4,608 inputs and 7,168 outputs ([6][r6]). Most of the network's products have only 1,536 inputs.
- **Attention** with heads of 64 channels has few operations per exponential. The exponentials limit GPUs with fast
  tensor cores, but hardly the RTX 5090. The heads of the pixel blocks have 72 channels, which kernels process as 96.
- **Attention in FP8** halves the time of the products, but not that of the exponentials, and has to convert these to
  FP8. Its inputs are assumed to be rounded by kernels that write them anyway. It is predicted for the RTX 5090 only,
  for which [TensorRT for RTX has such kernels](../engines.md#fp8-attention).
- **Convolutions**, only in `condition`: 40 % of the bf16 rate.
- **Memory.** Copies reach 90 % on H100 and H200 (measured on such devices). Compiled kernels read several tensors.

The assumed rates do not contradict the times that the authors of PiD published (below).

Sources of the published rates: NVIDIA's data sheets of the H100 (SXM), the H200 (SXM) and the GB200 (one of the two
GPUs of a superchip), which state rates with sparsity that are twice as high; dense rates as listed for the
[H100](https://glennklockwood.com/garden/processors/h100), the
[H200](https://itkb.uw.cz/2026/06/nvidia-h200-vs-b300-precisions-cores.html) and the
[GB200](https://glennklockwood.com/garden/processors/B200); for the RTX 5090, appendix A of NVIDIA's [white
paper][white-paper] on the RTX Blackwell GPU architecture, whose rate for FP4 is 1,676 TFLOP/s, and 3,352 with sparsity.

[r1]: https://github.com/zzc0721/torch-performance-test-data/issues/200
[r2]: https://github.com/zzc0721/torch-performance-test-data/issues/124
[r3]: https://github.com/zzc0721/torch-performance-test-data/pull/15
[r4]: https://github.com/kekzl/imp/pull/606
[r5]: https://github.com/NVIDIA/cutlass/pull/3272
[r6]: https://github.com/flashinfer-ai/flashinfer/pull/1979
[white-paper]: https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf
"""

TIMES = """\
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

FP4 = """\
## What FP4 gains

The table compares a step in FP4 with one in FP8, in ms, both with attention in bf16. It has the products of the
quantised layers, the other kernels between products, and the kernels that quantise the inputs in FP4. Everything else
is the same. The times in FP8 are for torch.compile, which fuses the rounding with other kernels; an engine may not.

- A step is predicted to be faster on both GPUs, but by little if the image is large, because most of its time is then
  attention.
- Quantising the inputs costs a fifth of what the products gain on the RTX 5090, and more than half of it on the GB200.
- If the products do not exceed 26 % of the peak rate in FP4 on the RTX 5090, or 29 % on the GB200, FP8 is faster.
- On the RTX 5090, FP4 and attention in FP8 add up (see above). At 1024×1024, FP4 gains more; at the larger sizes,
  attention in FP8 does.
"""
