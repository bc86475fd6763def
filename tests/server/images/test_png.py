"""The PNG encoder: exact pixels from any strips, valid files and rejected arguments."""

from __future__ import annotations

import io
import itertools
import struct
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from server.images import png, png_filters


@pytest.fixture(scope="module", autouse=True)
def _compiled():
    png.warm_up()


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return smooth shapes with edges and a little noise, so that short codes, long codes and runs all occur."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    shade = 120 + 60 * np.sin(x / 37) + 50 * np.cos(y / 23) + 30 * ((x // 61 + y // 47) % 2)
    noise = rng.normal(0, 2.5, (height, width, 3)) * (x > width // 3)[..., None]
    return np.clip(shade[..., None] * (0.8, 1.0, 0.9) + noise, 0, 255).astype(np.uint8)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def gradient(height: int, width: int) -> np.ndarray:
    return np.stack(np.broadcast_arrays(np.arange(height)[:, None], np.arange(width)[None], 7), -1).astype(np.uint8)


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """Return kind and content of every chunk, after checking lengths and CRCs."""
    assert data.startswith(png.SIGNATURE)
    found, at = [], len(png.SIGNATURE)
    while at < len(data):
        (size,) = struct.unpack_from(">I", data, at)
        kind, content = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert struct.unpack_from(">I", data, at + 8 + size) == (zlib.crc32(kind + content),)
        found.append((kind, content))
        at += 12 + size
    assert at == len(data)
    return found


def assert_exact(data: bytes, pixels: np.ndarray) -> None:
    """Check that the zlib stream is complete and that Pillow reads exactly these pixels."""
    idat = b"".join(content for kind, content in chunks(data) if kind == b"IDAT")
    assert len(zlib.decompress(idat)) == pixels.shape[0] * (1 + 3 * pixels.shape[1])
    image = Image.open(io.BytesIO(data))
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), pixels)


def encode_in_strips(pixels: np.ndarray, edges: list[int], compression: png.Compression = "fast") -> bytes:
    height, width, _ = pixels.shape
    strips = [
        png.encode_strip(pixels[a:b], pixels[a - 1] if a else None, compression) for a, b in itertools.pairwise(edges)
    ]
    tail = png.png_tail(strip.checksum for strip in strips)
    return png.png_head(width, height) + b"".join(strip.data for strip in strips) + tail


IMAGES = {
    "photo": photo(301, 517),
    "gradient": gradient(260, 260),
    "black": np.zeros((200, 300, 3), np.uint8),
    "white": np.full((200, 300, 3), 255, np.uint8),
    "noise": noise(150, 211),
    "half noise": np.concatenate([noise(40, 600), np.zeros((200, 600, 3), np.uint8)]),
    "one pixel": noise(1, 1),
    "one row": photo(1, 999),
    "one column": photo(999, 1),
    "one flat row": np.zeros((1, 70_000, 3), np.uint8),
    "rows longer than a block": photo(3, 40_000),
}


@pytest.mark.parametrize("compression", ["fast", "best", "none"])
@pytest.mark.parametrize("name", IMAGES)
def test_images_are_read_back_exactly(name, compression):
    assert_exact(png.encode(IMAGES[name], compression=compression), IMAGES[name])


@pytest.mark.parametrize("width", range(1, 20))
def test_any_width_is_read_back_exactly(width):
    for pixels in (photo(70, width), np.zeros((70, width, 3), np.uint8)):
        assert_exact(png.encode(pixels), pixels)


@settings(max_examples=60)
@given(st.data())
def test_any_image_in_any_strips_is_read_back_exactly(data):
    height, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 60))
    shift = data.draw(st.sampled_from([0, 6, 7, 8]))  # few levels make runs
    pixels = (noise(height, width, data.draw(st.integers(0, 99))).astype(np.uint16) >> shift).astype(np.uint8)
    edges = sorted({0, height, *data.draw(st.lists(st.integers(0, height), max_size=5))})
    assert_exact(encode_in_strips(pixels, edges, data.draw(st.sampled_from(["fast", "best", "none"]))), pixels)


@settings(max_examples=100)
@given(st.integers(1, 20_000), st.integers(1, 20_000))
def test_strip_bounds_cover_every_row_once(width, height):
    bounds = png.strip_bounds(width, height)
    assert [row for start, stop in bounds for row in (start, stop)][1:-1:2] == [start for start, _ in bounds[1:]]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == height
    assert all(start < stop for start, stop in bounds)
    assert all(stop - start >= bounds[0][1] for start, stop in bounds[:-1])


def test_strips_encoded_by_threads_in_any_order_have_the_same_bytes():
    pixels = photo(700, 400)
    bounds = png.strip_bounds(400, 700)
    assert len(bounds) > 5

    def strip(bound: tuple[int, int]) -> png.Strip:
        start, stop = bound
        return png.encode_strip(pixels[start:stop], pixels[start - 1] if start else None)

    with ThreadPoolExecutor(4) as pool:
        strips = list(pool.map(strip, reversed(bounds)))[::-1]
    whole = png.png_head(400, 700) + b"".join(s.data for s in strips) + png.png_tail(s.checksum for s in strips)
    assert whole == png.encode(pixels)


def test_compressions_are_ordered_by_size_on_a_photo():
    pixels = photo(512, 512)
    best, fast, none = (len(png.encode(pixels, compression=name)) for name in ("best", "fast", "none"))
    assert best < fast < none / 1.5


def test_noise_is_stored_and_flat_areas_need_almost_no_bytes():
    assert len(png.encode(noise(256, 256))) < 1.002 * 256 * 256 * 3 + 500
    assert len(png.encode(np.zeros((1024, 1024, 3), np.uint8))) < 0.006 * 1024 * 1024 * 3


def test_srgb_is_declared_before_the_pixels():
    kinds = dict(chunks(png.encode(photo(4, 5))))
    assert kinds[b"sRGB"] == b"\0"
    assert kinds[b"gAMA"] == struct.pack(">I", 45455)
    assert len(kinds[b"cHRM"]) == 32
    order = list(kinds)
    assert order.index(b"sRGB") < order.index(b"IDAT")
    assert Image.open(io.BytesIO(png.encode(photo(4, 5)))).info["srgb"] == 0


def test_text_is_read_back_as_latin_1_or_unicode():
    text = {"Title": "Wörld", "Description": "日本 → π", "Seed": "42", "Größe": "2\n3"}
    data = png.encode(photo(4, 5), text=text)
    assert Image.open(io.BytesIO(data)).text == text
    assert [kind for kind, _ in chunks(data)].count(b"iTXt") == 1


@pytest.mark.parametrize("keyword", ["", "a" * 80, " a", "a ", "a  b", "a\0b", "a\nb", "日本", "a\xa0b"])
def test_an_invalid_text_keyword_is_rejected(keyword):
    with pytest.raises(ValueError, match="keyword"):
        png.png_head(1, 1, {keyword: "value"})


def test_text_with_nul_is_rejected():
    with pytest.raises(ValueError, match="NUL"):
        png.png_head(1, 1, {"Title": "a\0b"})


@pytest.mark.parametrize(
    "rows",
    [
        photo(4, 5).astype(np.float32),
        photo(4, 5)[..., 0],
        np.zeros((4, 5, 4), np.uint8),
        np.zeros((0, 5, 3), np.uint8),
        photo(4, 10)[:, ::2],
    ],
    ids=["dtype", "no channels", "four channels", "no rows", "not contiguous"],
)
def test_unsupported_arrays_are_rejected(rows):
    with pytest.raises(ValueError, match="pixels must be"):
        png.encode_strip(rows, None)


def test_unsupported_arguments_are_rejected():
    with pytest.raises(ValueError, match="row above"):
        png.encode_strip(photo(4, 5), photo(1, 6)[0])
    with pytest.raises(ValueError, match="compression must be one of fast, best, none"):
        png.encode(photo(4, 5), compression="most")
    for size in ((0, 1), (1, 0), (2**31, 1)):
        with pytest.raises(ValueError, match="pixels per side"):
            png.png_head(*size)


def test_read_only_pixels_are_encoded_without_compiling_again():
    pixels = photo(20, 30)
    expected = png.encode(pixels)
    before = len(png_filters.paeth.signatures)
    pixels.setflags(write=False)
    assert png.encode(pixels) == expected
    assert len(png_filters.paeth.signatures) == before


def test_scratch_memory_is_reused_by_later_strips():
    images = [photo(60, 400, seed) for seed in range(5)]
    filtered_bytes = 60 * (1 + 3 * 400)
    png.encode_strip(images[0], None)
    tracemalloc.start()
    try:
        for image in images:
            before, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            size = len(png.encode_strip(image, None).data)
            after, peak = tracemalloc.get_traced_memory()
            assert peak - before < size + filtered_bytes / 2  # the strip itself, but no new buffers
            assert after - before < 1000
    finally:
        tracemalloc.stop()
