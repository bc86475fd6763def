"""FP4 linear layers: the format, the rounding, the layout of the scales, and the layer compared with its emulation."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engines.pid import FoldedDecoder, PidDecoder, fold
from engines.pid import fp4 as fp4_module
from engines.pid.fp4 import (
    BLOCK,
    FP4,
    Fp4Linear,
    block_scales,
    from_fp4,
    round_to_fp4,
    tensor_scale,
    tile_scales,
    to_fp4,
)
from engines.pid.fp8 import FP8
from engines.pid.quantised import quantise, quantised_layers, replace_with_quantised_layers
from engines.pid.sampler import MODEL_TIMESTEPS
from tests.tiny import TINY

NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
ONE = torch.ones(())


def layer(inputs: int = 64, outputs: int = 48, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)


def rows(count: int, inputs: int) -> Tensor:
    """Return random rows whose blocks differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, inputs, generator=generator) * torch.logspace(-1, 3, inputs)


def rounded_with_scale_one(*values: float) -> list[float]:
    x = torch.zeros(1, BLOCK)
    x[0, : len(values)] = torch.tensor(values)
    scale = torch.ones(1, 1).to(FP8)
    rounded = round_to_fp4(x, scale, ONE)
    assert torch.equal(from_fp4(to_fp4(x, scale, ONE), scale, ONE), rounded)
    return rounded[0, : len(values)].tolist()


def test_numbers_in_the_format_are_not_changed():
    assert rounded_with_scale_one(*NUMBERS) == list(NUMBERS)
    assert rounded_with_scale_one(*(-number for number in NUMBERS)) == [-number for number in NUMBERS]


def test_the_nearest_number_is_chosen_and_the_even_one_of_two():
    for lower, upper in pairwise(NUMBERS):
        middle = (lower + upper) / 2
        below, above = np.nextafter(np.float32(middle), np.float32([-1, 9]))
        even = lower if NUMBERS.index(lower) % 2 == 0 else upper
        assert rounded_with_scale_one(float(below), middle, float(above)) == [lower, even, upper]


def test_larger_values_saturate():
    assert rounded_with_scale_one(6.5, -7.0, 1e30, math.inf, -math.inf) == [6.0, -6.0, 6.0, 6.0, -6.0]


def test_the_rounding_is_that_of_another_implementation():
    x = rows(40, 128)
    scale = tensor_scale(x.abs().max())
    stored = block_scales(x, scale)
    factors = (stored.float() * scale).repeat_interleave(BLOCK, dim=1)
    expected = (x / factors).numpy().astype(ml_dtypes.float4_e2m1fn)
    assert torch.equal(round_to_fp4(x, stored, scale), torch.from_numpy(expected.astype(np.float32)) * factors)
    codes = expected.view(np.uint8)
    packed = torch.from_numpy(codes[:, ::2] | (codes[:, 1::2] << 4))
    assert torch.equal(to_fp4(x, stored, scale).view(torch.uint8), packed)


def test_a_block_has_the_scale_that_maps_its_largest_value_to_six():
    x = torch.zeros(1, 3 * BLOCK)
    x[0, 0], x[0, BLOCK + 3] = -12.0, 0.75
    assert block_scales(x, ONE).float().tolist() == [[2.0, 0.125, 0.0]]
    assert torch.equal(round_to_fp4(x, block_scales(x, ONE), ONE), x)  # the block of zeros stays zero


@pytest.mark.parametrize("largest", [1e-3, 0.7, 42.0, 6 * 448.0, 6 * 449.0])
def test_the_tensor_scale_is_a_power_of_two_that_brings_block_scales_into_range(largest: float):
    scale = Fraction(tensor_scale(largest).item())
    assert (scale.numerator, scale.denominator) in {(2**k, 1) for k in range(9)} | {(1, 2**k) for k in range(25)}
    assert Fraction(largest) / 6 / scale <= 448 < 2 * Fraction(largest) / 6 / scale or scale == Fraction(1, 2**24)


def test_blocks_far_below_the_largest_value_become_zero_instead_of_nan():
    x = torch.full((1, 2 * BLOCK), 1e-9)
    x[0, 0] = 1e4
    rounded = round_to_fp4(x, block_scales(x, tensor_scale(1e4)), tensor_scale(1e4))
    assert rounded.isfinite().all()
    assert not rounded[0, BLOCK:].any()


def test_block_scales_are_tiled_as_cublas_documents_it():
    outputs, columns = 200, 6  # not multiples of the tile
    scale = torch.randn(outputs, columns).abs().to(FP8)
    tiled = tile_scales(scale).view(torch.uint8)
    assert tiled.numel() == 256 * 8
    expected = torch.zeros(256 * 8, dtype=torch.uint8)
    for row in range(outputs):
        for column in range(columns):
            tile = row // 128 * 2 + column // 4
            offset = row % 32 * 16 + row % 128 // 32 * 4 + column % 4
            expected[512 * tile + offset] = scale.view(torch.uint8)[row, column]
    assert torch.equal(tiled, expected)


class TestLayer:
    @pytest.mark.parametrize("bias", [True, False])
    def test_the_output_is_close_to_that_of_the_original_layer(self, bias: bool):
        x = torch.randn(5, 7, 64)
        exact, rounded = layer(bias=bias)(x), Fp4Linear.quantise(layer(bias=bias), x.abs().max().item())(x)
        error = (rounded - exact).norm() / exact.norm()
        assert 0.02 < error < 0.15  # one bit of mantissa on both sides

    def test_it_multiplies_rounded_inputs_and_rounded_weights(self):
        original = layer(bias=False)
        quantised, x = Fp4Linear.quantise(original, 4.0), torch.randn(3, 64)
        weight = from_fp4(quantised.weight, quantised.block_scale, quantised.weight_scale)
        inputs = round_to_fp4(x, block_scales(x, quantised.input_scale), quantised.input_scale)
        torch.testing.assert_close(quantised(x), inputs @ weight.t())
        assert (weight - original.weight).norm() < 0.1 * original.weight.norm()

    def test_inputs_beyond_the_calibrated_range_are_as_accurate_as_those_within(self):
        quantised, x = Fp4Linear.quantise(layer(), 1.0), torch.randn(40, 64).clamp(-1, 1)
        errors = [(quantised.round(factor * x) / factor - x).norm() / x.norm() for factor in (1, 16)]
        assert errors[1] == pytest.approx(errors[0].item(), rel=0.02)
        assert (quantised.round(10_000 * x) / 10_000 - x).norm() / x.norm() > 2 * errors[0]  # saturates

    def test_the_scales_of_weights_have_less_error_than_those_for_the_largest_value(self):
        weight = layer(256, 64).weight
        quantised = Fp4Linear.quantise(layer(256, 64), 1.0)
        scale = quantised.weight_scale
        simple = round_to_fp4(weight, block_scales(weight, scale), scale)
        errors = [
            (values - weight).unflatten(1, (-1, BLOCK)).norm(dim=2)
            for values in (quantised.dequantised(torch.float32), simple)
        ]
        assert (errors[0] <= errors[1] + 1e-6).all()
        assert errors[0].norm() < 0.9 * errors[1].norm()

    def test_dequantised_weights_are_exact_in_every_dtype(self):
        quantised = Fp4Linear.quantise(layer(), 4.0)
        exact = quantised.dequantised(torch.float32)
        for dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(quantised.dequantised(dtype).float(), exact)
            assert torch.equal(quantised.round(exact.to(dtype)).float(), quantised.round(exact))

    def test_a_layer_has_four_and_a_half_bits_per_weight(self):
        state = Fp4Linear.quantise(layer(256, 64, bias=False), 1.0).state_dict()
        assert (state["weight"].dtype, tuple(state["weight"].shape)) == (FP4, (64, 128))
        assert sum(state[name].nbytes for name in ("weight", "block_scale")) == 256 * 64 * 4.5 / 8
        assert "tiled_scale" not in state

    def test_only_inputs_that_fill_blocks_are_supported(self):
        assert Fp4Linear.supports(layer(64))
        assert not Fp4Linear.supports(layer(24))

    def test_a_layer_of_zeros_computes_zeros(self):
        zero = nn.Linear(32, 16, bias=False).requires_grad_(False)
        zero.weight.zero_()
        assert torch.equal(Fp4Linear.quantise(zero, 0.0)(torch.ones(1, 32)), torch.zeros(1, 16))

    def test_the_matrix_product_gets_operands_that_describe_the_emulated_values(self, monkeypatch: pytest.MonkeyPatch):
        """No machine of the tests has FP4 tensor cores: the operands are multiplied here as cuBLAS documents it."""

        def multiply(a: Tensor, b: Tensor, *, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype) -> Tensor:
            operands = [untile(a, scale_a), untile(b.t(), scale_b)]
            return (operands[0] @ operands[1].t()).to(out_dtype)

        monkeypatch.setattr(torch, "_scaled_mm", multiply)
        quantised, x = Fp4Linear.quantise(layer(64, 48), 4.0), torch.randn(3, 50, 64)
        product = quantised.multiply(x)
        assert product.shape == (3, 50, 48)
        torch.testing.assert_close(product, quantised.emulate(x))

    @pytest.mark.parametrize(
        ("capability", "inputs", "outputs", "expected"),
        [
            ((10, 0), 64, 48, True),
            ((12, 0), 64, 48, True),
            ((9, 0), 64, 48, False),
            ((12, 0), 48, 48, False),
            ((12, 0), 64, 40, False),
        ],
    )
    def test_products_need_tensor_cores_and_sides_that_they_support(
        self, capability: tuple[int, int], inputs: int, outputs: int, expected: bool, monkeypatch: pytest.MonkeyPatch
    ):
        properties = type("Properties", (), {"major": capability[0], "minor": capability[1]})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
        quantised = Fp4Linear.quantise(layer(inputs, outputs), 1.0)
        assert quantised.has_product(torch.device("cuda")) is expected
        assert not quantised.has_product(torch.device("cpu"))


def untile(packed: Tensor, tiled: Tensor) -> Tensor:
    """Return the float32 values of FP4 numbers [rows, columns / 2] whose block scales are tiled."""
    count, columns = packed.shape[0], packed.shape[1] // 8
    bits, row = tiled.view(torch.uint8), torch.arange(count)[:, None]
    column, width = torch.arange(columns), -(-columns // 4)
    position = 512 * (row // 128 * width + column // 4) + row % 32 * 16 + row % 128 // 32 * 4 + column % 4
    return from_fp4(packed, bits[position].view(FP8), torch.ones(()))


class TestNetwork:
    NAMES = ("patch_blocks.0.attn.qkv_x", "pixel_blocks.0.compress_to_attn")

    @pytest.fixture
    def network(self) -> FoldedDecoder:
        torch.manual_seed(0)
        network = fold(PidDecoder(TINY), MODEL_TIMESTEPS)
        quantise(network, {self.NAMES[0]: 3.0}, Fp4Linear)
        quantise(network, {self.NAMES[1]: 3.0})
        return network

    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_layers_of_both_kinds_are_restored_from_a_state_dictionary(self, network: FoldedDecoder, device: str):
        with torch.device(device):
            restored = FoldedDecoder(TINY, MODEL_TIMESTEPS)
        replace_with_quantised_layers(restored, network.state_dict())
        restored.load_state_dict(network.state_dict(), strict=True, assign=True)
        assert list(quantised_layers(restored, Fp4Linear)) == [self.NAMES[0]]
        assert not any(tensor.is_meta for tensor in (*restored.parameters(), *restored.buffers()))
        layers: list[Any] = [module.get_submodule(self.NAMES[0]) for module in (network, restored)]
        assert torch.equal(layers[0].tiled_scale.view(torch.uint8), layers[1].tiled_scale.view(torch.uint8))
        x = torch.randn(2, 48)
        assert torch.equal(layers[0](x), layers[1](x))

    def test_the_compiled_layer_computes_the_same(self, network: FoldedDecoder):
        quantised: Any = network.get_submodule(self.NAMES[0])
        x = torch.randn(5, 48)
        assert torch.equal(torch.compile(quantised, backend="aot_eager", fullgraph=True)(x), quantised(x))
        assert fp4_module.fp4_round(x, quantised.input_scale).shape == x.shape
