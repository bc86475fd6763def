"""Inputs that are copied to the device."""

import pytest
import torch

from engines.runtime.staging import StagedInput


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def staged(request: pytest.FixtureRequest) -> StagedInput:
    return StagedInput(12, torch.device(request.param))


def test_values_arrive_in_a_buffer_that_does_not_move(staged: StagedInput):
    address = staged.view((1, 3, 2)).data_ptr()
    for values in (torch.arange(6.0).view(3, 2), torch.arange(6).view(3, 2).bfloat16() + 1):
        staged.write(values)
        assert torch.equal(staged.view((1, 3, 2))[0].cpu(), values.float())
    assert staged.view((12,)).data_ptr() == address


def test_values_on_the_device_are_copied_there(staged: StagedInput):
    values = torch.ones(12, device=staged.view((12,)).device)
    staged.write(values)
    assert torch.equal(staged.view((12,)), values)
