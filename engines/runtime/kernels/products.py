"""Choice between fast and slow accumulation in the FP8 matrix products on a device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from engines.accuracy import relative_error
from engines.pid.config import PATCH_PIXELS
from engines.pid.fold import FoldedDecoder
from engines.pid.fp8 import FP8_MAX, Fp8Linear, to_fp8
from engines.runtime.kernels.choice import Candidate, Operation
from engines.size import Size

# Limit of the error of fast accumulation, in the Frobenius norm and relative to the exact product of the same operands.
# Hopper's tensor cores keep about 14 bits of a sum; slow accumulation adds it to a float32 number every few products.
# Rounding both operands to FP8, with a relative error of up to 2⁻⁴ each, already changes a product by 3.7 %. A further,
# independent error of 2⁻⁷ raises that to 3.8 %. It includes rounding the result to bfloat16, about 0.2 %.
MAX_ERROR = 2.0**-7
_CHECKED_ROWS = 256  # the reference in float32 needs 16 times the memory of its FP8 operands

ProductFunction = Callable[[Fp8Linear, Tensor, torch.dtype, bool], Tensor]  # as Fp8Linear.product


@dataclass(frozen=True)
class Product:
    """Shape of a matrix product, [rows, inputs] by [inputs, outputs], and the layers that compute it for one image."""

    rows: int
    inputs: int
    outputs: int
    layers: tuple[Fp8Linear, ...]


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


def product_operations(
    decoder: FoldedDecoder, size: Size, caption_tokens: int, multiply: ProductFunction = Fp8Linear.product
) -> Iterator[Operation]:
    """Yield the FP8 products of one image, with random inputs, to choose their accumulation.

    Args:
        decoder: The network, on a device that multiplies FP8 matrices.
        size: Output size of the image.
        caption_tokens: Length of the caption.
        multiply: Computes the product of a layer.
    """
    for product in products(decoder, size, caption_tokens):
        yield _operation(product, decoder.dtype, multiply)


def _operation(product: Product, dtype: torch.dtype, multiply: ProductFunction) -> Operation:
    layer = product.layers[0]
    scale = torch.tensor(4 / FP8_MAX, device=layer.weight.device)  # few of the random values saturate
    rows = to_fp8(torch.randn(product.rows, product.inputs, dtype=dtype, device=layer.weight.device), scale)
    checked = slice(None, None, -(-product.rows // _CHECKED_ROWS))
    expected = rows[checked].float() @ layer.weight.float().t() * layer.input_scale

    def install(fast: bool) -> None:
        for layer in product.layers:
            layer.fast_accumulation = fast

    accumulations = {"slow accumulation": False, "fast": True}  # slow is never less accurate
    return Operation(
        name="FP8 product",
        shape=f"{product.rows}x{product.inputs} and {product.inputs}x{product.outputs}",
        flops=2 * product.rows * product.inputs * product.outputs,
        nbytes=rows.nbytes + layer.weight.nbytes + product.rows * product.outputs * dtype.itemsize,
        candidates={
            name: Candidate(partial(multiply, layer, rows, dtype, fast), partial(install, fast), MAX_ERROR)
            for name, fast in accumulations.items()
        },
        error=lambda result: relative_error(result[checked], expected),
    )
