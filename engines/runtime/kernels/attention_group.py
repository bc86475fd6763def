"""Attentions for which one implementation is chosen, and how to run and to install it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from engines.pid.blocks import AttentionKernel, Heads, JointAttention, SelfAttention, attend
from engines.runtime.kernels.choice import Candidate
from engines.runtime.kernels.workload import Workload

MAX_ERROR = 0.02  # relative; one wrong row in one of 24 heads is above it, rounding to bfloat16 well below
MAX_FP8_ERROR = 0.1  # rounding random queries, keys, values and numerators to FP8 changes the result by 4 to 6 %

MakeHeads = Callable[..., Heads]  # as `make_heads` of the attentions


@dataclass(frozen=True)
class AttentionGroup:
    """Attentions of one kind and precision, and inputs for the first of them."""

    name: str
    modules: tuple[JointAttention | SelfAttention, ...]
    inputs: tuple[Any, ...]  # arguments of `forward`

    @property
    def sample(self) -> JointAttention | SelfAttention:
        """The attention that is measured."""
        return self.modules[0]

    def candidate(self, make_heads: MakeHeads, kernel: AttentionKernel) -> Candidate:
        """Return attention by a kernel of PyTorch, of heads that `make_heads`, possibly compiled, computes."""
        return Candidate(partial(self._attend, make_heads, kernel), partial(self._install, None, kernel), MAX_ERROR)

    def own_candidate(self, workload: Workload, heads: MakeHeads, kernel: AttentionKernel) -> Candidate:
        """Return attention in 16 bits, of heads that a kernel of this project computes."""
        run, install = partial(self._attend, workload.optimise(heads), kernel), partial(self._install, heads, kernel)
        return Candidate(run, install, MAX_ERROR, own=True)

    def fp8_candidate(self, workload: Workload, heads: MakeHeads, kernel: Callable[..., Tensor]) -> Candidate:
        """Return attention in FP8. `kernel`, a `Fp8Attention.kernel`, has the scales of each module as its argument."""

        def install() -> None:
            self._install(heads, None)
            for module in self.modules:
                module.fp8.kernel = kernel  # type: ignore[union-attr]  # it exists in this group

        run = partial(self._attend, workload.optimise(heads), partial(kernel, self.sample.fp8))
        return Candidate(run, install, MAX_FP8_ERROR, own=True)

    def _attend(self, make_heads: MakeHeads, kernel: AttentionKernel) -> Tensor:
        return attend(*make_heads(self.sample, *self.inputs), kernel)

    def _install(self, heads: MakeHeads | None, kernel: AttentionKernel | None) -> None:
        for module in self.modules:
            module.heads, module.kernel = heads, kernel
