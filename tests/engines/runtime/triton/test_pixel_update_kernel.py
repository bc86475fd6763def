"""The second half of a pixel block computed by the kernel, against `PixelBlock.update`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from engines.pid.blocks import PixelBlock
from engines.pid.chunks import chunks
from engines.pid.config import PidConfig
from engines.runtime.triton.pixel_update import CONFIGS, PixelConfig, gelu, update
from tests.tiny import TINY

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # by NumPy
RELEASED = replace(TINY, pixel_channels=16)
CONFIG = PixelConfig(tile=64, tiles=2)


def pixel_block(config: PidConfig, device: torch.device, dtype: torch.dtype = torch.float32) -> PixelBlock:
    torch.manual_seed(0)
    block = PixelBlock(config, live=False)
    for parameter in block.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return block.to(device, dtype).requires_grad_(False)


def random_inputs(
    config: PidConfig, device: torch.device, batch: int = 2, tokens: int = 3
) -> tuple[Tensor, Tensor, Tensor]:
    part = 256 * config.pixel_channels
    shapes = (batch, tokens, 256, config.pixel_channels), (batch, tokens, 4 * part), (batch, tokens, part)
    pixels, modulation, expanded = (torch.randn(shape, device=device) for shape in shapes)
    return pixels, modulation, expanded


@pytest.mark.parametrize("channels", [4, 8, 12, 16, 32])
def test_float32(channels: int, device: torch.device):
    config = replace(TINY, pixel_channels=channels)
    block, (pixels, modulation, expanded) = pixel_block(config, device), random_inputs(config, device)
    expected = block.update(pixels, modulation, expanded)
    update(CONFIG, block, pixels, modulation, expanded)
    torch.testing.assert_close(pixels, expected, rtol=2e-3, atol=2e-3)  # the error of GELU


@pytest.mark.parametrize("config", sorted({c for configs in CONFIGS.values() for c in configs}, key=str), ids=str)
def test_bf16_is_at_least_as_accurate_as_pytorch(config: PixelConfig, device: torch.device):
    block, inputs = pixel_block(RELEASED, device, torch.bfloat16), random_inputs(RELEASED, device, tokens=1)
    pixels, modulation, expanded = (tensor.bfloat16() for tensor in inputs)
    exact = (
        pixel_block(RELEASED, device, torch.bfloat16)
        .float()
        .update(pixels.float(), modulation.float(), expanded.float())
    )
    rounded = block.update(pixels, modulation, expanded)
    update(config, block, pixels, modulation, expanded)
    assert (pixels.float() - exact).square().mean() <= (rounded.float() - exact).square().mean()


def test_a_chunk_of_tokens_leaves_the_others_unchanged(device: torch.device):
    block, (pixels, modulation, expanded) = pixel_block(RELEASED, device), random_inputs(RELEASED, device, tokens=5)
    before = pixels.clone()
    _, (chunk, modulation, expanded), _ = chunks(3, pixels, modulation, expanded)  # tokens 2 and 3 of both images
    expected = block.update(chunk, modulation, expanded)
    update(CONFIG, block, chunk, modulation.contiguous(), expanded.contiguous())
    torch.testing.assert_close(pixels[:, 2:4], expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(pixels[:, [0, 1, 4]], before[:, [0, 1, 4]], rtol=0, atol=0)


def test_large_values(device: torch.device):
    block, (pixels, modulation, expanded) = pixel_block(RELEASED, device), random_inputs(RELEASED, device)
    pixels, modulation = 1e4 * pixels, 100 * modulation
    expected = block.update(pixels, modulation, expanded)
    update(CONFIG, block, pixels, modulation, expanded)
    torch.testing.assert_close(pixels, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_pixels_of_zeros(device: torch.device):
    block, (pixels, modulation, _) = pixel_block(RELEASED, device), random_inputs(RELEASED, device)
    pixels, expanded = torch.zeros_like(pixels), torch.zeros_like(pixels).flatten(2)
    expected = block.update(pixels, modulation, expanded)
    update(CONFIG, block, pixels, modulation, expanded)
    torch.testing.assert_close(pixels, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_stays_in_its_pixel(value: float, device: torch.device):
    block, (pixels, modulation, expanded) = pixel_block(RELEASED, device), random_inputs(RELEASED, device)
    pixels[1, 2, 77, 5] = value
    update(CONFIG, block, pixels, modulation, expanded)
    finite = pixels.isfinite().all(dim=-1)
    assert not finite[1, 2, 77]
    assert finite.sum() == finite.numel() - 1


def test_tensors_that_are_not_contiguous_are_rejected(device: torch.device):
    block, (pixels, modulation, expanded) = pixel_block(RELEASED, device), random_inputs(RELEASED, device)
    with pytest.raises(ValueError, match="contiguous"):
        update(CONFIG, block, pixels.transpose(2, 3).contiguous().transpose(2, 3), modulation, expanded)
    with pytest.raises(ValueError, match="contiguous"):
        update(CONFIG, block, pixels[:, :2], modulation[:, :2], expanded[:, :2].contiguous())


@pytest.mark.parametrize("compiled", [False, True])
def test_as_the_kernel_of_a_block(compiled: bool, device: torch.device):
    block, (pixels, _, _) = pixel_block(RELEASED, device), random_inputs(RELEASED, device, tokens=4)
    tokens = torch.randn(2, 4, RELEASED.hidden_size, device=device)
    attended = torch.randn(2, 4, RELEASED.pixel_attention_size, device=device)
    expected = block.expand(block.modulation_out, pixels, tokens, attended)
    block.kernel = partial(update, CONFIG)

    def expand_in_place(*tensors: Tensor) -> None:
        block.expand_in_place(block.modulation_out, *tensors)

    run = torch.compile(expand_in_place, fullgraph=True, backend="aot_eager") if compiled else expand_in_place
    for chunk in chunks(2, pixels, tokens, attended):
        run(*chunk)
    torch.testing.assert_close(pixels, expected, rtol=2e-3, atol=2e-3)


@triton.jit
def _gelu(x, out, count, block: tl.constexpr):
    index = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(out + index, gelu(tl.load(x + index, index < count, 0.0)), index < count)


def test_the_error_of_gelu_for_every_bf16_input(device: torch.device):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    x = x[x.isfinite()].to(device)
    out = torch.empty_like(x)
    _gelu[(triton.cdiv(x.numel(), 1024),)](x, out, x.numel(), block=1024)
    exact_x = x.double()
    exact = exact_x * torch.erfc(-exact_x / 2**0.5) / 2  # 1 + erf would cancel for negative x
    assert ((out - exact).abs() <= 2**-10 * exact.abs() + 1e-6 * exact_x.abs()).all()
