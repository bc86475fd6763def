"""Powers of two on two kinds of unit: the special function units, and those of ordinary arithmetic.

Since Hopper, attention needs the special function units for about as long as the tensor cores, or longer.
"""

from __future__ import annotations

import triton
import triton.language as tl

_ROUNDING = tl.constexpr(1.5 * 2**23 + 127)  # a float32 plus this is an integer; its lowest bits are that integer + 127


@triton.jit
def _polynomial(x):
    """Compute 2^x of x < 128 with a relative error of 2^-13; 0 for x < -126.5."""
    x = tl.maximum(x, -127.0, propagate_nan=tl.PropagateNan.ALL)
    rounded = x + _ROUNDING
    fraction = x - (rounded - _ROUNDING)  # -0.5..0.5
    power = (rounded.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)
    return (((0.05517128 * fraction + 0.24261109) * fraction + 0.69326106) * fraction + 0.99992808) * power


@triton.jit
def _halves(x):
    return tl.split(x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1))


@triton.jit
def _joined(left, right):
    return tl.join(left, right).permute(0, 2, 1).reshape(left.shape[0], 2 * left.shape[1])


@triton.jit
def exponentials(x, polynomials: tl.constexpr):
    """Compute 2^x of a tile, with `polynomials` a quarter of its columns as polynomials."""
    if polynomials:
        left, right = _halves(x)
        third, fourth = _halves(right)
        result = _joined(tl.exp2(left), _joined(tl.exp2(third), _polynomial(fourth)))
    else:
        result = tl.exp2(x)
    return result
