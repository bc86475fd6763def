"""Choice of the memory layout of the adapter."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from engines.pid import FoldedDecoder, PidDecoder, fold
from engines.pid.sampler import MODEL_TIMESTEPS
from engines.runtime.kernels.adapter import adapter_operations, lay_out
from engines.runtime.kernels.choice import Choice, choose
from engines.runtime.kernels.workload import Workload
from engines.size import Size
from tests.engines.runtime.kernels.by_name import timer
from tests.tiny import TINY

SIZE = Size(64, 96)


@pytest.fixture
def decoder() -> FoldedDecoder:
    torch.manual_seed(0)
    return fold(PidDecoder(TINY), MODEL_TIMESTEPS)


def weights(decoder: FoldedDecoder) -> list[torch.Tensor]:
    return [layer.weight for layer in decoder.lq_proj.modules() if isinstance(layer, nn.Conv2d)]


def choices(decoder: FoldedDecoder, *seconds: float, compiled: bool = False) -> tuple[Choice, ...]:
    return choose(adapter_operations(decoder, Workload(SIZE, 5, None, compiled, "eager")), timer(*seconds))


def test_the_fastest_layout_is_used(decoder: FoldedDecoder):
    latent = torch.randn(1, 16, 2, 3)
    expected, _ = decoder.lq_proj(latent)
    (choice,) = choices(decoder, 2.0, 1.0)
    assert choice.chosen == "NHWC"
    assert choice.flops > 0
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights(decoder))
    actual, _ = decoder.lq_proj(latent)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_later_choice_can_restore_the_layout(decoder: FoldedDecoder):
    before = [weight.clone() for weight in weights(decoder)]
    for seconds in ((2.0, 1.0), (1.0, 2.0)):
        choices(decoder, *seconds)
    assert all(weight.is_contiguous() for weight in weights(decoder))
    assert all(torch.equal(weight, former) for weight, former in zip(weights(decoder), before, strict=True))


def test_a_compiled_adapter_computes_the_same(decoder: FoldedDecoder):
    latent = torch.randn(1, 16, 2, 3)
    expected, _ = decoder.lq_proj(latent)
    (choice,) = choices(decoder, 3.0, 2.0, 1.0, compiled=True)
    assert choice.chosen == "NHWC, compiled"
    actual, _ = decoder.lq_proj(latent)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_weights_keep_their_memory(decoder: FoldedDecoder):
    addresses = [weight.data_ptr() for weight in weights(decoder)]
    lay_out(decoder.lq_proj, torch.channels_last)
    assert [weight.data_ptr() for weight in weights(decoder)] == addresses
