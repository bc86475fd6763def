"""The range of a network in float16: every value that an operator computes counts, not only results of layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engines.compile.inputs.calibrate import Calibration, CalibrationSample
from engines.compile.variants import shallow_copy
from engines.compile.verify_fold import VerificationError
from engines.compile.verify_range import verify_range
from engines.pid import FoldedDecoder
from engines.pid.blocks import SelfAttention
from tests.engines.compile.networks import V15, ignore_progress, network_of

CAPTION = torch.zeros(4, V15.caption_width)


@pytest.fixture
def network() -> FoldedDecoder:
    return shallow_copy(network_of(V15), torch.float16)


def calibration(scale: float = 1.0) -> Calibration:
    generator = torch.Generator().manual_seed(0)
    samples = (
        CalibrationSample(name, factor * torch.randn(16, 1, 2, generator=generator), 0.0, None)
        for name, factor in (("first", 1.0), ("second", scale))
    )
    return Calibration(tuple(samples), "", synthetic=True)


def test_the_largest_value_of_all_samples_is_returned(network: FoldedDecoder):
    both = calibration(3.0)
    one, other = (
        verify_range(network, replace(both, samples=(sample,) * 2), CAPTION, ignore_progress) for sample in both.samples
    )
    assert 1 < one < 1000
    assert verify_range(network, both, CAPTION, ignore_progress) >= one
    assert other > one


def test_hooks_are_removed(network: FoldedDecoder):
    verify_range(network, calibration(), CAPTION, ignore_progress)
    with pytest.raises(VerificationError):
        verify_range(network, calibration(1e6), CAPTION, ignore_progress)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_a_value_between_two_operators_of_a_layer_is_found(network: FoldedDecoder):
    """The values of the attention are large, the queries and keys are normalised, and the result is small."""
    attention = network.pixel_blocks[0].attn
    assert isinstance(attention, SelfAttention)
    width = attention.proj.weight.shape[1]
    attention.qkv.weight.data[2 * width :] *= 3e4
    attention.proj.weight.data /= 3e4
    with pytest.raises(VerificationError) as caught:
        verify_range(network, calibration(), CAPTION, ignore_progress)
    assert str(caught.value).startswith("pixel_blocks.0.attn.qkv ")
    assert "in float16, whose largest value is 65,504, when first is decoded. Use --precision bf16." in str(
        caught.value
    )


@pytest.mark.parametrize(("value", "expected"), [(30_000.0, None), (40_000.0, "reaches 40,000"), (1e5, "overflows")])
def test_half_of_the_range_is_allowed(
    network: FoldedDecoder, value: float, expected: str | None, monkeypatch: pytest.MonkeyPatch
):
    def attend(q: Tensor, _k: Tensor, _v: Tensor) -> Tensor:
        return 0 * (q.new_full((1,), 1.0) * value).clamp(max=1.0) + 0 * q

    monkeypatch.setattr(network.pixel_blocks[0].attn, "kernel", attend)
    if expected is None:
        assert verify_range(network, calibration(), CAPTION, ignore_progress) == pytest.approx(value, rel=1e-3)
    else:
        with pytest.raises(VerificationError, match=f"pixel_blocks.0.attn {expected} in float16"):
            verify_range(network, calibration(), CAPTION, ignore_progress)


def test_values_in_float32_do_not_count(network: FoldedDecoder, monkeypatch: pytest.MonkeyPatch):
    def attend(q: Tensor, _k: Tensor, _v: Tensor) -> Tensor:
        return (1e-6 * (1e6 + q.float())).half()

    monkeypatch.setattr(network.pixel_blocks[0].attn, "kernel", attend)
    assert verify_range(network, calibration(), CAPTION, ignore_progress) < 1000


def test_a_decode_that_ends_in_nan_is_an_error(network: FoldedDecoder):
    network.final_layer.linear.bias.data.fill_(torch.nan)
    with pytest.raises(VerificationError, match="final_layer overflows in float16"):
        verify_range(network, calibration(), CAPTION, ignore_progress)
