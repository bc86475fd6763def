"""FP8 linear layers: scales, rounding, and the FP8 matrix product compared with its emulation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from engines.pid import FoldedDecoder, PidDecoder, fold
from engines.pid.fp8 import (
    FP8_MAX,
    Fp8Linear,
    power_of_two_scale,
    to_fp8,
)
from engines.pid.quantised import quantise, replace_with_quantised_layers
from engines.pid.sampler import MODEL_TIMESTEPS
from engines.size import Size
from tests.tiny import TINY


def layer(inputs: int = 32, outputs: int = 48, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias)


def smallest_power_of_two(largest: float) -> Fraction:
    """Return the smallest power of two s ≥ 2⁻²⁴ with largest / s ≤ FP8_MAX, in exact arithmetic."""
    scale = Fraction(1, 2**24)
    while Fraction(largest) > scale * int(FP8_MAX):
        scale *= 2
    return scale


def around(values: Tensor) -> Tensor:
    """Return the values and their neighbours in float32."""
    infinity = torch.full_like(values, math.inf)
    return torch.cat((values, values.nextafter(infinity), values.nextafter(-infinity)))


EXPONENTS = torch.ldexp(torch.ones(277, dtype=torch.float64), torch.arange(-149, 128)).float()  # all of float32
BOUNDARIES = torch.ldexp(torch.full((267,), FP8_MAX, dtype=torch.float64), torch.arange(-148, 119)).float()


@pytest.mark.parametrize(
    "largest",
    [
        around(EXPONENTS),
        around(BOUNDARIES),
        torch.tensor([448.0, 449.0, 1.0, 3e-3, 1e4, 1e-45, torch.finfo(torch.float32).max]),
    ],
    ids=["powers of two", "powers of two times 448", "others"],
)
def test_a_scale_is_the_smallest_power_of_two_that_fits_the_largest_value(largest: Tensor):
    largest = largest[largest.isfinite() & (largest > 0)]
    scale = power_of_two_scale(largest)
    assert scale.dtype == torch.float32
    assert [Fraction(s) for s in scale.tolist()] == [smallest_power_of_two(value) for value in largest.tolist()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_scale_does_not_depend_on_the_dtype_of_the_largest_value(dtype: torch.dtype):
    largest = torch.tensor([[0.0, 1e-7], [448.0, 450.0]]).to(dtype)
    assert torch.equal(power_of_two_scale(largest), power_of_two_scale(largest.float()))


def test_a_channel_of_zeros_has_a_non_zero_scale():
    fp8_layer = Fp8Linear.quantise(nn.Linear(16, 16, bias=False).requires_grad_(False), 0.0)
    with torch.no_grad():
        zero = Fp8Linear.quantise(nn.Linear(16, 16, bias=False).apply(lambda m: m.weight.data.zero_()), 1.0)
    assert fp8_layer.input_scale == 1
    assert torch.equal(zero(torch.ones(1, 16)), torch.zeros(1, 16))


def test_values_beyond_the_calibrated_range_saturate_instead_of_becoming_nan():
    x = torch.tensor([1.0, -1e30, float("inf")])
    assert to_fp8(x, torch.tensor(1.0)).float().tolist() == [1.0, -FP8_MAX, FP8_MAX]


@pytest.mark.parametrize("bias", [True, False])
def test_the_output_is_close_to_that_of_the_original_layer(bias: bool):
    x = torch.randn(5, 7, 32)
    exact, rounded = layer(bias=bias)(x), Fp8Linear.quantise(layer(bias=bias), x.abs().max().item())(x)
    error = (rounded - exact).norm() / exact.norm()
    assert 1e-3 < error < 0.06  # three mantissa bits on both sides


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fp8_matrix_product_equals_its_emulation(dtype: torch.dtype):
    fp8_layer, x = Fp8Linear.quantise(layer(), 4.0), torch.randn(3, 5, 32).to(dtype)
    if fp8_layer.bias is not None:
        fp8_layer.bias.data = fp8_layer.bias.data.to(dtype)
    expected, actual = fp8_layer(x), fp8_layer.multiply(x)
    assert actual.dtype == dtype
    assert actual.shape == (3, 5, 48)
    torch.testing.assert_close(actual.float(), expected.float(), rtol=2 * torch.finfo(dtype).eps, atol=0.02)


@pytest.mark.parametrize("supported", [False, True], ids=["emulated", "product"])
def test_the_scales_of_the_channels_and_the_bias_can_be_applied_later(supported: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("engines.pid.fp8.has_fp8_products", lambda device: supported)
    wide = layer().requires_grad_(False)
    wide.weight[::3] *= 10  # these channels have another scale
    fp8_layer, x = Fp8Linear.quantise(wide, 4.0), torch.randn(3, 5, 32)
    assert len(fp8_layer.weight_scale.unique()) > 1
    torch.testing.assert_close(fp8_layer.unscaled(x) * fp8_layer.weight_scale + wide.bias, fp8_layer(x))


@pytest.mark.parametrize("fast", [False, True])
def test_the_choice_of_accumulation_does_not_break_the_compiled_graph(fast: bool):
    fp8_layer, x = Fp8Linear.quantise(layer(), 4.0), torch.randn(5, 32)
    fp8_layer.fast_accumulation = fast
    graphs = []

    def backend(graph: torch.fx.GraphModule, _inputs: object) -> Callable:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(fp8_layer.multiply, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), fp8_layer.multiply(x))
    nodes = [(node, node.kwargs) for graph in graphs for node in graph.graph.nodes]
    assert [kwargs["use_fast_accum"] for _, kwargs in nodes if "use_fast_accum" in kwargs] == [fast]
    assert not any("ones" in str(node.target) for node, _ in nodes)  # the scales need no work in a step


def test_scaling_is_exact_in_every_dtype():
    fp8_layer = Fp8Linear.quantise(layer(bias=False), 4.0)
    weight = fp8_layer.weight.float() * fp8_layer.weight_scale[:, None]
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(fp8_layer.weight.to(dtype) * fp8_layer.weight_scale.to(dtype)[:, None], weight.to(dtype))
        assert torch.equal(weight.to(dtype).float(), weight)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return fold(PidDecoder(replace(TINY, pixel_injection=True, gate_per_channel=False)), MODEL_TIMESTEPS)


def test_a_quantised_network_is_restored_from_its_state_dictionary(network: nn.Module):
    names = ["patch_blocks.0.attn.qkv_x", "pixel_blocks.0.modulation_out", "pixel_blocks.0.compress_to_attn"]
    restored = fold(PidDecoder(network.config), MODEL_TIMESTEPS)
    quantise(network, dict.fromkeys(names, 3.0))
    state: dict[str, Tensor] = network.state_dict()
    replace_with_quantised_layers(restored, state)
    restored.load_state_dict(state, strict=True)
    assert {name for name, module in restored.named_modules() if isinstance(module, Fp8Linear)} == set(names)
    assert restored.get_submodule(names[0]).weight.dtype == torch.float8_e4m3fn
    assert set(restored.state_dict()) == set(state)
    x = torch.randn(1, 3, 64, 64)
    conditioning = network.condition(torch.randn(1, 16, 2, 2), torch.zeros(1, 3, 24), Size(64, 64))
    expected = network.velocity(x, MODEL_TIMESTEPS[0], conditioning, 0.0)
    assert torch.equal(restored.velocity(x, MODEL_TIMESTEPS[0], conditioning, 0.0), expected)


def test_a_network_loaded_from_the_meta_device_has_no_tensors_left_there(network: nn.Module):
    name = "patch_blocks.0.attn.qkv_x"
    quantise(network, {name: 3.0})
    with torch.device("meta"):
        restored = FoldedDecoder(network.config, MODEL_TIMESTEPS)
    replace_with_quantised_layers(restored, network.state_dict())
    restored.load_state_dict(network.state_dict(), strict=True, assign=True)
    x = torch.randn(2, network.config.hidden_size)
    for module in (network, restored):
        assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
    layers = [module.get_submodule(name) for module in (network, restored)]
    assert torch.equal(layers[0].multiply(x), layers[1].multiply(x))


def test_only_linear_layers_can_be_quantised(network: nn.Module):
    with pytest.raises(TypeError, match="RMSNorm"):
        quantise(network, {"patch_blocks.0.norm_x1": 1.0})
