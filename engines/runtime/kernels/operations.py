"""The operations of a decoder that have several implementations, in the order in which they are chosen."""

from __future__ import annotations

from collections.abc import Iterator

from engines.pid.fold import FoldedDecoder
from engines.pid.fp8 import has_fp8_products
from engines.runtime.kernels.adapter import adapter_operations
from engines.runtime.kernels.attention import attention_operations
from engines.runtime.kernels.choice import Operation
from engines.runtime.kernels.mlp import mlp_operations
from engines.runtime.kernels.pixels import pixel_operations
from engines.runtime.kernels.products import product_operations
from engines.runtime.kernels.workload import Workload


def decoder_operations(decoder: FoldedDecoder, workload: Workload) -> Iterator[Operation]:
    """Yield the operations of a decoder on a CUDA device.

    The products come first, because the attentions and MLPs that are measured contain them.
    """
    if has_fp8_products(decoder.y_pos_embedding.device):
        yield from product_operations(decoder, workload.size, workload.caption_tokens)
    yield from attention_operations(decoder, workload)
    yield from mlp_operations(decoder, workload)
    yield from pixel_operations(decoder, workload)
    yield from adapter_operations(decoder, workload)
