"""Reads from a compiled engine which attention kernels it contains, and compares them with what was requested.

TensorRT for RTX stores, as text, the source of each kernel and a list of the kernels that each optimisation profile
runs. This proves without a GPU whether an attention is one fused kernel, and whether it computes in FP8:

- Sources of attention kernels instantiate `fmha::Kernel_traits_v2…<fmha::X_traits, fmha::Y_traits, …`. X and Y name the
  instructions of the two products, q kᵀ and softmax · v, such as `Ada_qmma_e4m3_fp32` and `Ampere_hmma_bf16`.
- The list has a line `function={ name=… fqn=F … layers="…" }` per kernel, with the name F in its source and the layers
  of the network that it computes.

The full TensorRT has not been examined: kernels that are not found there are reported as not recognised.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from engines.compile.attention import AttentionError, RequestedAttention
from engines.compile.results import AttentionKernels
from engines.manifest import Package

_TRAITS = re.compile(rb"Kernel_traits_v2\w*<\s*fmha::(\w+)_traits,\s*fmha::(\w+)_traits,")
_DEFINITION = re.compile(rb"__global__ void (\w+)\(")
_FUNCTION = re.compile(rb'function=\{ name=\w+ fqn=(\w+) [^\n]*?layers="([^"\n]*)"')
_LAYER_SEPARATOR = "\x1f"
_FP8 = "e4m3"
_FUSED_ATTENTION = re.compile(r"f?mha|flash|fused[_ ]?attention", re.IGNORECASE)


@dataclass(frozen=True)
class KernelRecord:
    """A fused attention kernel that one optimisation profile of an engine runs."""

    products: tuple[str, str]  # instructions of q kᵀ and of softmax · v
    layers: tuple[str, ...]  # descriptions of the layers that it computes

    @property
    def fp8(self) -> bool:
        """Whether both products are computed in FP8.

        Raises:
            AttentionError: Only one of them is.
        """
        in_fp8 = [_FP8 in product for product in self.products]
        if any(in_fp8) != all(in_fp8):
            raise AttentionError(f"An attention kernel computes only one of its products in FP8: {self}.")
        return all(in_fp8)

    def __str__(self) -> str:
        return " + ".join(dict.fromkeys(self.products))


def read_kernel_records(engine: Path) -> tuple[KernelRecord, ...]:
    """Return the fused attention kernels of an engine file, one per attention and optimisation profile."""
    with engine.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        products = {}
        for position in _find_all(content, b"Kernel_traits_v2"):
            traits = _TRAITS.match(content, position)
            definition = traits and _DEFINITION.search(content, traits.end())
            if traits and definition:
                products[definition[1]] = (traits[1].decode(), traits[2].decode())
        functions = (_FUNCTION.match(content, position) for position in _find_all(content, b"function={ name="))
        return tuple(
            KernelRecord(products[function[1]], tuple(function[2].decode().split(_LAYER_SEPARATOR)))
            for function in functions
            if function and function[1] in products
        )


def check_kernels(
    requested: Sequence[RequestedAttention], records: Collection[KernelRecord], profiles: int, package: Package
) -> tuple[AttentionKernels, ...]:
    """Compare the kernels of an engine with the attentions of the network that it was compiled from.

    Args:
        requested: The attentions of the network.
        records: The kernels of the engine.
        profiles: Number of optimisation profiles; each has a kernel for every attention.
        package: The package that compiled the engine.

    Returns:
        The kernels of each attention.

    Raises:
        AttentionError: A kernel has another precision than requested, or the number of kernels is wrong.
    """
    results = []
    for attention in requested:
        found = [record for record in records if attention.description in record.layers]
        if len(found) != profiles and (found or (attention.fp8 and package == "tensorrt-rtx")):
            raise AttentionError(
                f"The engine has {len(found)} kernels for the attention {attention.name} instead of {profiles}, one "
                "per optimisation profile, so its precision cannot be verified. Please report this, with the version "
                f"of {package}."
            )
        for record in found:
            if record.fp8 != attention.fp8:
                wanted = "FP8" if attention.fp8 else "16 bit"
                raise AttentionError(
                    f"The attention {attention.name} was to be computed in {wanted}, but {package} compiled it to the "
                    f"kernel {record}. Please report this, and build with --attention 16bit until it is fixed."
                )
        kernels = tuple(str(record) for record in found)
        results.append(AttentionKernels(name=attention.name, fp8=attention.fp8, kernels=kernels))
    expected = sum(len(result.kernels) for result in results)
    if expected != len(records):
        raise AttentionError(f"The engine has {len(records)} attention kernels, but {expected} were expected.")
    return tuple(results)


def names_fused_attention(layer_information: str) -> bool:
    """Return whether the layer information of an engine on a GPU names a fused attention kernel."""
    return _FUSED_ATTENTION.search(layer_information) is not None


def _find_all(content: mmap.mmap, text: bytes) -> Iterator[int]:
    position = content.find(text)
    while position >= 0:
        yield position
        position = content.find(text, position + 1)
