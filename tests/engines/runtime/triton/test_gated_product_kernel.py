"""The gated product against the float32 network with the same rounding to FP8."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engines.accuracy import relative_error
from engines.pid.blocks import GatedMLP
from engines.pid.fp8 import FP8, FP8_MAX, Fp8Linear
from engines.pid.quantised import quantise
from engines.runtime.triton.gated_product import GatedConfig, gated_mlp, gated_product, supports

ONE_TILE_EACH = GatedConfig(rows=16, columns=16, inputs=32, warps=4, stages=2)
SEVERAL_TILES_EACH = GatedConfig(rows=16, columns=16, inputs=32, warps=4, stages=2, programs=3)
CONFIGS = (ONE_TILE_EACH, SEVERAL_TILES_EACH)


def make_mlp(width: int, inner: int, device: torch.device) -> GatedMLP:
    """Return an MLP in FP8 whose output channels have different scales."""
    torch.manual_seed(0)
    mlp = GatedMLP(width, inner)
    for layer in (mlp.w1, mlp.w3):
        layer.weight.data *= 2.0 ** torch.randint(-3, 3, (inner, 1))
    quantise(mlp, {"w1": 4.0, "w3": 4.0, "w2": 8.0})
    return mlp.to(device)


def inputs(rows: Tensor, mlp: GatedMLP) -> tuple[Tensor, ...]:
    """Return the tensors that the kernel computes the product of `rows` with."""
    w1, w2, w3 = mlp.w1, mlp.w2, mlp.w3
    return rows, w1.weight, w3.weight, w1.weight_scale, w3.weight_scale, w1.input_scale, w2.input_scale


def expected(rows: Tensor, mlp: GatedMLP) -> Tensor:
    """Return what the network passes to the product with w2, before rounding, in units of its input scale."""
    x = rows.float() * mlp.w1.input_scale
    w1, w3 = (layer.weight.float() * layer.weight_scale[:, None] for layer in (mlp.w1, mlp.w3))
    return F.silu(x @ w1.T) * (x @ w3.T) / mlp.w2.input_scale


def assert_rounded(result: Tensor, exact: Tensor) -> None:
    """Assert that each result in FP8 is as near to the exact value as a rounded one, but for float32 arithmetic."""
    exact = exact.clamp(-FP8_MAX, FP8_MAX)
    assert result.dtype == FP8
    assert result.shape == exact.shape
    error, least = ((x.float() - exact).abs() for x in (result, exact.to(FP8)))
    assert (error <= least + 1e-5 * (1 + exact.abs())).all()


def random_rows(count: int, width: int, device: torch.device) -> Tensor:
    return (torch.randn(count, width, device=device) * 64).to(FP8)


def test_rows_that_are_not_contiguous_are_rejected(device: torch.device):
    mlp = make_mlp(32, 16, device)
    with pytest.raises(ValueError, match="contiguous"):
        gated_product(*inputs(random_rows(8, 64, device)[:, ::2], mlp), CONFIGS[0].values)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("count", "width", "inner"), [(48, 64, 48), (150, 96, 32), (1, 32, 16), (18, 48, 80)])
def test_result_is_the_rounded_gated_product(
    config: GatedConfig, count: int, width: int, inner: int, device: torch.device
) -> None:
    mlp, rows = make_mlp(width, inner, device), random_rows(count, width, device)
    result = gated_product(*inputs(rows, mlp), config.values)
    assert result.float().unique().numel() > 10
    assert_rounded(result, expected(rows, mlp))


def test_columns_that_do_not_fill_a_tile(device: torch.device) -> None:
    mlp, rows = make_mlp(48, 48, device), random_rows(20, 48, device)
    config = GatedConfig(rows=16, columns=32, inputs=32, warps=4, stages=2)
    assert_rounded(gated_product(*inputs(rows, mlp), config.values), expected(rows, mlp))


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # of the interpreter
def test_huge_products_saturate(device: torch.device) -> None:
    mlp, rows = make_mlp(32, 32, device), random_rows(16, 32, device)
    for layer in (mlp.w1, mlp.w3):
        layer.weight_scale.fill_(2.0**60)  # the gated products exceed the range of float32
    result, exact = gated_product(*inputs(rows, mlp), ONE_TILE_EACH.values), expected(rows, mlp)
    assert exact.isinf().any()
    assert result.float().unique().tolist() == [-FP8_MAX, 0, FP8_MAX]
    assert_rounded(result, exact)


def test_zeros_stay_zeros(device: torch.device) -> None:
    mlp, rows = make_mlp(64, 32, device), torch.zeros(16, 64, device=device).to(FP8)
    assert (gated_product(*inputs(rows, mlp), ONE_TILE_EACH.values).float() == 0).all()


def test_nan_does_not_spread_to_other_rows(device: torch.device) -> None:
    mlp, rows = make_mlp(64, 32, device), random_rows(21, 64, device)
    clean = gated_product(*inputs(rows, mlp), ONE_TILE_EACH.values).float()
    broken = torch.tensor([3, 20], device=device)  # the last row is loaded for the rows beyond it as well
    rows = rows.float().index_put((broken, torch.tensor([5, 60], device=device)), torch.tensor(torch.nan)).to(FP8)
    result = gated_product(*inputs(rows, mlp), ONE_TILE_EACH.values).float()
    assert result[broken].isnan().all()
    others = torch.ones(21, dtype=torch.bool, device=device).index_fill(0, broken, False)
    assert torch.equal(result[others], clean[others])


def test_hook_computes_the_mlp(device: torch.device) -> None:
    mlp = make_mlp(48, 64, device)
    x = torch.randn(2, 5, 48, device=device)
    reference = mlp(x)
    mlp.kernel = functools.partial(gated_mlp, ONE_TILE_EACH)
    result = mlp(x)
    assert result.dtype == x.dtype
    assert relative_error(result, reference) < 0.01  # another order of summation can round to a different FP8 value


def test_hook_is_one_operator_for_torch_compile(device: torch.device) -> None:
    mlp = make_mlp(48, 64, device)
    mlp.kernel = functools.partial(gated_mlp, ONE_TILE_EACH)
    x = torch.randn(2, 5, 48, device=device)
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), mlp(x))


def test_fake_operator_has_the_shape_and_dtype_of_the_real_one(device: torch.device) -> None:
    mlp, rows = make_mlp(64, 32, device), random_rows(21, 64, device)
    arguments = (*inputs(rows, mlp), ONE_TILE_EACH.values)
    torch.library.opcheck(torch.ops.pid.gated_product.default, arguments, test_utils="test_faketensor")


def test_supports_layers_in_fp8_with_a_common_input_scale() -> None:
    cpu = torch.device("cpu")
    assert supports(make_mlp(48, 64, cpu))
    assert not supports(GatedMLP(48, 64))  # not quantised
    assert not supports(make_mlp(48, 56, cpu))  # sides that FP8 tensor cores do not support
    mlp = make_mlp(48, 64, cpu)
    mlp.w3.input_scale *= 2
    assert not supports(mlp)
    mlp = make_mlp(48, 64, cpu)
    mlp.w2 = Fp8Linear(64, 48, bias=True)
    assert not supports(mlp)
