"""Choice of the attention kernel, with a timer that returns given durations."""

import logging
from collections.abc import Callable, Mapping

import pytest
import torch
from torch.nn.attention import SDPBackend

from engines.pid import FoldedDecoder, PidDecoder, fold
from engines.pid.blocks import JointAttention, SelfAttention
from engines.pid.sampler import MODEL_TIMESTEPS
from engines.runtime.kernels.attention import KERNELS, choose_kernels
from engines.runtime.kernels.timing import cuda_seconds
from engines.size import Size
from tests.tiny import TINY

SIZE = Size(64, 96)
SUPPORTED = {"plain": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION}  # on a CPU


@pytest.fixture
def decoder() -> FoldedDecoder:
    return fold(PidDecoder(TINY), MODEL_TIMESTEPS)


def timer(*seconds: float) -> Callable:
    """Return a timer that runs the work and returns these durations, one after the other."""
    durations = iter(seconds)

    def time(work: Callable[[], object]) -> float:
        work()
        return next(durations)

    return time


def chosen(decoder: FoldedDecoder, kind: type) -> set[SDPBackend | None]:
    return {module.kernel for module in decoder.modules() if isinstance(module, kind)}


def choose(decoder: FoldedDecoder, *seconds: float, kernels: Mapping[str, SDPBackend] = SUPPORTED) -> list[str | None]:
    choices = choose_kernels(decoder, SIZE, 5, timer(*seconds), kernels)
    return [choice.chosen for choice in choices]


def test_each_kind_of_attention_uses_its_fastest_kernel(decoder: FoldedDecoder, caplog):
    with caplog.at_level(logging.INFO):
        assert choose(decoder, 0.003, 0.002, 0.001, 0.002) == ["flash", "plain"]
    assert chosen(decoder, JointAttention) == {SDPBackend.FLASH_ATTENTION}
    assert chosen(decoder, SelfAttention) == {SDPBackend.MATH}
    joint, pixel = caplog.messages
    assert joint == "joint attention, 29 tokens, 3 heads of 16: plain 3 ms, flash 2 ms; using flash"
    assert pixel.startswith("pixel attention, 24 tokens, 2 heads of 16: plain 1 ms")


def test_a_kernel_that_the_device_does_not_support_is_not_chosen(decoder: FoldedDecoder, caplog):
    kernels = {"cuDNN": SDPBackend.CUDNN_ATTENTION, **SUPPORTED}  # cuDNN never supports a CPU
    with caplog.at_level(logging.INFO):
        assert choose(decoder, 3, 2, 3, 2, kernels=kernels) == ["flash", "flash"]
    assert "cuDNN not supported" in caplog.text


def test_pytorch_chooses_if_no_kernel_is_supported(decoder: FoldedDecoder):
    assert choose(decoder, kernels={"cuDNN": SDPBackend.CUDNN_ATTENTION}) == [None, None]
    assert chosen(decoder, JointAttention) == chosen(decoder, SelfAttention) == {None}


def test_a_broken_device_is_not_mistaken_for_an_unsupported_kernel(decoder: FoldedDecoder):
    def broken(work: Callable[[], object]) -> float:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    with pytest.raises(torch.AcceleratorError):
        choose_kernels(decoder, SIZE, 5, broken, SUPPORTED)


@pytest.mark.parametrize("kernel", SUPPORTED.values())
def test_the_kernel_does_not_change_the_velocity(decoder: FoldedDecoder, kernel: SDPBackend):
    generator = torch.Generator().manual_seed(0)
    latent, caption = (torch.randn(shape, generator=generator) for shape in ((1, 16, 2, 3), (1, 5, 24)))
    x = torch.randn(1, 3, *SIZE, generator=generator)
    conditioning = decoder.condition(latent, caption, SIZE)
    expected = decoder.velocity(x, MODEL_TIMESTEPS[0], conditioning, 0.3)
    for module in decoder.modules():
        if isinstance(module, JointAttention | SelfAttention):
            module.kernel = kernel
    actual = decoder.velocity(x, MODEL_TIMESTEPS[0], conditioning, 0.3)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_the_choice_of_kernel_does_not_break_the_compiled_graph():
    """A graph break would leave attention, half of the work, uncompiled."""
    attention = SelfAttention(32, 16)
    attention.kernel = SDPBackend.MATH
    x, rotary = torch.randn(1, 6, 32), (torch.ones(6, 8), torch.zeros(6, 8))
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x, rotary), attention(x, rotary))


@pytest.mark.gpu
def test_cuda_supports_at_least_one_kernel_per_kind(decoder: FoldedDecoder):
    choices = choose_kernels(decoder.to("cuda", torch.bfloat16), SIZE, 5, cuda_seconds, KERNELS)
    assert all(choice.chosen for choice in choices)
