"""Verifies that no value of a network in float16 comes close to the largest one that float16 can represent."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from engines.compile.inputs.calibrate import Calibration, decode
from engines.compile.verify_fold import VerificationError
from engines.pid import FoldedDecoder

_LARGEST = torch.finfo(torch.float16).max  # 65,504
_LIMIT = _LARGEST / 2  # other latents have larger values


def verify_range(
    network: FoldedDecoder, calibration: Calibration, empty_caption: Tensor, progress: Callable[[str], None]
) -> float:
    """Decode all samples, and check every float16 value that an operator of the network computes.

    Args:
        network: In float16.
        calibration: Latents that represent the requests to expect.
        empty_caption: [T, E], for samples without a caption.
        progress: Called with a description of each decode.

    Returns:
        The largest magnitude.

    Raises:
        VerificationError: A value is larger than half of what float16 can represent.
    """
    with _Range(network) as found:
        for seed, item in enumerate(calibration.samples):
            progress(f"range of float16, latent {seed + 1} of {len(calibration.samples)}")
            found.source = item.source
            decode(network, item, empty_caption, seed)
    return found.largest


class _Range(TorchDispatchMode):
    """Context in which every float16 result of an operator is checked."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.source = ""  # what is decoded
        self.largest = 0.0
        self._network = network
        self._layers: list[str] = []  # names of the modules that run, from the outside to the inside
        self._hooks = contextlib.ExitStack()

    def __enter__(self) -> _Range:
        for name, module in self._network.named_modules():
            if name:
                self._hooks.enter_context(self._entered(name, module))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hooks.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and check its results."""
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float16 and tensor.numel():
                self._check(tensor.abs().max().item())
        return result

    def _check(self, value: float) -> None:
        if not value <= _LIMIT:  # also for NaN
            layer = self._layers[-1] if self._layers else "The network"
            reached = f"reaches {value:,.0f}" if value <= _LARGEST else "overflows"
            raise VerificationError(
                f"{layer} {reached} in float16, whose largest value is {_LARGEST:,.0f}, when {self.source} is decoded. "
                "Use --precision bf16."
            )
        self.largest = max(self.largest, value)

    @contextlib.contextmanager
    def _entered(self, name: str, module: nn.Module) -> Iterator[None]:
        """Record while a module runs, until the end of the block."""

        def enter(_module: nn.Module, _inputs: object) -> None:
            self._layers.append(name)

        def leave(_module: nn.Module, _inputs: object, _output: object) -> None:
            self._layers.pop()

        before, after = module.register_forward_pre_hook(enter), module.register_forward_hook(leave)
        try:
            yield
        finally:
            before.remove()
            after.remove()
