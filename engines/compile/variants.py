"""Variants of a folded network that share its tensors: another dtype, FP8 layers and attention, fewer blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from engines.compile.verify_fold import VerificationError
from engines.pid import FoldedDecoder, fp8
from engines.pid.blocks import attentions
from engines.pid.fp8_attention import AttentionRange, Fp8Attention, quantise_attention


def shallow_copy(network: FoldedDecoder, dtype: torch.dtype | None = None) -> FoldedDecoder:
    """Copy the modules of a network but not its tensors, so that layers can be replaced in the copy only.

    Args:
        network: The network to copy.
        dtype: Dtype of the copy's parameters. Tables and FP8 layers are not converted.
    """
    parameters = {name for name, _ in network.named_parameters()}
    state = {
        name: tensor.to(dtype) if dtype is not None and name in parameters else tensor
        for name, tensor in network.state_dict().items()
    }
    copy = FoldedDecoder.for_state(network.config, network.timesteps, state)
    copy.load_state_dict(state, strict=True, assign=True)
    copy.pixel_memory_budget = network.pixel_memory_budget
    return copy.eval().requires_grad_(False)


def cast(folded: FoldedDecoder, dtype: torch.dtype) -> None:
    """Cast the parameters in place, one at a time to save memory; the tables stay float32.

    Raises:
        VerificationError: A value is not finite in `dtype`.
    """
    for key, parameter in folded.named_parameters():
        parameter.data = parameter.data.to(dtype).contiguous()
        if not parameter.data.isfinite().all():
            name = str(dtype).removeprefix("torch.")
            raise VerificationError(f"The parameter {key} contains infinity or NaN in {name}.")


def with_fp8(
    network: FoldedDecoder,
    largest_inputs: Mapping[str, float],
    attention_ranges: Mapping[str, AttentionRange] | None = None,
) -> FoldedDecoder:
    """Return a copy in which the named layers and attentions are in FP8; everything else is shared with `network`."""
    copy = shallow_copy(network)
    fp8.quantise(copy, largest_inputs)
    set_fp8_attention(copy, attention_ranges or {})
    return copy


def set_fp8_attention(network: FoldedDecoder, ranges: Mapping[str, AttentionRange]) -> None:
    """Compute the named attentions in FP8 and all others not, in place."""
    for name, attention in attentions(network).items():
        attention.fp8 = None
        if name in ranges:
            quantise_attention(attention, ranges[name])


def as_exported(network: FoldedDecoder) -> FoldedDecoder:
    """Return a copy that computes what an exported graph does, in which numerators of a softmax are not rounded."""
    copy = shallow_copy(network)
    for module in copy.modules():
        if isinstance(module, Fp8Attention):
            module.rounds_numerators = False
    return copy


def emulate_fp8(network: FoldedDecoder, quantised: FoldedDecoder) -> FoldedDecoder:
    """Change a network in place to compute what its quantised copy computes, and return it.

    Several times as fast on a CPU, because FP8 weights are expanded once instead of in every step.
    """
    for name, layer in quantised.named_modules():
        if isinstance(layer, fp8.Fp8Linear):
            linear = network.get_submodule(name)
            assert isinstance(linear, nn.Linear)  # noqa: S101  for mypy: the FP8 layer was made from it
            linear.weight.data = fp8.fp8_weight(layer.weight, layer.weight_scale)
            linear.register_forward_pre_hook(partial(_round_input, layer.input_scale))
    for name, attention in attentions(network).items():
        attention.fp8 = attentions(quantised)[name].fp8
    return network


def _round_input(scale: Tensor, _linear: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (fp8.fp8_round(inputs[0], scale),)


def first_and_last_block(network: FoldedDecoder) -> tuple[FoldedDecoder, dict[str, str]]:
    """Reduce a network to its first and last patch block.

    Returns:
        The small network, which shares tensors with `network`, and its module names -> names in `network`.
    """
    depth = network.config.patch_depth
    blocks = (0, depth - 1) if depth > 1 else (0,)
    config = replace(network.config, patch_depth=len(blocks), injection_interval=len(blocks))
    with torch.device("meta"):
        small = FoldedDecoder(config, network.timesteps)

    def original(name: str) -> str:
        parts = name.split(".")
        if parts[0] == "patch_blocks" and len(parts) > 1:
            parts[1] = str(blocks[int(parts[1])])
        return ".".join(parts)

    state = network.state_dict()
    small_state = {name: state[original(name)] for name in small.state_dict()}
    small_state["modulation_table"] = state["modulation_table"][:, list(blocks)]
    small.load_state_dict(small_state, strict=True, assign=True)
    names = {name: original(name) for name, _ in small.named_modules()}
    return small.eval().requires_grad_(False), names
