"""Tensors to send: from arrays of any package to little-endian elements, and to safetensors files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pid_client.dlpack import copy_elements, unsupported

# dtype -> name in safetensors, and the dtype that stores the elements
DTYPES: dict[str, tuple[str, np.dtype[Any]]] = {
    "float16": ("F16", np.dtype(np.float16)),
    "bfloat16": ("BF16", np.dtype(np.uint16)),
    "float32": ("F32", np.dtype(np.float32)),
}


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor on the CPU.

    Raises when constructed:
        ValueError: `data` is not C-contiguous or does not have the dtype that stores `dtype`.
    """

    dtype: str  # float16, bfloat16 or float32
    data: np.ndarray  # C-contiguous, float16 or float32; uint16 with the bits of bfloat16

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES or self.data.dtype != DTYPES[self.dtype][1] or not self.data.flags.c_contiguous:
            raise ValueError(
                f"Cannot store {self.dtype} as {self.data.dtype} with the strides {self.data.strides}; use to_tensor."
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of each dimension."""
        return self.data.shape

    def to_float32(self) -> np.ndarray:
        """Return the values as float32; of a float32 tensor, its data itself."""
        if self.dtype != "bfloat16":
            return self.data.astype(np.float32, copy=False)
        bits = self.data.astype(np.uint32)
        bits <<= 16  # bfloat16 is the upper half of a float32
        return bits.view(np.float32)

    def copy(self) -> Tensor:
        """Return a tensor that shares no memory with this one."""
        return Tensor(self.dtype, self.data.copy())

    def __getitem__(self, items: slice) -> Tensor:
        """Return some items along the first axis, such as `batch[2:3]`, with the same number of dimensions."""
        return Tensor(self.dtype, np.asarray(self.data[items], order="C"))


def to_tensor(value: Any) -> Tensor:
    """Return `value` as a tensor.

    Args:
        value: A numpy array, a tensor of torch, JAX or another package that supports DLPack, on any device, a nested
            list of numbers, or a list of arrays or tensors of one shape and dtype, which are stacked. float64 and
            numbers become float32. A `Tensor` is returned unchanged.

    Raises:
        TypeError: The type or the dtype is not supported.
        ValueError: The items of a list differ in shape or dtype.
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray):
        return _from_numpy(value)
    if hasattr(value, "__dlpack_device__"):
        dtype, data = copy_elements(value)
        return Tensor(dtype, data) if dtype in DTYPES else _from_numpy(data)
    if isinstance(value, list | tuple) and value:
        return _from_list(value)
    raise TypeError(
        f"Cannot use {type(value).__name__!r} as a tensor; pass a numpy array, a tensor of torch or JAX, "
        "or a nested list of numbers."
    )


def save_safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Return the tensors as a safetensors file: 8 bytes of header length, a JSON header, the elements.

    Wider elements come first and the header's length is a multiple of 8 bytes, so that all elements are aligned.
    """
    header, elements, end = {}, [], 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].data.itemsize):
        begin, end = end, end + tensor.data.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype][0], "shape": tensor.shape, "data_offsets": (begin, end)}
        little_endian = tensor.data.astype(tensor.data.dtype.newbyteorder("<"), copy=False)
        elements.append(little_endian.reshape(-1).view(np.uint8).data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *elements])


def _from_numpy(array: np.ndarray) -> Tensor:
    name = array.dtype.name
    if name == "bfloat16":  # of ml_dtypes
        return Tensor("bfloat16", np.asarray(array, order="C").view(np.uint16))
    if name == "float64":
        name = "float32"
    if name not in DTYPES:
        raise unsupported(array.dtype)
    with np.errstate(over="ignore"):  # infinity, which the server rejects
        return Tensor(name, np.asarray(array, DTYPES[name][1], order="C"))


def _from_list(values: list[Any] | tuple[Any, ...]) -> Tensor:
    if isinstance(values[0], Tensor | np.ndarray) or hasattr(values[0], "__dlpack_device__"):
        items = [to_tensor(value) for value in values]
        if len({(item.dtype, item.shape) for item in items}) > 1:
            kinds = ", ".join(f"{item.dtype} {list(item.shape)}" for item in items[:8])
            raise ValueError(f"The tensors of a list must have the same shape and dtype, not {kinds}.")
        return Tensor(items[0].dtype, np.stack([item.data for item in items]))
    try:
        array = np.asarray(values)
    except ValueError:
        raise ValueError("The nested list is ragged; all lists at a level must have the same length.") from None
    if array.dtype.kind not in "iuf":
        raise TypeError(f"The nested list contains values other than numbers (dtype {array.dtype}).")
    return _from_numpy(array.astype(np.float64))
