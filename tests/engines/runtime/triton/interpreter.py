"""Triton's interpreter, corrected: it runs kernels on the CPU with NumPy. Import it before any module with kernels.

Triton 3.6 and 3.7 convert to narrower floats with the wrong rounding: 31.6 becomes 16 in FP8, because the carry into
the exponent is lost, and halves are rounded up. Here PyTorch converts, as the hardware does. Products of bf16 matrices
are those of their bits, as integers. Triton 3.6 also fails on `range` over a value that is only known at run time, with
NumPy 2.4 and newer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton import knobs
from triton.language import standard
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

DTYPES = {
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
BITS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}

triton_convert, triton_patch = interpreter._convert_float, interpreter._patch_lang_tensor
triton_dot = interpreter.InterpreterBuilder.create_dot


def convert_float(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
    """Convert the bits of floats to another format, rounding to the nearest even value; FP8 saturates."""
    if str(source) not in DTYPES or str(target) not in DTYPES:
        return triton_convert(data, source, target, rounding)
    values = torch.from_numpy(np.array(data)).view(DTYPES[str(source)]).float()
    dtype = DTYPES[str(target)]
    if dtype.itemsize == 1:
        values = values.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)  # keeps NaN
    return values.to(dtype).view(BITS[dtype.itemsize]).numpy().reshape(data.shape)


def patch_tensor(tensor: Any, *arguments: Any) -> Any:
    scope = triton_patch(tensor, *arguments)
    tensor.__index__ = lambda self: int(self.handle.data.item())
    return scope


def create_dot(builder: Any, a: Any, b: Any, *arguments: Any) -> Any:
    return triton_dot(builder, *map(without_bf16, (a, b)), *arguments)


def without_bf16(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    values = convert_float(handle.data, tl.bfloat16, tl.float32, None).view(np.float32)
    return interpreter.TensorHandle(values, tl.float32)


def interpret_library() -> None:
    """Replace the functions of Triton's library, such as `tl.sum`: Triton may have been imported long before."""
    for name, function in list(vars(standard).items()):
        if isinstance(function, JITFunction):
            interpreted = interpreter.InterpretedFunction(function.fn)
            setattr(standard, name, interpreted)
            if getattr(tl, name, None) is function:
                setattr(tl, name, interpreted)


interpreter._convert_float = convert_float
interpreter._patch_lang_tensor = patch_tensor
interpreter.InterpreterBuilder.create_dot = create_dot
knobs.runtime.interpret = True
interpret_library()
