"""Proves from a compiled engine that the matrix products of FP4 layers read weights of 4 bits.

TensorRT for RTX stores as text what an engine runs. A matrix product has a line
`fully_connected={ name="N" output={…} input={"A" "B" …} …`. N is the name of the layer in the network, followed by
` [profile 1]` in the second optimisation profile, and so on, or several names joined by `+` for a product that computes
several layers with the same input. A constant has a line
`tensor={ … const_payload_size=BYTES … name="B" … type=fp4_e2m1 }` before the lines that refer to it. If the inputs of a
product are FP4 and a constant in FP4, it is a block-scaled product. Otherwise TensorRT has dequantised the weight.

The full TensorRT has not been examined: products that are not found there are reported as not recognised.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.compile.network_layers import all_layers, producers
from engines.compile.results import Fp4Product
from engines.errors import PidError
from engines.manifest import Package

_LINE = re.compile(
    rb'fully_connected=\{ name="(?P<name>[^"\n]*)" output=\{[^}\n]*\} input=\{(?P<inputs>[^}\n]*)\}'
    rb'|tensor=\{[^\n]*? const_payload_size=(?P<bytes>\d+) [^\n]*?name="(?P<constant>[^"\n]*)"[^\n]*?type=(?P<type>\w+)'
)
_PROFILE = re.compile(r" \[profile \d+\]")
_FP4 = "fp4_e2m1"


class ProductError(PidError):
    """A matrix product was not compiled in FP4 as requested."""

    code = "product-differs"


@dataclass(frozen=True)
class RequestedProduct:
    """A matrix product of a network with an FP4 weight."""

    name: str
    nbytes: int  # of the weight's numbers, without scales


def find_fp4_products(module: Any, network: Any) -> tuple[RequestedProduct, ...]:
    """Return the matrix products of a network whose second operand is an FP4 constant.

    Args:
        module: The TensorRT package.
        network: The network definition.

    Raises:
        ProductError: An FP4 constant belongs to no product.
    """
    sources = producers(network)
    found = []
    unused = {name for name, layer in sources.items() if _is_fp4_constant(module, layer)}
    for layer in all_layers(network):
        if layer.type != module.LayerType.MATRIX_MULTIPLY:
            continue
        source = sources.get(layer.get_input(1).name)
        while source is not None and source.type in (module.LayerType.SHUFFLE, module.LayerType.DEQUANTIZE):
            tensor = source.get_input(0)
            source = sources.get(tensor.name)
            if source is not None and _is_fp4_constant(module, source):
                rows, columns = tensor.shape
                found.append(RequestedProduct(layer.name, rows * columns // 2))
                unused.discard(tensor.name)
    if unused:
        raise ProductError(f"The FP4 weight {min(unused)} belongs to no matrix product. Please report this.")
    return tuple(found)


def _is_fp4_constant(module: Any, layer: Any) -> bool:
    return bool(layer.type == module.LayerType.CONSTANT and layer.get_output(0).dtype.name == "FP4")


@dataclass(frozen=True)
class ProductRecord:
    """A matrix product with FP4 weights that one optimisation profile of an engine runs."""

    names: tuple[str, ...]  # of the products of the network that it computes
    nbytes: int  # of the weights of all of them


def read_fp4_products(engine: Path) -> tuple[ProductRecord, ...]:
    """Return the matrix products with FP4 weights in an engine file."""
    constants: dict[str, int] = {}
    found = []
    with engine.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for line in _LINE.finditer(content):
            if line["constant"] is not None:
                # Each optimisation profile has its own constants, perhaps with the names of another one's.
                name, in_fp4 = line["constant"].decode(), line["type"].decode() == _FP4
                constants.pop(name, None)
                if in_fp4:
                    constants[name] = int(line["bytes"])
            else:
                weights = [constants[name] for name in _names(line["inputs"]) if name in constants]
                if weights:
                    names = _PROFILE.sub("", line["name"].decode()).split("+")
                    found.append(ProductRecord(tuple(names), sum(weights)))
    return tuple(found)


def check_fp4_products(
    requested: Sequence[RequestedProduct], records: Sequence[ProductRecord], profiles: int, package: Package
) -> tuple[Fp4Product, ...]:
    """Compare the products of an engine with those of the network that it was compiled from.

    Args:
        requested: The products of the network with FP4 weights.
        records: The products of the engine with FP4 weights.
        profiles: Number of optimisation profiles; each has every product.
        package: The package that compiled the engine.

    Raises:
        ProductError: The weight of a product is not in FP4 in every profile.
    """
    results = []
    sizes = {product.name: product.nbytes for product in requested}
    for product in requested:
        found = [record for record in records if product.name in record.names]
        in_fp4 = [record for record in found if record.nbytes == sum(sizes.get(name, 0) for name in record.names)]
        if len(in_fp4) != profiles and (found or package == "tensorrt-rtx"):
            raise ProductError(
                f"The product {product.name}, whose weight has {product.nbytes:,} bytes in FP4, should occur in the "
                f"engine once per optimisation profile. {package} compiled {len(in_fp4)} of {profiles} in FP4. Please "
                "report this, and build with --precision fp8 until it is fixed."
            )
        results.append(Fp4Product(name=product.name, bytes=product.nbytes, recognised=bool(found)))
    return tuple(results)


def _names(text: bytes) -> Iterator[str]:
    return (name.decode() for name in re.findall(rb'"([^"]*)"', text))
