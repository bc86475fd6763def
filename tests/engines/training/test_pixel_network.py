"""The pixel network: its convolutions are convolutions over cells, and its gates depend on sigma."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from engines.bundled import dct
from engines.training.pixel_network import (
    CELL,
    COARSE_GATE,
    FINE_GATE,
    PixelConv,
    PixelNetwork,
    cell_kernel,
    output_map,
    planes,
    to_image,
)


@pytest.mark.parametrize("radius", [1, 2, 4])
@torch.no_grad()
def test_a_convolution_over_pixels_is_one_over_cells(radius: int) -> None:
    x, layer = torch.randn(2, 2, 12, 16), PixelConv(2, 3, radius)
    cells = F.pad(F.pixel_unshuffle(x, CELL), (1, 1, 1, 1), mode="replicate")  # the outer cells, repeated
    over_cells = F.pixel_shuffle(F.conv2d(cells, cell_kernel(layer.weight)), CELL)
    torch.testing.assert_close(layer(x), over_cells, atol=1e-5, rtol=0)
    inside = slice(radius, -radius)
    plain = F.conv2d(x, layer.weight)
    torch.testing.assert_close(over_cells[..., inside, inside], plain, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_bias_belongs_to_a_position_in_the_cell() -> None:
    layer = PixelConv(1, 1, 1)
    layer.bias[0, 1, 2] = 1.0
    shifted = layer(torch.zeros(1, 1, 8, 12))[0, 0]
    assert shifted[1::CELL, 2::CELL].min() == 1
    assert shifted.sum() == 6  # one in each cell


@torch.no_grad()
def test_planes_and_outputs_are_ycbcr_of_pixels() -> None:
    grey = torch.full((1, 3, 8, 8), 0.25)
    expected = torch.tensor([0.25, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    torch.testing.assert_close(planes(dct.encode(grey)), expected, atol=1e-6, rtol=0)
    values = torch.zeros(1, 48, 1, 1)
    values[:, 6] = 1.0  # luma of the output pixel in row 1, column 2
    image = to_image(values)[0]
    torch.testing.assert_close(image[:, 1, 2], torch.ones(3))
    assert image.abs().sum() == pytest.approx(3, abs=1e-5)


@torch.no_grad()
def test_the_output_map_of_cells_gives_the_same_patches() -> None:
    network, features = PixelNetwork(), torch.randn(2, 16, CELL, CELL)
    patches = features.flatten(1) @ output_map(network.fine + network.coarse)
    image = network.decode(features, torch.zeros(2))
    torch.testing.assert_close(patches.view_as(image), image, atol=1e-4, rtol=0)


@torch.no_grad()
def test_each_part_fades_with_its_own_gate() -> None:
    network, features = PixelNetwork(), torch.randn(1, 16, CELL, CELL)
    sigma, none = torch.full((1,), 0.3), torch.zeros(1)
    for gate, other in ((FINE_GATE, network.coarse), (COARSE_GATE, network.fine)):
        part = PixelNetwork()
        part.load_state_dict(network.state_dict())
        (part.coarse if other is network.coarse else part.fine).zero_()
        faded, full = part.decode(features, sigma), part.decode(features, none)
        torch.testing.assert_close(faded, gate.openness(sigma) * full, atol=1e-5, rtol=0)
    assert FINE_GATE.openness(sigma) < 0.5 < 0.9 < COARSE_GATE.openness(sigma)
