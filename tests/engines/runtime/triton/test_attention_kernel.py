"""The attention kernel against PyTorch's attention in float32, and with values in FP8 against the FP8 emulation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engines.pid.fp8 import FP8, FP8_MAX
from engines.pid.fp8_attention import Fp8Attention, fp8_softmax_attention
from engines.runtime.triton.attention import MAX_BOUND, AttentionConfig, AttentionFormat, attend, attend_fp8, configs

CONFIG = AttentionConfig(queries=16, keys=32, warps=4, stages=2)
LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Mode:
    """Dtypes of the inputs, and the largest relative error of the result."""

    qk: torch.dtype
    v: torch.dtype
    error: float


FLOAT32 = Mode(torch.float32, torch.float32, 1e-5)
BF16 = Mode(torch.bfloat16, torch.bfloat16, 4e-3)
FP8_SCORES = Mode(FP8, torch.bfloat16, 4e-3)
FP8_ALL = Mode(FP8, FP8, 3e-2)  # the emulation rounds numerators relative to the maximum of all keys
MODES = [
    pytest.param(FLOAT32, id="float32"),
    pytest.param(BF16, id="bf16"),
    pytest.param(FP8_SCORES, id="fp8 scores"),
    pytest.param(FP8_ALL, id="fp8"),
]


def heads(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random [B, heads, N, d] in memory that is padded so that rows are multiples of 16 bytes."""
    *rows, width = shape
    pitch = -(-width // 16) * 16
    return torch.randn(*rows, pitch, device=device).to(dtype)[..., :width]


def transposed(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random [B, heads, N, d], contiguous along the tokens."""
    batch, count, tokens, width = shape
    return heads((batch, count, width, tokens), dtype, device).transpose(2, 3)


def inputs(
    mode: Mode, width: int, queries: int, keys: int, device: torch.device, batch: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    values = transposed if mode.v == FP8 else heads
    return (
        heads((batch, 2, queries, width), mode.qk, device),
        heads((batch, 2, keys, width), mode.qk, device),
        values((batch, 2, keys, width), mode.v, device),
    )


def form(mode: Mode, width: int, bounded: bool = False) -> AttentionFormat:
    dtype = torch.float32 if mode is FLOAT32 else torch.bfloat16
    return AttentionFormat(LOG2_E * width**-0.5, bounded, dtype)


def expected(q: Tensor, k: Tensor, v: Tensor, score_scale: float | None = None) -> Tensor:
    """Attention in float32; with values in FP8, the numerators are rounded."""
    scale = q.shape[3] ** -0.5 if score_scale is None else score_scale / LOG2_E
    q, k = q.float() * scale, k.float()
    if v.dtype == FP8:
        return fp8_softmax_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v.float(), scale=1.0)


def assert_close(actual: Tensor, reference: Tensor, error: float) -> None:
    assert actual.shape == reference.shape
    assert (actual.float() - reference).norm() <= error * reference.norm()


@pytest.mark.parametrize("width", [16, 64, 72, 112])
@pytest.mark.parametrize("mode", MODES)
def test_equals_softmax_attention(mode: Mode, width: int, device: torch.device):
    q, k, v = inputs(mode, width, 37, 70, device, batch=2)
    assert_close(attend(form(mode, width), CONFIG, q, k, v), expected(q, k, v), mode.error)


@pytest.mark.parametrize("keys", [1, 17, 32, 130])
@pytest.mark.parametrize("queries", [1, 16, 17])
@pytest.mark.parametrize("mode", [BF16, FP8_ALL], ids=["bf16", "fp8"])
def test_any_lengths(mode: Mode, queries: int, keys: int, device: torch.device):
    q, k, v = inputs(mode, 16, queries, keys, device)
    assert_close(attend(form(mode, 16), CONFIG, q, k, v), expected(q, k, v), mode.error)


@pytest.mark.parametrize("keys", [5, 64, 70])
@pytest.mark.parametrize("mode", MODES[:3])
def test_bounded_scores_need_no_maximum(mode: Mode, keys: int, device: torch.device):
    q, k, v = inputs(mode, 72, 20, keys, device)
    assert_close(attend(form(mode, 72, bounded=True), CONFIG, q, k, v), expected(q, k, v), mode.error)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("polynomials", [0, 1])
def test_scores_at_the_bound(sign: int, polynomials: int, device: torch.device):
    q, k, v = inputs(FLOAT32, 16, 20, 70, device)
    q[..., 0], k[..., 0] = sign * MAX_BOUND, 1.0
    q[..., 1:] *= 0.01  # all scores of a query are close to the bound
    result = attend(AttentionFormat(1.0, True, torch.float32), replace(CONFIG, polynomials=polynomials), q, k, v)
    assert_close(result, expected(q, k, v, score_scale=1.0), 1e-4)


@pytest.mark.parametrize("polynomials", [0, 1])
@pytest.mark.parametrize("offset", [-3000.0, 3000.0])
def test_large_scores(offset: float, polynomials: int, device: torch.device):
    q, k, v = inputs(FLOAT32, 16, 20, 70, device)
    q[..., 0], k[..., 0] = offset, 1.0
    result = attend(form(FLOAT32, 16), replace(CONFIG, polynomials=polynomials), q, k, v)
    assert_close(result, expected(q, k, v), 1e-3)


@pytest.mark.parametrize("key", [0, 31, 40, 69])
@pytest.mark.parametrize("mode", MODES)
def test_one_dominating_key(mode: Mode, key: int, device: torch.device):
    q, k, v = inputs(mode, 16, 20, 70, device)
    q[..., 0], k[..., 0] = 100.0, 0.0
    k[:, :, key, 0] = 100.0
    result = attend(form(mode, 16), replace(CONFIG, polynomials=1), q, k, v)
    assert_close(result, v[:, :, key : key + 1].float().expand_as(result), mode.error)


@pytest.mark.parametrize("keys", [1, 17, 32])
def test_one_tile_in_fp8_equals_the_emulation(keys: int, device: torch.device):
    q, k, v = inputs(FP8_ALL, 72, 20, keys, device)
    assert_close(attend(form(FP8_ALL, 72), CONFIG, q, k, v), expected(q, k, v), BF16.error)


@pytest.mark.parametrize("mode", MODES)
def test_polynomials_are_as_exact_as_the_rounded_numerators(mode: Mode, device: torch.device):
    q, k, v = inputs(mode, 64, 20, 70, device)
    result = attend(form(mode, 64), replace(CONFIG, polynomials=1), q, k, v)
    assert_close(result, expected(q, k, v), max(mode.error, 1e-4))


def test_scores_without_a_factor(device: torch.device):
    q, k, v = inputs(BF16, 64, 20, 70, device)
    q *= 0.125
    result = attend(AttentionFormat(1.0, False, torch.bfloat16), CONFIG, q, k, v)
    assert_close(result, expected(q, k, v, score_scale=1.0), BF16.error)


@pytest.mark.parametrize(
    ("mode", "bounded"),
    [(FP8_SCORES, False), (FP8_SCORES, True), (FP8_ALL, False)],
    ids=["fp8 scores", "bounded fp8 scores", "fp8"],
)
def test_scales_of_fp8_heads(mode: Mode, bounded: bool, device: torch.device):
    q, k, v = inputs(mode, 72, 20, 70, device)
    fp8 = Fp8Attention().to(device)
    fp8.q_scale.fill_(0.25)
    fp8.k_scale.fill_(0.5)
    fp8.v_scale.fill_(2.0)
    result = attend_fp8(AttentionFormat(LOG2_E, bounded, torch.bfloat16), CONFIG, fp8, q, k, v)
    reference = expected(q, k, v, score_scale=0.125 * LOG2_E)
    assert_close(result, 2 * reference if mode is FP8_ALL else reference, mode.error)


def test_heads_of_a_projection(device: torch.device):
    torch.manual_seed(0)
    product = torch.randn(2, 33, 3, 4, 16, device=device)
    q, k, v = product.transpose(1, 3).unbind(2)  # [B, heads, N, d], views of the product
    assert_close(attend(form(FLOAT32, 16), CONFIG, q, k, v), expected(q, k, v), FLOAT32.error)


@pytest.mark.parametrize("mode", MODES)
def test_memory_behind_the_heads_is_not_read(mode: Mode, device: torch.device):
    def in_nan(x: Tensor, last: int) -> Tensor:
        """Return x as a view of larger memory that has NaN in all other places, contiguous along the axis `last`."""
        rows = x.transpose(last, 3)
        memory = torch.full((*rows.shape[:2], 96, 96), math.nan, device=device).to(x.dtype)
        view = memory[:, :, : rows.shape[2], : rows.shape[3]]
        view.copy_(rows)
        return view.transpose(last, 3)

    q, k, v = inputs(mode, 72, 40, 40, device)
    q, k, v = in_nan(q, 3), in_nan(k, 3), in_nan(v, 2 if v.stride(3) != 1 else 3)
    assert_close(attend(form(mode, 72), CONFIG, q, k, v), expected(q, k, v), mode.error)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # of NumPy, in the interpreter
@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("polynomials", [0, 1])
def test_nan_stays_in_its_row(bounded: bool, polynomials: int, device: torch.device):
    q, k, v = inputs(FLOAT32, 16, 20, 70, device)
    q[0, 1, 3, 5] = math.nan
    result = attend(form(FLOAT32, 16, bounded), replace(CONFIG, polynomials=polynomials), q, k, v)
    has_nan = result.isnan().any(dim=3).nonzero().tolist()
    assert has_nan == [[0, 1, 3]]
    assert result[0, 1, 3].isnan().all()


@pytest.mark.parametrize("key", [0, 30, 69])
def test_nan_of_a_key_reaches_all_queries(key: int, device: torch.device):
    q, k, v = inputs(FLOAT32, 16, 20, 70, device)
    k[0, 1, key, 5] = math.nan
    for bounded in (False, True):
        result = attend(form(FLOAT32, 16, bounded), replace(CONFIG, polynomials=1), q, k, v)
        assert result[0, 1].isnan().all()
        assert not result[0, 0].isnan().any()


def test_numerators_in_fp8_are_rounded_relative_to_the_largest(device: torch.device):
    q = torch.zeros(1, 1, 1, 16, dtype=FP8, device=device)
    q[..., 0] = 1
    k = torch.zeros(1, 1, 2, 16, dtype=FP8, device=device)
    k[0, 0, 1, 0] = -8  # the second numerator is 2^-8 of the first: exact in FP8 only if the first is 448
    v = torch.zeros(1, 1, 16, 16, dtype=FP8, device=device).transpose(2, 3)[:, :, :2]
    v[0, 0, 1] = FP8_MAX
    result = attend(AttentionFormat(1.0, False, torch.float32), CONFIG, q, k, v)
    torch.testing.assert_close(result, torch.full_like(result, FP8_MAX * 2**-8 / (1 + 2**-8)))


@pytest.mark.parametrize("dtype", [FP8, torch.float16])
def test_values_of_a_small_range_need_the_maximum(dtype: torch.dtype, device: torch.device):
    """The numerators, up to 2^60, are rounded to the dtype of the values."""
    q, k, v = inputs(Mode(dtype, dtype, 0.0), 16, 20, 70, device)
    with pytest.raises(ValueError, match="bounded"):
        attend(form(BF16, 16, bounded=True), CONFIG, q, k, v)


@pytest.mark.parametrize("mode", MODES)
def test_the_fake_operator_agrees(mode: Mode, device: torch.device):
    q, k, v = inputs(mode, 16, 20, 70, device)
    options = form(mode, 16)
    arguments = (q, k, v, options.score_scale, (None, None, None), False, options.dtype, CONFIG.values)
    torch.library.opcheck(torch.ops.pid.attention.default, arguments, test_utils=("test_faketensor",))


def test_the_result_has_the_layout_of_tokens(device: torch.device):
    result = attend(form(BF16, 16), CONFIG, *inputs(BF16, 16, 20, 70, device))
    assert result.dtype == torch.bfloat16
    assert result.transpose(1, 2).is_contiguous()


def test_compiled_graphs_call_the_operator(device: torch.device):
    q, k, v = inputs(BF16, 16, 20, 70, device)
    kernel = partial(attend, form(BF16, 16), CONFIG)
    compiled = torch.compile(
        lambda q, k, v: kernel(q, k, v).transpose(1, 2).flatten(2), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(q, k, v), kernel(q, k, v).transpose(1, 2).flatten(2), rtol=0, atol=0)


@pytest.mark.parametrize("width", [64, 72])
def test_released_tile_sizes(width: int, device: torch.device):
    q, k, v = inputs(BF16, width, 130, 150, device)
    for config in {*configs("sm_90", width), *configs("sm_100", width), *configs("sm_120", width)}:
        assert_close(attend(form(BF16, width), config, q, k, v), expected(q, k, v), BF16.error)
