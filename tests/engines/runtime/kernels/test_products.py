"""Choice of the accumulation of FP8 products, with products of a given error and a timer with given durations."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engines.accuracy import relative_error
from engines.compile.planning.layer_rules import assign_rules, linear_layers
from engines.compile.variants import cast
from engines.pid import FoldedDecoder, PidDecoder, fold
from engines.pid.fp8 import Fp8Linear, to_fp8
from engines.pid.quantised import quantise
from engines.pid.sampler import MODEL_TIMESTEPS
from engines.runtime.kernels.choice import Choice, choose
from engines.runtime.kernels.products import MAX_ERROR, ProductFunction, product_operations, products
from engines.runtime.kernels.timing import cuda_seconds
from engines.size import Size
from tests.engines.runtime.kernels.by_name import timer
from tests.tiny import TINY

SIZE, CAPTION = Size(64, 96), 5
FASTER, SLOWER = 0.5, 2.0


@pytest.fixture
def decoder() -> FoldedDecoder:
    torch.manual_seed(0)
    network = fold(PidDecoder(TINY), MODEL_TIMESTEPS)
    layers = [name for name, rule in assign_rules(linear_layers(network), ()).items() if rule.quantised]
    quantise(network, dict.fromkeys(layers, 4.0))
    return network


def fp8_layers(decoder: FoldedDecoder) -> dict[str, Fp8Linear]:
    return {name: layer for name, layer in decoder.named_modules() if isinstance(layer, Fp8Linear)}


def with_error(fast_error: float, slow_error: float = 0.0) -> ProductFunction:
    """Return a product whose error, relative to that in float32, depends on the accumulation."""

    def multiply(layer: Fp8Linear, rows: Tensor, dtype: torch.dtype, fast: bool) -> Tensor:
        product = rows.float() @ layer.weight.float().t() * layer.input_scale
        return (product * (1 + (fast_error if fast else slow_error))).to(dtype)

    return multiply


def choices(
    decoder: FoldedDecoder, seconds: float, multiply: ProductFunction = Fp8Linear.product
) -> tuple[Choice, ...]:
    return choose(
        product_operations(decoder, SIZE, CAPTION, multiply), timer(*[1.0, seconds] * 100)
    )  # slow accumulation first


@pytest.mark.parametrize(
    ("error", "seconds", "fast"),
    [
        (0.5 * MAX_ERROR, FASTER, True),
        (-0.5 * MAX_ERROR, FASTER, True),
        (1.5 * MAX_ERROR, FASTER, False),
        (0.5 * MAX_ERROR, SLOWER, False),
    ],
)
def test_fast_accumulation_is_used_if_it_is_faster_and_accurate(
    decoder: FoldedDecoder, error: float, seconds: float, fast: bool
):
    names = {choice.chosen for choice in choices(decoder, seconds, with_error(error))}
    assert names == {"fast" if fast else "slow accumulation"}
    chosen = {layer.fast_accumulation for layer in fp8_layers(decoder).values() if layer.has_tensor_core_sides}
    assert chosen == {fast}


def test_every_shape_of_one_image_is_measured_once(decoder: FoldedDecoder):
    found = products(decoder, SIZE, CAPTION)
    layers = [layer for product in found for layer in product.layers]
    assert len(layers) == len(set(layers)) > len(found)
    named = fp8_layers(decoder)
    assert set(layers) == {layer for layer in named.values() if layer.has_tensor_core_sides}
    rows = {layer: product.rows for product in found for layer in product.layers}
    tokens = SIZE.area // 256
    assert rows[named["patch_blocks.0.attn.qkv_x"]] == rows[named["patch_blocks.1.mlp_x.w2"]] == tokens
    assert rows[named["patch_blocks.0.attn.qkv_y"]] == rows[named["patch_blocks.0.mlp_y.w1"]] == CAPTION
    decoder.pixel_memory_budget = 1
    rows = {layer: product.rows for product in products(decoder, SIZE, CAPTION) for layer in product.layers}
    assert rows[named["pixel_blocks.0.modulation_in"]] == 1


def test_layers_without_tensor_core_sides_are_left_alone():
    network = fold(PidDecoder(replace(TINY, hidden_size=24, num_heads=3)), MODEL_TIMESTEPS)
    quantise(network, {"patch_blocks.0.attn.qkv_x": 4.0})
    assert choices(network, FASTER) == ()


def test_slow_accumulation_is_used_if_the_device_does_not_support_the_other(decoder: FoldedDecoder):
    def multiply(layer: Fp8Linear, rows: Tensor, dtype: torch.dtype, fast: bool) -> Tensor:
        if fast:
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")
        return with_error(0)(layer, rows, dtype, fast)

    assert {choice.chosen for choice in choices(decoder, FASTER, multiply)} == {"slow accumulation"}


def test_the_products_of_pytorch_are_accurate(decoder: FoldedDecoder):
    errors = [choice.measured["slow accumulation"].error for choice in choices(decoder, FASTER)]
    assert errors
    assert max(errors) < 1e-5


def test_an_error_at_the_limit_adds_little_to_that_of_rounding_the_operands():
    torch.manual_seed(0)
    x, weight = torch.randn(256, 1024), torch.randn(256, 1024)
    rounded = (to_fp8(x, torch.tensor(0.01)).float() @ to_fp8(weight, torch.tensor(0.01)).float().t()) * 0.01**2
    rounding = relative_error(rounded, x @ weight.t())
    assert rounding == pytest.approx(0.037, abs=0.001)
    assert math.hypot(rounding, MAX_ERROR) < 1.025 * rounding


@pytest.mark.gpu
def test_cuda_measures_every_product(decoder: FoldedDecoder):
    cast(decoder, torch.bfloat16)  # not the FP8 weights, as `to` would
    measured = choose(product_operations(decoder.to("cuda"), SIZE, CAPTION), cuda_seconds)
    assert measured
    assert all(choice.chosen for choice in measured)
