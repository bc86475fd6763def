"""Choice between fast and slow accumulation in the FP8 matrix products on a device."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engines.accuracy import relative_error
from engines.errors import ConfigError
from engines.pid.config import PATCH_PIXELS
from engines.pid.fold import FoldedDecoder
from engines.pid.fp8 import FP8_MAX, Fp8Linear, to_fp8
from engines.runtime.kernels.timing import Timer, if_supported
from engines.size import Size

log = logging.getLogger(__name__)

# Limit of the error of fast accumulation, in the Frobenius norm and relative to the exact product of the same operands.
# Hopper's tensor cores keep about 14 bits of a sum; slow accumulation adds it to a float32 number every few products.
# Rounding both operands to FP8, with a relative error of up to 2⁻⁴ each, already changes a product by 3.7 %. A further,
# independent error of 2⁻⁷ raises that to 3.8 %. It includes rounding the result to bfloat16, about 0.2 %.
MAX_ERROR = 2.0**-7
_MIN_GAIN = 0.03  # of the time; smaller differences are noise, and slow accumulation is never less accurate
_CHECKED_ROWS = 256  # the reference in float32 needs 16 times the memory of its FP8 operands

ProductFunction = Callable[[Fp8Linear, Tensor, torch.dtype, bool], Tensor]  # as Fp8Linear.product


@dataclass(frozen=True)
class Product:
    """Shape of a matrix product, [rows, inputs] by [inputs, outputs], and the layers that compute it for one image."""

    rows: int
    inputs: int
    outputs: int
    layers: tuple[Fp8Linear, ...]


@dataclass(frozen=True)
class Measurement:
    """Duration of a product, and its error relative to the product of the same operands in float32."""

    seconds: float
    error: float

    def __str__(self) -> str:
        return f"{1000 * self.seconds:.3g} ms with an error of {self.error:.2%}"


@dataclass(frozen=True)
class AccumulationChoice:
    """Measurements of one product; `fast` is None if the device does not support it."""

    product: Product
    slow: Measurement
    fast: Measurement | None

    @property
    def is_fast(self) -> bool:
        """Whether to use fast accumulation: it is faster, and its error is at most MAX_ERROR."""
        fast = self.fast
        return (
            fast is not None and fast.error <= MAX_ERROR and fast.seconds <= (1 - _MIN_GAIN) * self.slow.seconds
        )  # False if an error is NaN

    def __str__(self) -> str:
        product = self.product
        return (
            f"FP8 product of {product.rows}x{product.inputs} and {product.inputs}x{product.outputs} "
            f"(layers: {len(product.layers)}): slow accumulation {self.slow}, fast "
            f"{'not supported' if self.fast is None else self.fast}; using {'fast' if self.is_fast else 'slow'}"
        )


def products(decoder: FoldedDecoder, size: Size, caption_tokens: int) -> tuple[Product, ...]:
    """Return the distinct FP8 products of a step for one image of `size`, the largest first."""
    layers = defaultdict(list)
    for name, layer in decoder.named_modules():
        if isinstance(layer, Fp8Linear) and layer.has_tensor_core_sides:
            outputs, inputs = layer.weight.shape
            layers[_rows(decoder, name, size, caption_tokens), inputs, outputs].append(layer)
    shapes = sorted(layers, key=lambda shape: shape[0] * shape[1] * shape[2], reverse=True)
    return tuple(Product(*shape, tuple(layers[shape])) for shape in shapes)


def _rows(decoder: FoldedDecoder, layer: str, size: Size, caption_tokens: int) -> int:
    tokens = size.area // PATCH_PIXELS
    if layer.startswith("pixel_blocks."):
        return decoder.chunk_tokens(1, tokens)
    return caption_tokens if any(part.endswith("_y") for part in layer.split(".")) else tokens


@torch.no_grad()
def choose_accumulation(
    decoder: FoldedDecoder,
    size: Size,
    caption_tokens: int,
    timer: Timer,
    multiply: ProductFunction = Fp8Linear.product,
) -> tuple[AccumulationChoice, ...]:
    """Measure the FP8 products of one image with random inputs, and set the choice on the layers of the decoder.

    Args:
        decoder: The network, on a device that multiplies FP8 matrices.
        size: Output size of the image.
        caption_tokens: Length of the caption.
        timer: Runs a function and returns its duration in seconds.
        multiply: Computes the product of a layer.

    Returns:
        The measurements of each distinct product; none for a network without FP8 layers.

    Raises:
        ConfigError: The products are wrong even with slow accumulation.
    """
    choices = []
    for product in products(decoder, size, caption_tokens):
        choice = _measure(product, decoder.dtype, timer, multiply)
        for layer in product.layers:
            layer.fast_accumulation = choice.is_fast
        if not choice.slow.error <= MAX_ERROR:
            raise ConfigError(f"PyTorch computes FP8 products incorrectly on this device: {choice}. Update PyTorch.")
        choices.append(choice)
    if choices:
        log.info("%s", "\n".join(map(str, choices)))  # one record: the server limits how often a line may log
    return tuple(choices)


def _measure(product: Product, dtype: torch.dtype, timer: Timer, multiply: ProductFunction) -> AccumulationChoice:
    layer = product.layers[0]
    scale = torch.tensor(4 / FP8_MAX, device=layer.weight.device)  # few of the random values saturate
    rows = to_fp8(torch.randn(product.rows, product.inputs, dtype=dtype, device=layer.weight.device), scale)
    checked = slice(None, None, -(-product.rows // _CHECKED_ROWS))
    expected = rows[checked].float() @ layer.weight.float().t() * layer.input_scale

    def measure(fast: bool) -> Measurement:
        error = relative_error(multiply(layer, rows, dtype, fast)[checked], expected)
        return Measurement(timer(lambda: multiply(layer, rows, dtype, fast)), error)

    fast = if_supported(lambda: measure(True))
    return AccumulationChoice(product, measure(False), fast)
