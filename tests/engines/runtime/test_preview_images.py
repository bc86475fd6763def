"""Previews of large images."""

from __future__ import annotations

import pytest
import torch

from engines.pid.sampler import STEP_TRANSITIONS
from engines.pixels import to_uint8
from engines.runtime.previews import preview
from engines.runtime.protocol import preview_size
from engines.size import Size


@pytest.mark.parametrize(
    ("image", "small"),
    [
        (Size(2048, 2048), Size(512, 512)),
        (Size(1536, 2688), Size(256, 448)),
        (Size(2688, 1536), Size(896, 512)),
        (Size(1728, 2304), Size(346, 461)),
        (Size(64, 96), Size(64, 96)),
        (Size(64, 40_000), Size(1, 507)),
    ],
)
def test_previews_are_at_most_512_pixels_wide_and_scaled_down_by_an_integer(image: Size, small: Size):
    assert preview_size(image) == small


@pytest.mark.parametrize("next_t", sorted({next_t for _, next_t in STEP_TRANSITIONS}))
def test_the_noise_of_the_step_is_removed(next_t: float):
    rows, columns = torch.linspace(-1, 1, 1024)[:, None], torch.linspace(-1, 1, 1536)
    x0 = torch.stack((rows.expand(1024, 1536), columns.expand(1024, 1536), rows * columns))
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    pixels = preview(((1 - next_t) * x0 + next_t * noise)[None], noise[None], torch.tensor([next_t]))
    assert pixels.shape == (342, 512, 3)  # the last row is the average of the one that is left over
    whole = x0[:, :1023].unflatten(1, (341, 3)).unflatten(3, (512, 3)).mean((2, 4))  # [3, 341, 512]
    last = x0[:, 1023:].unflatten(2, (512, 3)).mean(3)  # [3, 1, 512]
    expected = to_uint8(torch.cat((whole, last), dim=1)).permute(1, 2, 0)
    assert (pixels.int() - expected.int()).abs().max() <= 1
