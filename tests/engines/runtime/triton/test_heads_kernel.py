"""Heads written by the kernel, against those of the network's plain functions."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from engines.pid.blocks import Heads, JointAttention, SelfAttention
from engines.pid.config import PidConfig
from engines.pid.fp8 import FP8, to_fp8
from engines.pid.fp8_attention import AttentionRange, quantise_attention
from engines.pid.positions import Rotary
from engines.pid.quantised import quantise
from engines.runtime.triton.heads import HeadsFormat, joint_heads, self_heads
from tests.tiny import TINY

PLAIN = HeadsFormat()
FORMATS = (PLAIN, HeadsFormat(0.1, True), HeadsFormat(0.1, True, True))
WIDE = replace(TINY, hidden_size=144, num_heads=2)  # heads of 72 channels, as those of released pixel blocks


def rotary(tokens: int, width: int, device: torch.device) -> Rotary:
    angles = torch.randn(tokens, width // 2, device=device)
    return angles.cos(), angles.sin()


def with_random_norms(attention: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    for name, parameter in attention.named_parameters():
        if "norm" in name:
            parameter.data = 1 + 0.3 * torch.randn_like(parameter)
    return attention.to(device).requires_grad_(False)


def joint(config: PidConfig, caption_output: bool, device: torch.device) -> JointAttention:
    torch.manual_seed(0)
    return with_random_norms(JointAttention(config, caption_output), device)  # type: ignore[return-value]


def joint_inputs(config: PidConfig, tokens: int, caption: int, device: torch.device) -> tuple:
    x, y = (torch.randn(2, count, config.hidden_size, device=device) for count in (tokens, caption))
    return x, y, rotary(tokens, config.head_width, device), rotary(caption, config.head_width, device)


def assert_heads(actual: Heads, expected: Heads, rtol: float = 1e-5) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a.float(), b.float(), rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("config", [TINY, WIDE], ids=["width 16", "width 72"])
@pytest.mark.parametrize("caption_output", [True, False], ids=["queries of both", "queries of the image"])
def test_joint_heads(config: PidConfig, caption_output: bool, device: torch.device):
    attention = joint(config, caption_output, device)
    inputs = joint_inputs(config, 37, 5, device)
    assert_heads(joint_heads(PLAIN, attention, *inputs), attention.make_heads(*inputs))


@pytest.mark.parametrize("width", [16, 72])
def test_heads_of_a_self_attention(width: int, device: torch.device):
    torch.manual_seed(0)
    attention = with_random_norms(SelfAttention(2 * width, width), device)
    assert isinstance(attention, SelfAttention)
    x, table = torch.randn(2, 33, 2 * width, device=device), rotary(33, width, device)
    assert_heads(self_heads(PLAIN, attention, x, table), attention.make_heads(x, table))


def test_scales_of_fp8_layers_are_applied(device: torch.device):
    attention = joint(TINY, True, device)
    for layer in (attention.qkv_x, attention.qkv_y):
        layer.weight[::3] *= 9  # these channels have another scale
    inputs = joint_inputs(TINY, 20, 5, device)
    quantise(attention, {"qkv_x": 4.0, "qkv_y": 4.0})
    assert_heads(joint_heads(PLAIN, attention, *inputs), attention.make_heads(*inputs))


def test_bf16_heads_are_rounded_once(device: torch.device):
    attention, inputs = joint(TINY, True, device), joint_inputs(TINY, 20, 5, device)
    x, y, image, caption = inputs
    attention.bfloat16()
    actual = joint_heads(PLAIN, attention, x.bfloat16(), y.bfloat16(), image, caption)
    assert all(t.dtype == torch.bfloat16 for t in actual)
    products = {}

    def exact(layer: torch.nn.Module, name: str) -> None:
        layer.register_forward_hook(lambda module, inputs, output: products.setdefault(name, output.float()))

    exact(attention.qkv_x, "x")
    exact(attention.qkv_y, "y")
    attention.make_heads(x.bfloat16(), y.bfloat16(), image, caption)
    plain = joint(TINY, True, device)
    plain.load_state_dict({name: value.float() for name, value in attention.state_dict().items()})
    plain.qkv_x, plain.qkv_y = (torch.nn.Identity() for _ in range(2))
    expected = heads_of_products(plain, products["x"], products["y"], image, caption)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=2**-8, atol=1e-6)


def heads_of_products(attention: JointAttention, x: Tensor, y: Tensor, image: Rotary, caption: Rotary) -> Heads:
    """Apply `make_heads` to the outputs of the projections."""

    class Projection(torch.nn.Module):
        def __init__(self, output: Tensor) -> None:
            super().__init__()
            self.output = output

        def forward(self, x: Tensor) -> Tensor:
            return self.output

    attention.qkv_x, attention.qkv_y = Projection(x), Projection(y)  # type: ignore[assignment]
    width = x.shape[-1] // 3
    return attention.make_heads(x[..., :width], y[..., :width], image, caption)


@pytest.mark.parametrize("config", [TINY, WIDE], ids=["width 16", "width 72"])
def test_fp8_heads_are_the_rounded_heads_in_the_layout_of_tensor_cores(config: PidConfig, device: torch.device):
    attention, inputs = joint(config, True, device), joint_inputs(config, 30, 5, device)
    quantise_attention(attention, AttentionRange(4.0, 4.0, 0.1))  # the values saturate
    actual = joint_heads(HeadsFormat(0.25, True, True), attention, *inputs)
    q, k, v = attention.make_heads(*inputs)
    fp8 = attention.fp8
    assert fp8 is not None
    assert v.abs().max() / fp8.v_scale > 448
    scales = fp8.q_scale, fp8.k_scale, fp8.v_scale
    for a, b, scale in zip(actual, (0.25 * q, k, v), scales, strict=True):
        assert a.dtype == FP8
        rounded = to_fp8(b, scale).float()
        different = (a.float() != rounded).float().mean()
        assert different < 0.001  # values at the border between two neighbours, by another order of summation
        torch.testing.assert_close(a.float(), rounded, rtol=2**-3, atol=2**-9)
    q, k, v = actual
    assert q.stride(1) % 16 == k.stride(1) % 16 == 0  # bytes between tokens
    assert v.stride(1) == 1
    assert v.stride(3) % 16 == 0


def test_padding_channels_are_zero(device: torch.device):
    attention, inputs = joint(WIDE, True, device), joint_inputs(WIDE, 20, 5, device)
    quantise_attention(attention, AttentionRange(4.0, 4.0, 4.0))
    q, k, _ = joint_heads(HeadsFormat(fp8_scores=True), attention, *inputs)
    for heads in (q, k):
        batch, tokens, count, width = heads.shape
        padded = heads.as_strided((batch, tokens, count, 80), heads.stride())
        assert not padded[..., width:].float().any()
        assert padded[..., :width].float().any()


@pytest.mark.parametrize("tokens", [1, 16, 17])
def test_any_number_of_tokens(tokens: int, device: torch.device):
    attention, inputs = joint(TINY, True, device), joint_inputs(TINY, tokens, 1, device)
    assert_heads(joint_heads(PLAIN, attention, *inputs), attention.make_heads(*inputs))


def test_tables_that_are_not_contiguous_are_rejected(device: torch.device):
    attention, (x, y, (cosines, sines), caption) = joint(TINY, True, device), joint_inputs(TINY, 20, 5, device)
    strided = cosines.repeat_interleave(2, dim=1)[:, ::2]
    with pytest.raises(ValueError, match="contiguous"):
        joint_heads(PLAIN, attention, x, y, (strided, sines), caption)


def test_nan_stays_in_its_token(device: torch.device):
    attention, inputs = joint(TINY, True, device), joint_inputs(TINY, 20, 5, device)
    inputs[0][1, 7] = float("nan")
    quantise_attention(attention, AttentionRange(4.0, 4.0, 4.0))
    for form in FORMATS:
        for heads in joint_heads(form, attention, *inputs):
            wrong = heads.float().isnan().any(-1).any(-1)  # [B, N]
            assert wrong.nonzero().tolist() == [[1, 5 + 7]]


@pytest.mark.parametrize("form", FORMATS)
def test_the_operator_does_not_break_the_compiled_graph(form: HeadsFormat, device: torch.device):
    attention, inputs = joint(WIDE, False, device), joint_inputs(WIDE, 20, 5, device)
    quantise_attention(attention, AttentionRange(4.0, 4.0, 4.0))
    compiled = torch.compile(partial(joint_heads, form, attention), backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        expected, actual = joint_heads(form, attention, *inputs), compiled(*inputs)
    for a, b in zip(actual, expected, strict=True):
        assert a.stride() == b.stride()
        assert torch.equal(a.float(), b.float())
