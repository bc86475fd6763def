"""Selection of rows from the arena."""

from __future__ import annotations

import math

import pytest
import torch

from engines.runtime.slots import LazyGather, select

INDEX = torch.tensor([2, 0])


def test_rows_of_slots_that_are_not_adjacent():
    slots = torch.randn(3, 64)
    view = slots[:, 16:48].unflatten(1, (2, 16))
    assert torch.equal(select(view, INDEX), view[INDEX])


def test_elements_of_one_axis():
    values = torch.arange(8.0)
    assert torch.equal(select(values, INDEX), values[INDEX])


@pytest.mark.parametrize("shape", [(3, 4, 48), (3, 2, 3, 8), (3, 1), (3, 5, 6)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_copied_bit_by_bit(shape: tuple[int, ...], dtype: torch.dtype):
    tensor = torch.randn(shape).to(dtype)
    tensor[2, ..., 0] = math.nan
    tensor[0, ..., 0] = -0.0
    out = torch.empty(2, *shape[1:], dtype=dtype)
    LazyGather([tensor], INDEX).copy_to(0, out)
    for selected in (select(tensor, INDEX), LazyGather([tensor], INDEX)[0], out):
        assert selected.dtype == dtype
        assert torch.equal(selected.view(torch.uint8), tensor[INDEX].view(torch.uint8))
