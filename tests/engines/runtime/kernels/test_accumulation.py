"""Choice of the accumulation of FP8 products, with products of a given error and a timer with given durations."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engines.accuracy import relative_error
from engines.compile.planning.layer_rules import assign_rules, linear_layers
from engines.compile.variants import cast
from engines.errors import ConfigError
from engines.pid import FoldedDecoder, PidDecoder, fold
from engines.pid.fp8 import Fp8Linear, quantise, to_fp8
from engines.pid.sampler import MODEL_TIMESTEPS
from engines.runtime.kernels.accumulation import MAX_ERROR, ProductFunction, choose_accumulation, products
from engines.runtime.kernels.timing import cuda_seconds
from engines.size import Size
from tests.tiny import TINY

SIZE, CAPTION = Size(64, 96), 5
FASTER, SLOWER = 0.5, 2.0


@pytest.fixture
def decoder() -> FoldedDecoder:
    torch.manual_seed(0)
    network = fold(PidDecoder(TINY), MODEL_TIMESTEPS)
    layers = [name for name, rule in assign_rules(linear_layers(network), ()).items() if rule.fp8]
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


def timer(fast: float) -> Callable[[Callable[[], object]], float]:
    """Return a timer by which slow accumulation needs 1 s and fast accumulation `fast` s; fast is measured first."""
    durations = iter([fast, 1.0] * 100)

    def time(work: Callable[[], object]) -> float:
        work()
        return next(durations)

    return time


@pytest.mark.parametrize(
    ("error", "seconds", "fast"),
    [
        (0.5 * MAX_ERROR, FASTER, True),
        (-0.5 * MAX_ERROR, FASTER, True),
        (1.5 * MAX_ERROR, FASTER, False),
        (0.5 * MAX_ERROR, SLOWER, False),
        (0.5 * MAX_ERROR, 0.99, False),  # within the noise of the measurement
        (math.nan, FASTER, False),
        (math.inf, FASTER, False),
    ],
)
def test_fast_accumulation_is_used_if_it_is_faster_and_accurate(
    decoder: FoldedDecoder, error: float, seconds: float, fast: bool
):
    choices = choose_accumulation(decoder, SIZE, CAPTION, timer(seconds), with_error(error))
    assert {choice.is_fast for choice in choices} == {fast}
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
    assert choose_accumulation(network, SIZE, CAPTION, timer(FASTER), with_error(0)) == ()


def test_the_choices_are_one_log_record_with_one_line_per_product(
    decoder: FoldedDecoder, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.INFO):
        choices = choose_accumulation(decoder, SIZE, CAPTION, timer(FASTER), with_error(0.004))
    (message,) = caplog.messages
    lines = message.splitlines()
    assert lines == [str(choice) for choice in choices]
    assert lines[0] == (
        "FP8 product of 24x48 and 48x2048 (layers: 1): slow accumulation 1e+03 ms with an error of 0.00%, "
        "fast 500 ms with an error of 0.40%; using fast"
    )


def test_slow_accumulation_is_used_if_the_device_does_not_support_the_other(decoder: FoldedDecoder):
    def multiply(layer: Fp8Linear, rows: Tensor, dtype: torch.dtype, fast: bool) -> Tensor:
        if fast:
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")
        return with_error(0)(layer, rows, dtype, fast)

    choices = choose_accumulation(decoder, SIZE, CAPTION, timer(1.0), multiply)
    assert not any(choice.is_fast for choice in choices)
    assert "fast not supported; using slow" in str(choices[0])


@pytest.mark.parametrize("error", [torch.AcceleratorError("illegal memory access"), torch.OutOfMemoryError("full")])
def test_a_broken_or_full_device_is_not_mistaken_for_an_unsupported_product(decoder: FoldedDecoder, error: Exception):
    def multiply(*_arguments: object) -> Tensor:
        raise error

    with pytest.raises(type(error)):
        choose_accumulation(decoder, SIZE, CAPTION, timer(FASTER), multiply)


@pytest.mark.parametrize("slow_error", [math.nan, 0.1])
def test_wrong_products_are_an_error(decoder: FoldedDecoder, slow_error: float):
    with pytest.raises(ConfigError, match="computes FP8 products incorrectly"):
        choose_accumulation(decoder, SIZE, CAPTION, timer(FASTER), with_error(math.nan, slow_error))


def test_the_products_of_pytorch_are_accurate(decoder: FoldedDecoder):
    choices = choose_accumulation(decoder, SIZE, CAPTION, timer(FASTER))
    assert all(choice.slow.error < 1e-5 for choice in choices)


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
    choices = choose_accumulation(decoder.to("cuda"), SIZE, CAPTION, cuda_seconds)
    assert all(choice.slow.error <= MAX_ERROR for choice in choices)
