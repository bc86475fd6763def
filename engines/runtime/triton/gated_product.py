"""The products with w1 and w3 of a `GatedMLP` in FP8, and the gate between them, in one kernel with FP8 output.

It computes the input of w2 in `GatedMLP.compute` (`engines.pid.blocks`), SiLU(w1 x) · (w3 x), rounded to FP8. `compute`
rounds both products, SiLU and the gated product to the dtype of x first; in the kernel they are float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from engines.pid.blocks import GatedMLP
from engines.pid.fp8 import FP8, Fp8Linear, to_fp8
from engines.runtime.triton.architectures import Architecture

_GROUP = 8  # row tiles that are computed for one column tile after the other, so that they share loads in the L2 cache
_LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class GatedConfig:
    """Sizes of the tiles, and the number of programs that compute them.

    Attributes:
        rows: Rows per tile of the output.
        columns: Columns per tile of the output. A program computes as many columns of each product.
        inputs: Columns of the operands that are loaded per step.
        warps: Warps per program.
        stages: Steps whose operands are in shared memory.
        programs: Programs that share the tiles; each loads the first operands of its next tile while it computes the
            last steps and the gate of a tile. 0: one program per tile.
    """

    rows: int
    columns: int
    inputs: int
    warps: int
    stages: int
    programs: int = 0

    def __str__(self) -> str:
        sizes = f"{self.rows}x{self.columns}x{self.inputs}, {self.warps} warps, {self.stages} stages"
        return f"{sizes}, {self.programs} programs" if self.programs else sizes

    @property
    def values(self) -> list[int]:
        """The attributes in their order, as a PyTorch operator accepts them."""
        return [self.rows, self.columns, self.inputs, self.warps, self.stages, self.programs]


CONFIGS: Mapping[Architecture, tuple[GatedConfig, ...]] = {
    "sm_90": (
        GatedConfig(rows=128, columns=128, inputs=128, warps=8, stages=3, programs=132),  # multiprocessors of an H100
        GatedConfig(rows=128, columns=128, inputs=128, warps=8, stages=4),
    ),
    "sm_100": (
        GatedConfig(rows=128, columns=128, inputs=128, warps=8, stages=4),
        GatedConfig(rows=128, columns=64, inputs=128, warps=8, stages=3),  # two programs per multiprocessor
    ),
    "sm_120": (
        GatedConfig(rows=128, columns=64, inputs=64, warps=4, stages=4),  # two programs per multiprocessor
        GatedConfig(rows=128, columns=128, inputs=64, warps=8, stages=5),
    ),
}


@triton.jit
def _gated_product(
    rows,  # [count, inputs] e4m3
    w1,  # [columns, inputs] e4m3
    w3,  # [columns, inputs] e4m3
    scale1,  # [columns] float32
    scale3,  # [columns] float32
    input_scale,  # scalar float32
    output_scale,  # scalar float32
    out,  # [count, columns] e4m3
    count,
    programs,
    inputs: tl.constexpr,
    columns: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
    block_inputs: tl.constexpr,
    group: tl.constexpr,
    persistent: tl.constexpr,
):
    row_tiles = tl.cdiv(count, block_rows)
    column_tiles: tl.constexpr = (columns + block_columns - 1) // block_columns
    k = tl.arange(0, block_inputs)
    factor1 = tl.load(input_scale)
    factor3 = factor1 / tl.load(output_scale)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, programs, flatten=persistent):
        first = tile // (group * column_tiles) * group
        height = tl.minimum(row_tiles - first, group)
        row = (first + tile % (group * column_tiles) % height) * block_rows + tl.arange(0, block_rows)
        first_column = tile % (group * column_tiles) // height * block_columns

        # Programs load the last row instead of rows beyond it, which needs no mask in the loop.
        x_pointers = rows + tl.minimum(row, count - 1).to(tl.int64)[:, None] * inputs + k[None, :]
        # The rows of both weights are one operand, so that tensor cores read x from shared memory once.
        side = tl.arange(0, 2 * block_columns)
        weight_row = tl.minimum(first_column + side % block_columns, columns - 1)
        weights = tl.where(side < block_columns, w1, w3) + weight_row.to(tl.int64) * inputs
        w_pointers = weights[None, :] + k[:, None]
        sums = tl.zeros([block_rows, 2 * block_columns], tl.float32)
        for start in range(0, inputs, block_inputs):
            if inputs % block_inputs:
                x = tl.load(x_pointers + start, mask=(start + k < inputs)[None, :], other=0.0)
                w = tl.load(w_pointers + start, mask=(start + k < inputs)[:, None], other=0.0)
            else:
                x = tl.load(x_pointers + start)
                w = tl.load(w_pointers + start)
            sums = tl.dot(x, w, sums)

        product1, product3 = tl.split(sums.reshape(block_rows, 2, block_columns).permute(0, 2, 1))
        column = first_column + tl.arange(0, block_columns)
        inside = column < columns
        gate = product1 * (factor1 * tl.load(scale1 + column, mask=inside))[None, :]
        value = product3 * (factor3 * tl.load(scale3 + column, mask=inside))[None, :]
        gated = gate / (1 + tl.exp2(gate * -_LOG2_E)) * value
        pointers = out + row.to(tl.int64)[:, None] * columns + column[None, :]
        tl.store(pointers, gated.to(tl.float8e4nv), mask=(row < count)[:, None] & inside[None, :])  # saturates


def gated_product(
    rows: Tensor,
    w1: Tensor,
    w3: Tensor,
    scale1: Tensor,
    scale3: Tensor,
    input_scale: Tensor,
    output_scale: Tensor,
    config: Sequence[int],
) -> Tensor:
    """Launch the kernel.

    Args:
        rows: Rounded inputs [M, inputs], FP8.
        w1: Weight [columns, inputs] of the product that SiLU is applied to, FP8.
        w3: Weight of the other product, FP8.
        scale1: Scales [columns] of w1, float32.
        scale3: Scales [columns] of w3, float32.
        input_scale: Scale of the rows, a scalar; float32 and a power of two.
        output_scale: Scale of the result, in the same form.
        config: Values of a `GatedConfig`.

    Returns:
        The gated product [M, columns], FP8.

    Raises:
        ValueError: The rows or a weight are not contiguous.
    """
    if not all(tensor.is_contiguous() for tensor in (rows, w1, w3)):
        raise ValueError("Rows and weights must be contiguous.")
    count, inputs = rows.shape
    columns = w1.shape[0]
    out = torch.empty(count, columns, dtype=FP8, device=rows.device)
    tile = GatedConfig(*config)
    tiles = triton.cdiv(count, tile.rows) * triton.cdiv(columns, tile.columns)
    programs = min(tile.programs or tiles, tiles)
    _gated_product[(programs,)](
        rows,
        w1,
        w3,
        scale1,
        scale3,
        input_scale,
        output_scale,
        out,
        count,
        programs,
        inputs=inputs,
        columns=columns,
        block_rows=tile.rows,
        block_columns=tile.columns,
        block_inputs=tile.inputs,
        group=_GROUP,
        persistent=tile.programs > 0,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


_operator = torch.library.custom_op("pid::gated_product", gated_product, mutates_args=())


@_operator.register_fake
def _(rows: Tensor, w1: Tensor, *others: object) -> Tensor:
    return rows.new_empty(rows.shape[0], w1.shape[0])


def supports(module: GatedMLP) -> bool:
    """Return whether `gated_mlp` computes a module: its layers are in FP8, and w1 and w3 have the same input scale.

    This waits for the device, because it compares values.
    """
    modules: tuple[nn.Module, ...] = (module.w1, module.w2, module.w3)
    layers = [layer for layer in modules if isinstance(layer, Fp8Linear)]
    return (
        len(layers) == 3
        and all(layer.has_tensor_core_sides and layer.bias is None for layer in layers)
        and torch.equal(layers[0].input_scale, layers[2].input_scale)
    )


def gated_mlp(config: GatedConfig, module: GatedMLP, x: Tensor) -> Tensor:
    """Return what `GatedMLP.compute` does, of a module that `supports` accepts; a hook for `GatedMLP.kernel`.

    Args:
        config: Sizes of the tiles.
        module: The module, with w1 and w3 that have the same input scale.
        x: Inputs [..., width].

    Returns:
        The result [..., width] in the dtype of x.
    """
    w1, w2, w3 = cast("tuple[Fp8Linear, Fp8Linear, Fp8Linear]", (module.w1, module.w2, module.w3))
    rows = to_fp8(x, w1.input_scale).flatten(0, -2)  # torch.compile computes this with the norm before it
    gated = _operator(
        rows,
        w1.weight,
        w3.weight,
        w1.weight_scale,
        w3.weight_scale,
        w1.input_scale,
        w2.input_scale,
        config.values,
    )
    return w2.multiply_rounded(gated.unflatten(0, x.shape[:-1]), x.dtype)
