"""The arithmetic of tiles: choice, coverage, overlap and weights."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.runtime.tiles import OVERLAP, TilePlan, plan_tiles, smallest_tiled_size
from engines.size import MAX_SIDE, Size

CELLS = st.sampled_from([16, 32, 64])


@st.composite
def plans(draw: st.DrawFn) -> tuple[TilePlan, int]:
    """Draw the plan of an image that is larger than one of the sizes, and its latent cell."""
    cell = draw(CELLS)
    sides = st.integers(2, 40)
    sizes = draw(st.lists(st.builds(Size, sides, sides), min_size=1, max_size=4))
    tile = draw(st.sampled_from(sizes))
    image = Size(tile.height + draw(st.integers(0, 90)), tile.width + draw(st.integers(1, 90)))
    in_pixels = [Size(cell * height, cell * width) for height, width in (image, *sizes)]
    plan = plan_tiles(in_pixels[0], in_pixels[1:], cell)
    assert plan is not None
    return plan, cell


@given(plans())
def test_tiles_reach_all_edges_of_the_image_and_none_beyond(drawn: tuple[TilePlan, int]):
    plan, _ = drawn
    for edges, side, length in zip((plan.rows, plan.columns), plan.image, plan.tile, strict=True):
        assert edges[0] == 0
        assert edges[-1] + length == side


@given(plans())
def test_edges_are_multiples_of_the_latent_cell(drawn: tuple[TilePlan, int]):
    plan, cell = drawn
    assert all(edge % cell == 0 for edge in plan.rows + plan.columns)


@given(plans())
def test_neighbours_overlap_enough_and_are_evenly_spread(drawn: tuple[TilePlan, int]):
    plan, cell = drawn
    for edges, length in zip((plan.rows, plan.columns), plan.tile, strict=True):
        strides = [after - before for before, after in itertools.pairwise(edges)]
        assert all(length - stride >= min(OVERLAP, length // 2 // cell * cell) for stride in strides)
        assert not strides or max(strides) - min(strides) <= cell


@given(plans())
def test_the_weights_of_every_pixel_are_positive_and_add_up_to_1(drawn: tuple[TilePlan, int]):
    plan, _ = drawn
    total = [np.zeros(side) for side in plan.image]
    for axis, (edges, length) in enumerate(zip((plan.rows, plan.columns), plan.tile, strict=True)):
        step = 1 if axis else len(plan.columns)
        for i, edge in enumerate(edges):
            weights = np.array(plan.weights(i * step)[axis])
            assert (weights > 0).all()
            total[axis][edge : edge + length] += weights
        assert total[axis] == pytest.approx(np.ones(plan.image[axis]))


def test_tiles_are_numbered_row_by_row():
    plan = TilePlan(Size(128, 192), Size(64, 96), (0, 64), (0, 48, 96))
    assert len(plan) == 6
    assert [plan.corner(i) for i in range(6)] == [(0, 0), (0, 48), (0, 96), (64, 0), (64, 48), (64, 96)]


def test_weights_change_linearly_over_the_overlap():
    plan = TilePlan(Size(64, 96), Size(64, 64), (0,), (0, 32))
    rows, columns = plan.weights(0)
    assert rows == [1.0] * 64
    assert columns[:32] == [1.0] * 32
    assert columns[32:] == pytest.approx([1 - (i + 0.5) / 32 for i in range(32)])


@pytest.mark.parametrize(
    ("image", "sizes", "tile", "tiles"),
    [
        ("1024x1024", ["512x512", "256x256"], "512x512", 9),  # larger tiles overlap less
        ("4096x4096", ["2048x2048", "1024x1024"], "1024x1024", 25),  # smaller tiles need less attention
        ("512x1024", ["512x512", "256x256"], "512x512", 3),  # one row: the heights are equal
        ("512x896", ["512x512", "384x512", "512x384"], "512x512", 2),
        ("384x896", ["512x512", "384x512", "256x256"], "384x512", 2),  # the first one does not fit
        ("1536x672", ["1024x512", "512x512"], "512x512", 8),
    ],
)
def test_the_cheapest_tiles_are_chosen(image: str, sizes: list[str], tile: str, tiles: int):
    plan = plan_tiles(Size.parse(image), [Size.parse(size) for size in sizes], 16)
    assert plan is not None
    assert (str(plan.tile), len(plan)) == (tile, tiles)


@pytest.mark.parametrize(
    ("image", "size"),
    [
        ("256x1024", "512x512"),  # does not fit
        ("512x1000", "512x512"),  # not a multiple of the cell
        ("32x64", "32x32"),  # a single cell cannot overlap
    ],
)
def test_other_images_have_no_tiles(image: str, size: str):
    assert plan_tiles(Size.parse(image), [Size.parse(size)], 32) is None


@given(st.lists(st.builds(Size, st.integers(2, 40), st.integers(2, 40)), min_size=1, max_size=4))
def test_the_smallest_tiled_size_has_tiles_and_is_not_one_of_the_sizes(cells: list[Size]):
    sizes = [Size(32 * height, 32 * width) for height, width in cells]
    smallest = smallest_tiled_size(sizes, 32, MAX_SIDE**2)
    assert smallest not in sizes
    assert plan_tiles(smallest, sizes, 32) is not None
    assert smallest_tiled_size(sizes, 32, smallest.area) == smallest
    assert smallest_tiled_size(sizes, 32, smallest.area - 1) is None


def test_sizes_of_one_cell_cannot_overlap():
    assert smallest_tiled_size([Size(32, 32)], 32, MAX_SIDE**2) is None


def test_sizes_that_cannot_be_tiles_do_not_exclude_others():
    assert smallest_tiled_size([Size(32, 32), Size(2048, 2048)], 32, MAX_SIDE**2) is not None
