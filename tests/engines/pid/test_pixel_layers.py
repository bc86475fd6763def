"""The first and the last pixel layer, which avoid matrix products: same results, in one compiled kernel each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from engines.pid.config import PATCH, PATCH_PIXELS, PidConfig
from engines.pid.network import FinalLayer, PixelEmbedder
from engines.pid.positions import Geometry, make_geometry, pixel_axis, pixel_positions
from engines.size import Size
from tests.tiny import TINY

# Channels of the released decoders: Inductor unrolls sums of fewer than eight, and then fuses less.
CONFIG = replace(TINY, pixel_channels=PidConfig().pixel_channels)
SIZE = Size(64, 96)
TOKENS = SIZE.area // PATCH_PIXELS
CHANNELS = CONFIG.pixel_channels
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2}


@pytest.fixture
def geometry() -> Geometry:
    return make_geometry(CONFIG, SIZE, torch.device("cpu"))


def patches_and_pixels(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, TOKENS, 3 * PATCH_PIXELS).to(dtype), torch.randn(2, TOKENS, PATCH_PIXELS, CHANNELS).to(dtype)


def test_pixel_positions_combine_the_tables_of_column_and_row(geometry: Geometry):
    table = pixel_positions(geometry.pixels, torch.float32)
    by_column, by_row = (pixel_axis(side, CHANNELS // 2, torch.device("cpu")) for side in (SIZE.width, SIZE.height))
    for row, column in ((0, 0), (17, 3), (63, 95)):
        token = row // PATCH * (SIZE.width // PATCH) + column // PATCH
        pixel = table[token, row % PATCH * PATCH + column % PATCH]
        assert torch.equal(pixel, torch.cat((by_column[column], by_row[row])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pixel_embedder_is_a_linear_layer_plus_positions(geometry: Geometry, dtype: torch.dtype):
    layer, (patches, _) = PixelEmbedder(CHANNELS).to(dtype), patches_and_pixels(dtype)
    colours = patches.unflatten(2, (3, PATCH_PIXELS)).transpose(2, 3).double()
    linear = F.linear(colours, layer.proj.weight.double(), layer.proj.bias.double())
    expected = linear + pixel_positions(geometry.pixels, torch.float32).double()
    actual = layer(patches, geometry.pixels)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_final_layer_is_a_norm_and_a_linear_layer(dtype: torch.dtype):
    layer, (_, pixels) = FinalLayer(CHANNELS).to(dtype), patches_and_pixels(dtype)
    layer.norm.weight.data.uniform_(0.5, 2)
    normed = F.rms_norm(pixels.double(), (CHANNELS,), layer.norm.weight.double(), 1e-6)
    expected = F.linear(normed, layer.linear.weight.double(), layer.linear.bias.double()).transpose(2, 3).flatten(2)
    actual = layer(pixels)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def layers_with_inputs(device: str) -> dict[str, tuple[nn.Module, tuple[Any, ...]]]:
    geometry = make_geometry(CONFIG, SIZE, torch.device(device))
    patches, pixels = (tensor.to(device) for tensor in patches_and_pixels(torch.bfloat16))
    embedder, final = (layer.to(device, torch.bfloat16) for layer in (PixelEmbedder(CHANNELS), FinalLayer(CHANNELS)))
    return {"embedder": (embedder, (patches, geometry.pixels)), "final": (final, (pixels,))}


@pytest.mark.parametrize("kind", ["embedder", "final"])
def test_the_layers_compute_no_matrix_product(kind: str):
    layer, inputs = layers_with_inputs("cpu")[kind]
    with FlopCounterMode(display=False) as counter:  # counts only matrix products, convolutions and attention
        layer(*inputs)
    assert counter.get_total_flops() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["embedder", "final"])
def test_each_layer_is_compiled_to_one_kernel(kind: str):
    from torch._inductor import metrics

    torch.compiler.reset()
    layer, inputs = layers_with_inputs("cuda")[kind]
    compiled = torch.compile(layer, dynamic=False, fullgraph=True)
    metrics.reset()
    with torch.inference_mode(), torch.compiler.config.patch(force_disable_caches=True):
        compiled(*inputs)
    assert metrics.generated_kernel_count == 1
