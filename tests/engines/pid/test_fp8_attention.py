"""FP8 attention: its values against a reference in float64, its scales, and what a state dictionary restores."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engines.pid import FoldedDecoder, PidDecoder, fold, fp8_attention
from engines.pid.blocks import JointAttention, SelfAttention, attentions
from engines.pid.fp8 import fp8_round
from engines.pid.fp8_attention import AttentionRange, Fp8Attention, fp8_softmax_attention, quantise_attention
from engines.pid.sampler import MODEL_TIMESTEPS
from tests.tiny import TINY

SHAPE = (2, 3, 40, 24)  # [B, heads, N, d]


def qkv(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(SHAPE, generator=generator).to(dtype) for _ in range(3))
    return 2 * q, k, v


def round_e4m3(x: Tensor) -> Tensor:
    """Round to three bits of mantissa, with denormals below 2⁻⁶, saturating at 448."""
    exponent = torch.frexp(x)[1].clamp(min=-5) - 1  # x = m · 2^exponent, 1 ≤ |m| < 2
    step = torch.ldexp(torch.ones_like(x), exponent - 3)
    return ((x / step).round() * step).clamp(-448, 448)


def reference(q: Tensor, k: Tensor, v: Tensor, scales: tuple[float, float, float]) -> Tensor:
    """FP8 attention by its definition in float64."""
    q = (q.float() * q.shape[-1] ** -0.5).to(q.dtype)
    q, k, v = (round_e4m3(t.double() / s) * s for t, s in zip((q, k, v), scales, strict=True))
    scores = q @ k.transpose(2, 3)
    numerators = (scores - scores.amax(dim=3, keepdim=True)).exp()
    return round_e4m3(448 * numerators) / 448 @ v / numerators.sum(dim=3, keepdim=True)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Compare up to single numerators that lie between two FP8 values and are rounded to the other one."""
    assert (actual.double() - expected).norm() / expected.norm() < 1e-3


def fp8_core(scales: tuple[float, float, float]) -> Fp8Attention:
    core = Fp8Attention()
    for buffer, scale in zip(core.buffers(), scales, strict=True):
        buffer.fill_(scale)
    return core


def test_values_match_the_definition():
    scales = (2.0**-7, 2.0**-6, 2.0**-7)
    expected = reference(*qkv(), scales)
    actual = fp8_core(scales)(*qkv())
    assert_same(actual, expected)
    exact = F.scaled_dot_product_attention(*qkv())
    assert 5e-3 < (actual - exact).norm() / exact.norm() < 0.1


def test_the_largest_value_of_a_range_does_not_saturate_and_larger_ones_do():
    q, k, v = qkv()
    attention = SelfAttention(72, 24)
    quantise_attention(attention, AttentionRange(q.abs().max().item(), k.abs().max().item(), v.abs().max().item()))
    assert attention.fp8 is not None
    scales = tuple(buffer.item() for buffer in attention.fp8.buffers())
    assert all(math.log2(scale).is_integer() for scale in scales)
    expected = reference(q, k, v, scales)
    assert_same(attention.fp8(q, k, v), expected)
    assert (v.abs().max() / scales[2]).item() <= 448 < 2 * (v.abs().max() / scales[2]).item()
    assert (q.abs().max() / math.sqrt(24) / scales[0]).item() <= 448
    largest = fp8_round(torch.tensor(1e6), attention.fp8.v_scale).item()
    assert attention.fp8(q, k, torch.full(SHAPE, 1e6)).max().item() == pytest.approx(largest, rel=0.1)


def test_chunks_of_queries_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch):
    whole = fp8_softmax_attention(*qkv())
    monkeypatch.setattr(fp8_attention, "_SCORE_BYTES", 7 * 4 * 2 * 3 * 40)  # chunks of 7 of the 40 queries
    torch.testing.assert_close(fp8_softmax_attention(*qkv()), whole, rtol=1e-6, atol=1e-6)


def test_without_rounded_numerators_only_inputs_are_rounded():
    scales = (2.0**-7, 2.0**-6, 2.0**-7)
    core = fp8_core(scales)
    core.rounds_numerators = False
    q, k, v = qkv()
    rounded = [fp8_round(t, torch.tensor(s)) for t, s in zip((q / math.sqrt(24), k, v), scales, strict=True)]
    torch.testing.assert_close(core(q, k, v), F.scaled_dot_product_attention(*rounded, scale=1.0))


def test_values_in_bfloat16_are_summed_in_float32():
    scales = (2.0**-7, 2.0**-6, 2.0**-7)
    actual = fp8_core(scales)(*qkv(torch.bfloat16))
    assert actual.dtype == torch.bfloat16
    expected = reference(*qkv(torch.bfloat16), scales)
    assert (actual.double() - expected).norm() / expected.norm() < 3e-3


@pytest.fixture
def network() -> FoldedDecoder:
    torch.manual_seed(0)
    network = fold(PidDecoder(TINY), MODEL_TIMESTEPS)
    for name, attention in attentions(network).items():
        if name != "patch_blocks.0.attn":
            quantise_attention(attention, AttentionRange(30.0, 9.0, 2.0))
    return network


def test_attentions_are_listed_in_the_order_of_execution(network: FoldedDecoder):
    found = attentions(network)
    assert list(found) == ["patch_blocks.0.attn", "patch_blocks.1.attn", "pixel_blocks.0.attn"]
    assert [type(attention) for attention in found.values()] == [JointAttention, JointAttention, SelfAttention]


def test_a_state_dictionary_restores_the_attentions_in_fp8(network: FoldedDecoder):
    state = network.state_dict()
    assert state["pixel_blocks.0.attn.fp8.k_scale"] == 2.0**-5
    assert state["pixel_blocks.0.attn.fp8.k_scale"].dtype == torch.float32
    restored = FoldedDecoder.for_state(TINY, MODEL_TIMESTEPS, state)
    assert {parameter.device.type for parameter in restored.state_dict().values()} == {"meta"}
    restored.load_state_dict(state, strict=True, assign=True)
    assert [attention.fp8 is not None for attention in attentions(restored).values()] == [False, True, True]
    for name, tensor in restored.state_dict().items():
        assert torch.equal(tensor.float(), state[name].float())


def test_torch_compile_computes_the_same():
    scales = (2.0**-7, 2.0**-6, 2.0**-7)
    attention = SelfAttention(72, 24)
    attention.fp8 = fp8_core(scales)
    x, angles = torch.randn(1, 40, 72), torch.rand(2, 40, 12)
    rotary = (angles[0].cos(), angles[0].sin())
    expected = attention(x, rotary)
    compiled = torch.compile(attention, backend="eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(x, rotary), expected)
