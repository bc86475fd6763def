"""The machines that bundles are built for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engines.errors import ConfigError
from engines.manifest import Precision


@dataclass(frozen=True)
class Target:
    """What a bundle's builder has to know of the machine it builds for."""

    name: str
    compiler: Literal["torch", "tensorrt-rtx", "tensorrt"]  # "torch": nothing is compiled, PyTorch runs the weights
    precisions: tuple[Precision, ...]  # the default first
    compute_capability: tuple[int, int] | None = None  # None: any
    memory_gb: int | None = None  # on one device


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("cpu", "torch", ("fp32", "bf16", "fp16")),
        Target("cuda", "torch", ("bf16", "fp16", "fp32")),
        # Engines for it build on any machine; those for the other two only on a machine with that GPU.
        Target("rtx5090", "tensorrt-rtx", ("bf16", "fp16"), (12, 0), 32),
        Target("gb200", "tensorrt", ("bf16", "fp16"), (10, 0), 186),
        Target("h200", "tensorrt", ("bf16", "fp16"), (9, 0), 141),
    )
}


def buildable(name: str) -> Target:
    """The target of that name. Raises ConfigError where there is none, or nothing can be built for it yet."""
    if name not in TARGETS:
        raise ConfigError(f"There is no target called {name!r}. Known are {', '.join(TARGETS)}.")
    target = TARGETS[name]
    if target.compiler != "torch":
        raise ConfigError(
            f"This version does not compile TensorRT engines for {name} yet; build for cuda, which runs there too."
        )
    return target
