"""Attentions for which one implementation is chosen, and how to run and to install it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.accuracy import largest, relative_error
from engines.pid.blocks import Attention, AttentionKernel, Heads, attend
from engines.runtime.kernels.choice import Candidate
from engines.runtime.kernels.workload import Workload

CHECKED_ROWS = 64  # queries whose result is checked, spread over all tokens
MAX_ERROR = 0.01  # relative; one wrong row in one of 24 heads is above it, rounding the result well below
_GROUP_CHANNELS = 8  # the smallest part of a head that a kernel computes separately: 72 channels are 64 and 8
MAX_FP8_ERROR = 0.1  # rounding random queries, keys, values and numerators to FP8 changes the result by 4 to 6 %

MakeHeads = Callable[..., Heads]  # as `make_heads` of the attentions


@dataclass(frozen=True)
class AttentionGroup:
    """Attentions of one kind and precision, and two inputs of their shapes.

    Attributes:
        name: What they are.
        modules: The attentions.
        inputs: Arguments of `forward`, for the image that the kernels are chosen for.
        few: The same with few tokens: among 16,384 keys, a lost tile of 64 is hardly visible.
    """

    name: str
    modules: tuple[Attention, ...]
    inputs: tuple[Any, ...]
    few: tuple[Any, ...]

    @property
    def sample(self) -> Attention:
        """The attention that is measured."""
        return self.modules[0]

    @property
    def plain(self) -> MakeHeads:
        """Makes the heads without kernels of this project."""
        return type(self.sample).make_heads

    def candidate(self, make_heads: MakeHeads, kernel: AttentionKernel) -> Candidate:
        """Return attention by a kernel of PyTorch, of heads that `make_heads`, possibly compiled, computes."""
        run, install = partial(self._attend, make_heads, kernel), partial(self._install, None, kernel)
        return Candidate(run, install, MAX_ERROR + 2 * self._rounding)

    def own_candidate(self, workload: Workload, heads: MakeHeads, kernel: AttentionKernel) -> Candidate:
        """Return attention in 16 bits, of heads that a kernel of this project computes."""
        run, install = partial(self._attend, workload.optimise(heads), kernel), partial(self._install, heads, kernel)
        check = partial(self._few_error, heads, lambda attention: kernel)
        return Candidate(run, install, MAX_ERROR + 2 * self._rounding, own=True, check=check)

    def fp8_candidate(self, workload: Workload, heads: MakeHeads, kernel: Callable[..., Tensor]) -> Candidate:
        """Return attention in FP8. `kernel`, a `Fp8Attention.kernel`, has the scales of each module as its argument."""

        def install() -> None:
            self._install(heads, None)
            for module in self.modules:
                module.fp8.kernel = kernel  # type: ignore[union-attr]  # it exists in this group

        run = partial(self._attend, workload.optimise(heads), partial(kernel, self.sample.fp8))
        check = partial(self._few_error, heads, lambda attention: partial(kernel, attention.fp8))
        return Candidate(run, install, MAX_FP8_ERROR + 2 * self._rounding, own=True, check=check)

    def _attend(self, make_heads: MakeHeads, kernel: AttentionKernel) -> Tensor:
        return attend(*make_heads(self.sample, *self.inputs), kernel)

    def _few_error(self, heads: MakeHeads, kernel_of: Callable[[Attention], AttentionKernel]) -> float:
        """Return the largest error of the attentions in `_expected_few`."""
        return largest(
            _largest_error(attend(*heads(attention, *self.few), kernel_of(attention)), expected)
            for attention, expected in self._expected_few.items()
        )

    @cached_property
    def _expected_few(self) -> dict[Attention, Tensor]:
        """Results of the first and the last attention. The last joint one may have no queries of captions."""
        checked = self.modules[0], self.modules[-1]
        return {attention: _attend_exactly(*self.plain(attention, *self.few)) for attention in checked}

    @cached_property
    def _rounding(self) -> float:
        """The error if heads are not rounded between norm and rotation; kernels and torch.compile do not round there.

        It grows with the weights of the norms.
        """
        return largest(
            relative_error(_attend_exactly(*self._heads_rounded_once(attention)), expected)
            for attention, expected in self._expected_few.items()
        )

    def _heads_rounded_once(self, attention: Attention) -> tuple[Tensor, ...]:
        projections = [layer for name, layer in attention.named_children() if name.startswith("qkv")]
        hooks = [layer.register_forward_hook(lambda layer, inputs, output: output.float()) for layer in projections]
        try:
            heads = self.plain(attention, *self.few)
        finally:
            for hook in hooks:
                hook.remove()
        return tuple(head.to(self.few[0].dtype) for head in heads)

    def _install(self, heads: MakeHeads | None, kernel: AttentionKernel | None) -> None:
        for module in self.modules:
            module.heads, module.kernel = heads, kernel


def _attend_exactly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend over heads [B, N, heads, d] by `expected_rows`, with all queries."""
    q, k, v = (head.transpose(1, 2) for head in (q, k, v))
    return expected_rows(q, k, v, torch.arange(q.shape[2], device=q.device))


def _largest_error(result: Tensor, expected: Tensor) -> float:
    """Return the largest relative error of a group of channels [B, N, heads·d]; a mistake may concern only a few."""
    group = math.gcd(_GROUP_CHANNELS, expected.shape[2])
    result, expected = (t.float().unflatten(2, (-1, group)) for t in (result, expected))
    norms = (torch.linalg.vector_norm(t, dim=(0, 1, 3)) for t in (result - expected, expected))
    return torch.div(*norms).max().item()


def checked_rows(tokens: int, device: torch.device) -> Tensor:
    """Return the indices of the queries to check: evenly spaced, with the first and the last."""
    return torch.linspace(0, tokens - 1, min(tokens, CHECKED_ROWS), device=device).round().long()


def expected_rows(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    """Compute attention of some queries in float32, by its definition.

    Args:
        q: Queries [B, heads, N, d].
        k: Keys [B, heads, M, d].
        v: Values [B, heads, M, d].
        rows: Indices of the queries.

    Returns:
        [B, rows, heads·d], float32.
    """
    scores = q[:, :, rows].float() @ k.float().transpose(2, 3) / math.sqrt(q.shape[3])
    return (F.softmax(scores, dim=3) @ v.float()).transpose(1, 2).flatten(2)
