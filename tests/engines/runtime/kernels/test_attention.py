"""Choice of the attention kernel, with a timer that returns given durations."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engines.pid import FoldedDecoder, PidDecoder, fold
from engines.pid.blocks import Heads, JointAttention, SelfAttention, attentions
from engines.pid.fp8_attention import AttentionRange, Fp8Attention, quantise_attention
from engines.pid.positions import Rotary, rotate
from engines.pid.sampler import MODEL_TIMESTEPS
from engines.runtime.kernels.attention import KERNELS, Kernel, attention_groups, attention_operations
from engines.runtime.kernels.choice import Choice, choose
from engines.runtime.kernels.timing import cuda_seconds
from engines.runtime.kernels.workload import Workload
from engines.size import Size
from tests.engines.runtime.kernels.by_name import timer
from tests.tiny import TINY

SIZE = Size(64, 96)


def default(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def by_definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(q @ k.transpose(2, 3) / q.shape[3] ** 0.5, dim=3) @ v


def wrong_last_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = default(q, k, v)
    out[:, 0, -1] = 0
    return out


def not_finite(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.full_like(q, float("nan"))


def raises(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    raise RuntimeError("this operator does not support this shape")


def kernels(**functions: Callable[[Tensor, Tensor, Tensor], Tensor]) -> dict[str, Kernel]:
    return {name: Kernel(function, lambda inputs: True) for name, function in functions.items()}


SUPPORTED = kernels(plain=by_definition, default=default)


@pytest.fixture
def decoder() -> FoldedDecoder:
    return fold(PidDecoder(TINY), MODEL_TIMESTEPS)


def chosen(decoder: FoldedDecoder, kind: type) -> set[Callable | None]:
    return {module.kernel for module in decoder.modules() if isinstance(module, kind)}


def choices(decoder: FoldedDecoder, *seconds: float, kernels: Mapping[str, Kernel] = SUPPORTED) -> tuple[Choice, ...]:
    return choose(attention_operations(decoder, Workload(SIZE, 5), kernels), timer(*seconds))


def test_each_kind_of_attention_uses_its_fastest_kernel(decoder: FoldedDecoder):
    joint, pixel = choices(decoder, 0.003, 0.002, 0.001, 0.002)
    assert str(joint) == "joint attention, 29 tokens, 3 heads of 16: plain 3 ms, default 2 ms; using default"
    assert str(pixel).startswith("pixel attention, 24 tokens, 2 heads of 16: plain 1 ms")
    assert chosen(decoder, JointAttention) == {default}
    assert chosen(decoder, SelfAttention) == {by_definition}


@pytest.mark.parametrize("wrong", [wrong_last_row, not_finite])
def test_a_kernel_that_computes_something_else_is_not_chosen(decoder: FoldedDecoder, wrong: Callable):
    measured = choices(decoder, 1, 2, 1, 2, kernels=kernels(fast=wrong, slow=default))
    assert [choice.chosen for choice in measured] == ["slow", "slow"]


@pytest.mark.parametrize("unsupported", [Kernel(default, lambda inputs: False), Kernel(raises, lambda inputs: True)])
def test_a_kernel_that_the_device_does_not_support_is_not_chosen(decoder: FoldedDecoder, unsupported: Kernel):
    measured = choices(decoder, 3, 2, 3, 2, kernels={"cuDNN": unsupported, **SUPPORTED})
    assert [choice.chosen for choice in measured] == ["default", "default"]
    assert "cuDNN not usable" in str(measured[0])


def test_pytorch_chooses_if_no_kernel_is_supported(decoder: FoldedDecoder):
    assert [choice.chosen for choice in choices(decoder, kernels=kernels(cuDNN=raises))] == [None, None]
    assert chosen(decoder, JointAttention) == chosen(decoder, SelfAttention) == {None}


def test_attention_in_fp8_is_chosen_by_itself_and_may_be_more_exact(decoder: FoldedDecoder):
    """The emulation in float32, which needs no kernel, is far slower than attention in 16 bits."""
    first = decoder.get_submodule("patch_blocks.0.attn")
    quantise_attention(first, AttentionRange(4.0, 4.0, 4.0))
    measured = choices(decoder, 2, 1, 1, 2, 2, 1)
    assert [choice.name for choice in measured] == ["joint attention in FP8", "joint attention", "pixel attention"]
    assert first.kernel is default
    assert decoder.get_submodule("patch_blocks.1.attn").kernel is by_definition


def loses_the_last_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return default(q, k[:, :, :-16], v[:, :, :-16])


@pytest.mark.parametrize("kernel", [default, loses_the_last_keys])
def test_a_lost_tile_is_found_however_many_keys_there_are(decoder: FoldedDecoder, kernel: Callable):
    for group in attention_groups(decoder, Workload(Size(2048, 2048), 5)):
        candidate = group.own_candidate(Workload(SIZE, 5), group.plain, kernel)
        assert candidate.check is not None
        assert (candidate.check() <= candidate.max_error) == (kernel is default)


def without_scales(kernel: Callable, fp8: Fp8Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return kernel(q, k, v)


def loses_keys_for_a_few_channels(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = default(q, k, v)
    out[:, 1, :, 8:] = loses_the_last_keys(q, k, v)[:, 1, :, 8:]
    return out


@pytest.mark.parametrize("kernel", [default, loses_keys_for_a_few_channels])
def test_a_mistake_in_a_few_channels_is_found_in_fp8(decoder: FoldedDecoder, kernel: Callable):
    for module in attentions(decoder).values():
        quantise_attention(module, AttentionRange(4.0, 4.0, 4.0))
    for group in attention_groups(decoder, Workload(Size(2048, 2048), 5)):
        candidate = group.fp8_candidate(Workload(SIZE, 5), group.plain, partial(without_scales, kernel))
        assert candidate.check is not None
        assert (candidate.check() <= candidate.max_error) == (kernel is default)


@pytest.mark.parametrize("fp8", [False, True])
def test_a_mistake_that_only_the_last_block_has_is_found(decoder: FoldedDecoder, fp8: bool):
    if fp8:
        for module in attentions(decoder).values():
            quantise_attention(module, AttentionRange(4.0, 4.0, 4.0))

    def wrong_without_caption_queries(attention: JointAttention, *inputs: Any) -> Heads:
        q, k, v = attention.make_heads(*inputs)
        return q, k, v if attention.caption_output else v.roll(1, dims=1)

    joint = next(attention_groups(decoder, Workload(SIZE, 5)))
    if fp8:
        kernel = partial(without_scales, default)
        candidate = joint.fp8_candidate(Workload(SIZE, 5), wrong_without_caption_queries, kernel)
    else:
        candidate = joint.own_candidate(Workload(SIZE, 5), wrong_without_caption_queries, default)
    assert candidate.check is not None
    assert candidate.check() > candidate.max_error


@pytest.mark.parametrize("weight", [1.0, 4.0])
def test_heads_that_are_rounded_less_often_are_correct(decoder: FoldedDecoder, weight: float):
    """The effect of rounding grows with the weights of the norms, which multiply the scores."""
    decoder.to(torch.bfloat16)
    for module in attentions(decoder).values():
        for name, norm in module.named_children():
            if "norm" in name:
                norm.weight.data.fill_(weight)

    def rounded_once(attention: SelfAttention, x: Tensor, rotary: Rotary) -> Heads:
        q, k, v = attention.qkv(x).unflatten(-1, (3, -1, attention.head_width)).unbind(2)
        q, k = (rotate(norm(t.float()), rotary) for norm, t in ((attention.q_norm, q), (attention.k_norm, k)))
        return q.bfloat16(), k.bfloat16(), v

    group = list(attention_groups(decoder, Workload(Size(512, 512), 5)))[-1]
    assert isinstance(group.sample, SelfAttention)
    candidate = group.own_candidate(Workload(SIZE, 5), rounded_once, default)
    assert candidate.check is not None
    assert candidate.check() <= candidate.max_error < 0.05


@pytest.mark.parametrize("kernel", [default, by_definition])
def test_the_kernel_does_not_change_the_velocity(decoder: FoldedDecoder, kernel: Callable):
    generator = torch.Generator().manual_seed(0)
    latent, caption = (torch.randn(shape, generator=generator) for shape in ((1, 16, 2, 3), (1, 5, 24)))
    x = torch.randn(1, 3, *SIZE, generator=generator)
    conditioning = decoder.condition(latent, caption, SIZE)
    expected = decoder.velocity(x, MODEL_TIMESTEPS[0], conditioning, 0.3)
    for module in attentions(decoder).values():
        module.kernel = kernel
    actual = decoder.velocity(x, MODEL_TIMESTEPS[0], conditioning, 0.3)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_the_choice_of_kernel_does_not_break_the_compiled_graph():
    """A graph break would leave attention, half of the work, uncompiled."""
    attention = SelfAttention(32, 16)
    attention.kernel = by_definition
    x, rotary = torch.randn(1, 6, 32), (torch.ones(6, 8), torch.zeros(6, 8))
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x, rotary), attention(x, rotary))


@pytest.mark.parametrize("name", KERNELS)
def test_the_operators_take_these_arguments(name: str):
    """PyTorch may change operators that start with an underscore."""
    with torch.device("meta"):
        q, k, v = (torch.empty(1, 2, 32, 64, dtype=torch.bfloat16) for _ in range(3))
    assert KERNELS[name].attend(q, k, v).shape == q.shape


@pytest.mark.gpu
def test_cuda_supports_at_least_one_kernel_per_kind(decoder: FoldedDecoder):
    operations = attention_operations(decoder.to("cuda", torch.bfloat16), Workload(SIZE, 5))
    assert all(choice.chosen for choice in choose(operations, cuda_seconds))
