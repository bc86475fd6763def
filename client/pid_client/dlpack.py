"""Copy tensors of other packages into numpy arrays through DLPack, bfloat16 included, which numpy cannot import.

A producer's `__dlpack__()` returns a capsule named "dltensor" with a pointer to a `DLManagedTensor`, whose first member
is the `DLTensor` (https://dmlc.github.io/dlpack/latest/c_api.html). A consumer that keeps the tensor renames the
capsule and calls the tensor's deleter later. Here the elements are copied and the capsule keeps its name, so that its
own destructor frees the tensor.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np

CPU = 1
HOST_DEVICES = frozenset({CPU, 3, 11})  # 3 and 11 are pinned memory of CUDA and of ROCm

# (code, bits, lanes) -> name, and the dtype that stores the elements
DTYPES: dict[tuple[int, int, int], tuple[str, type[np.generic]]] = {
    (2, 16, 1): ("float16", np.float16),
    (2, 32, 1): ("float32", np.float32),
    (2, 64, 1): ("float64", np.float64),
    (4, 16, 1): ("bfloat16", np.uint16),
}


class _Device(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int32), ("index", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),  # in elements; NULL if the tensor is contiguous
        ("byte_offset", ctypes.c_uint64),
    )


# ctypes.pythonapi.PyCapsule_GetPointer is shared with other packages, which may set other types of arguments.
_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def copy_elements(producer: Any) -> tuple[str, np.ndarray]:
    """Return the dtype's name and a C-contiguous copy of a tensor that supports DLPack, on any device.

    The array is float16, float32 or float64; if the name is bfloat16, it is uint16 and holds the bits.

    Raises:
        TypeError: The dtype is not supported, or the tensor cannot be copied to the CPU.
    """
    try:
        host = _on_cpu(producer)
        capsule = _capsule(host)
        address = _capsule_pointer(capsule, b"dltensor")
    except (BufferError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        name = f"{type(producer).__module__}.{type(producer).__qualname__}"
        raise TypeError(f"Cannot read this {name} ({error}); convert it to a numpy array.") from error
    tensor = _DLTensor.from_address(address)  # valid as long as `capsule`
    dtype = (tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes)
    if dtype not in DTYPES:
        raise unsupported(getattr(producer, "dtype", "of DLPack's type code {}, {} bits, {} lanes".format(*dtype)))
    name, stored = DTYPES[dtype]
    return name, _copy(tensor, np.dtype(stored))


def unsupported(dtype: object) -> TypeError:
    """Return the error for an unsupported dtype."""
    return TypeError(f"The tensor has the dtype {dtype}; convert it to float16, bfloat16 or float32.")


def _on_cpu(producer: Any) -> Any:
    """Return the tensor without its gradient, on the CPU, if its methods can do that, as those of torch can."""
    for method in ("detach", "cpu", "resolve_neg"):  # DLPack ignores torch's lazy negation
        if hasattr(producer, method):
            producer = getattr(producer, method)()
    return producer


def _capsule(producer: Any) -> object:
    if producer.__dlpack_device__()[0] in HOST_DEVICES:
        return producer.__dlpack__()
    return producer.__dlpack__(dl_device=(CPU, 0), copy=True)


def _copy(tensor: _DLTensor, dtype: np.dtype[Any]) -> np.ndarray:
    shape = tuple(tensor.shape[: tensor.ndim])
    if math.prod(shape) == 0:  # without elements, the pointer may be NULL
        return np.empty(shape, dtype)
    first = (ctypes.c_char * dtype.itemsize).from_address(tensor.data + tensor.byte_offset)
    strides = tensor.strides[: tensor.ndim] if tensor.strides else _contiguous(shape)
    view = np.lib.stride_tricks.as_strided(
        np.frombuffer(memoryview(first), dtype), shape, [stride * dtype.itemsize for stride in strides]
    )
    return view.copy(order="C")


def _contiguous(shape: tuple[int, ...]) -> list[int]:
    """Return the strides, in elements, of an array in C order."""
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
