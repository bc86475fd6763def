"""Implementations of attention with the Triton kernels of this project, as candidates for a choice."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import nn

from engines.pid.blocks import AttentionKernel, JointAttention
from engines.runtime.kernels.attention_group import AttentionGroup
from engines.runtime.kernels.choice import Candidate
from engines.runtime.kernels.workload import Workload
from engines.runtime.triton.architectures import Architecture
from engines.runtime.triton.attention import FP8_VALUES, MAX_BOUND, AttentionFormat, attend, attend_fp8, configs
from engines.runtime.triton.heads import HeadsFormat, joint_heads, self_heads

_LOG2_E = math.log2(math.e)
_FP8_ROUNDING = (1 + 2**-4) ** 2  # factor by which rounding queries and keys to FP8 can increase the bound


def triton_candidates(
    group: AttentionGroup, workload: Workload, architecture: Architecture, library: Mapping[str, AttentionKernel]
) -> dict[str, Candidate]:
    """Return the implementations of a group of attentions by name.

    Args:
        group: The attentions.
        workload: What the implementations are measured for.
        architecture: Architecture whose tile sizes are used.
        library: Kernels of PyTorch that support the attentions; they can read heads that a Triton kernel writes.
    """
    return dict(_candidates(group, workload, architecture, library))


def _candidates(
    group: AttentionGroup, workload: Workload, architecture: Architecture, library: Mapping[str, AttentionKernel]
) -> Iterator[tuple[str, Candidate]]:
    write = joint_heads if isinstance(group.sample, JointAttention) else self_heads
    width, dtype = group.sample.head_width, group.inputs[0].dtype
    tiles, bound = configs(architecture, width), largest_score(group)
    heads = partial(write, HeadsFormat())
    for name, kernel in library.items():
        yield f"{name}, fused heads", group.own_candidate(workload, heads, kernel)
    heads = partial(write, HeadsFormat(query_factor=width**-0.5 * _LOG2_E))
    form = AttentionFormat(score_scale=1.0, bounded=bound <= MAX_BOUND and dtype != torch.float16, dtype=dtype)
    for config in tiles:
        yield f"Triton, {config}", group.own_candidate(workload, heads, partial(attend, form, config))
    if group.sample.fp8 is None:
        return
    heads = partial(write, HeadsFormat(query_factor=width**-0.5, fp8_scores=True))
    bounded = bound * _FP8_ROUNDING <= MAX_BOUND and dtype != torch.float16
    form = AttentionFormat(_LOG2_E, bounded, dtype)
    for config in tiles:
        yield (
            f"Triton, scores in FP8, {config}",
            group.fp8_candidate(workload, heads, partial(attend_fp8, form, config)),
        )
    if architecture not in FP8_VALUES:
        return
    heads = partial(write, HeadsFormat(query_factor=width**-0.5, fp8_scores=True, fp8_values=True))
    form = AttentionFormat(_LOG2_E, bounded=False, dtype=dtype)
    for config in tiles:
        yield f"Triton, FP8, {config}", group.fp8_candidate(workload, heads, partial(attend_fp8, form, config))


def largest_score(group: AttentionGroup) -> float:
    """Return a bound of all scores q·k/√d of a group, in units of the logarithm to base 2.

    A norm makes the length of a query, which rotation keeps, at most √d times the largest weight of the norm.
    """

    def largest(*norms: nn.Module) -> float:
        return max(norm.weight.abs().max().item() for norm in norms)  # type: ignore[operator]

    return (
        max(
            module.head_width**0.5 * largest(*_norms(module, "q_norm")) * largest(*_norms(module, "k_norm"))
            for module in group.modules
        )
        * _LOG2_E
    )


def _norms(attention: nn.Module, name: str) -> list[nn.Module]:
    return [module for child, module in attention.named_children() if child.startswith(name)]
