"""The comparison that `make demo` draws."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from engines.bundled.decoder import DESCRIPTION
from engines.pixels import from_uint8, to_uint8
from engines.size import Size
from loadtest.demo import comparison

DETAIL, ENLARGED, STRIDE, TOP, LEFT = 96, 192, 198, 28, 6  # pixels


def noisy_photo(size: Size, *patches: tuple[int, int, int]) -> torch.Tensor:
    """Grey photo [3, H, W] in [-1, 1] with a square of noise at each (left, top), with the given amplitude."""
    pixels = torch.full((size.height, size.width, 3), 128.0)
    generator = torch.Generator().manual_seed(0)
    for left, top, amplitude in patches:
        noise = torch.randint(-amplitude, amplitude + 1, (DETAIL, DETAIL, 1), generator=generator)
        pixels[top : top + DETAIL, left : left + DETAIL] += noise
    return from_uint8(pixels.to(torch.uint8))


def to_image(photo: torch.Tensor) -> Image.Image:
    return Image.fromarray(to_uint8(photo).permute(1, 2, 0).numpy())


def cell(sheet: Image.Image, column: int, row: int) -> Image.Image:
    left, top = LEFT + column * STRIDE, TOP + row * STRIDE
    return sheet.crop((left, top, left + ENLARGED, top + ENLARGED))


def enlarged(photo: torch.Tensor, left: int, top: int) -> Image.Image:
    detail = to_image(photo).crop((left, top, left + DETAIL, top + DETAIL))
    return detail.resize((ENLARGED, ENLARGED), Image.Resampling.NEAREST)


def test_the_rows_show_what_decoding_restores_and_what_the_latent_lacks():
    restored, lacking = (152, 32, 40), (24, 144, 60)
    photo = noisy_photo(Size(256, 256), restored, lacking)
    decoded = noisy_photo(Size(256, 256), restored)
    sheet = comparison(photo, to_image(decoded))
    for row, (left, top, _) in enumerate((restored, lacking)):
        assert cell(sheet, 3, row) == enlarged(decoded, left, top)
        assert cell(sheet, 4, row) == enlarged(photo, left, top)
        assert cell(sheet, 2, row) != cell(sheet, 1, row)


@pytest.mark.parametrize("size", DESCRIPTION.sizes, ids=str)
def test_a_sheet_of_every_size_fits_into_a_page_and_keeps_the_shape_of_the_photo(size: Size):
    photo = noisy_photo(size, (0, 0, 40))
    sheet = comparison(photo, to_image(photo))
    assert sheet.width <= 1000
    whole, white = cell(sheet, 0, 0), (255, 255, 255)
    assert (whole.getpixel((ENLARGED - 1, ENLARGED // 2)) == white) == (size.width < size.height)
    assert (whole.getpixel((ENLARGED // 2, ENLARGED - 1)) == white) == (size.height < size.width)
