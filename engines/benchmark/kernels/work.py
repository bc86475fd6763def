"""Work of the kernels of this project in one step, by kernel. Needs no Triton.

The decoder is flux-2kto4k-v1.5 in FP8 at 2048×2048, one image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from engines.benchmark.predictions import DECODER
from engines.pid.config import PATCH_PIXELS
from engines.pid.released import released
from engines.size import Size

NETWORK = released(DECODER).config
SIZE = Size(2048, 2048)
TOKENS = SIZE.area // PATCH_PIXELS
CHUNK = 1024  # tokens of the pixel blocks that are processed at a time, at the default budget of memory


@dataclass(frozen=True)
class AttentionShape:
    """An attention of the network."""

    block: str
    calls: int  # per step
    tokens: int
    heads: int
    width: int  # channels per head

    def __str__(self) -> str:
        return f"{self.block}, {self.width} channels"


JOINT = AttentionShape(
    "joint", NETWORK.patch_depth, TOKENS + NETWORK.caption_tokens, NETWORK.num_heads, NETWORK.head_width
)
PIXEL = AttentionShape("pixel", NETWORK.pixel_depth, TOKENS, NETWORK.pixel_num_heads, NETWORK.pixel_head_width)
SHAPES = (JOINT, PIXEL)


@dataclass(frozen=True)
class Mode:
    """Which operands of an attention are in FP8; the others are in bf16."""

    name: str
    fp8_scores: bool = False  # queries and keys
    fp8_values: bool = False

    def __str__(self) -> str:
        return self.name


MODES = (Mode("bf16"), Mode("FP8 scores", fp8_scores=True), Mode("FP8", fp8_scores=True, fp8_values=True))


@dataclass(frozen=True)
class KernelWork:
    """Least work of one call of a kernel.

    Attributes:
        kernel: The kernel.
        variant: Operation that it computes, if there are several.
        calls: Calls per step.
        nbytes: Bytes of inputs and outputs.
        bf16: FLOP of products in bf16.
        fp8: FLOP of products in FP8.
        special: Exponentials, reciprocals and reciprocal roots.
        polynomials: Fraction of them that the kernel can compute without the special function units.
        padding: Factor by which the tiles of the kernel increase its FLOP.
    """

    kernel: str
    variant: str
    calls: int
    nbytes: int
    bf16: int = 0
    fp8: int = 0
    special: int = 0
    polynomials: float = 0.0
    padding: float = 1.0

    def __str__(self) -> str:
        return f"{self.kernel}, {self.variant}" if self.variant else self.kernel


def heads_work(shape: AttentionShape, mode: Mode) -> KernelWork:
    """Return the work of the kernel that makes heads: it reads one product and writes queries, keys and values."""
    values = shape.tokens * shape.heads * shape.width
    written = 2 * (1 if mode.fp8_scores else 2) + (1 if mode.fp8_values else 2)
    return KernelWork("heads", f"{shape}, {mode}", shape.calls, (3 * 2 + written) * values)


def attention_work(shape: AttentionShape, mode: Mode) -> KernelWork:
    """Return the work of attention: two products, and an exponential per query and key."""
    values, scores = shape.tokens * shape.heads * shape.width, shape.tokens**2 * shape.heads
    read = 2 * (1 if mode.fp8_scores else 2) + (1 if mode.fp8_values else 2)
    product, in_fp8 = 2 * scores * shape.width, mode.fp8_scores + mode.fp8_values
    # Tiles have widths that are sums of two powers of two, of at least 16, in FP8 32 for the scores.
    score_width, value_width = (_multiple(shape.width, 32 if mode.fp8_scores else 16), _multiple(shape.width, 16))
    return KernelWork(
        "attention",
        f"{shape}, {mode}",
        shape.calls,
        (read + 2) * values,
        bf16=(2 - in_fp8) * product,
        fp8=in_fp8 * product,
        special=scores,
        polynomials=1 / 4,
        padding=(score_width + value_width) / (2 * shape.width),
    )


def _multiple(width: int, of: int) -> int:
    return -(-width // of) * of


def gated_work() -> KernelWork:
    """Return the work of the gated product of the image tokens: FP8 inputs, weights and outputs."""
    width, inner = NETWORK.hidden_size, NETWORK.mlp_width
    return KernelWork(
        "gated product",
        "",
        NETWORK.patch_depth,
        TOKENS * (width + inner) + 2 * width * inner,
        fp8=2 * 2 * TOKENS * width * inner,
        special=2 * TOKENS * inner,
    )


def pixel_work() -> KernelWork:
    """Return the work of the pixel update of one chunk: pixels read and written, four modulations, one addend."""
    channels, pixels = NETWORK.pixel_channels, CHUNK * PATCH_PIXELS
    return KernelWork(
        "pixel update",
        "",
        NETWORK.pixel_depth * TOKENS // CHUNK,
        7 * 2 * pixels * channels,
        bf16=2 * 2 * pixels * 4 * channels**2,
        special=2 * pixels * 4 * channels,
    )


def all_work() -> Iterator[KernelWork]:
    """Yield the work of every kernel."""
    for work in (heads_work, attention_work):
        for shape in SHAPES:
            for mode in MODES:
                yield work(shape, mode)
    yield gated_work()
    yield pixel_work()
