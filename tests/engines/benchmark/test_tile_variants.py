"""Variants of decoding in tiles, and the comparison of their images."""

from __future__ import annotations

import pytest
import torch

from engines.benchmark.tiles import decode, encode, load_decoder, open_runtime
from engines.benchmark.tiles_variants import (
    BLEND_NAMES,
    LINEAR,
    TABLE_NAMES,
    WHOLE_CONDITION,
    compare,
    decode_variant,
    decode_whole,
)
from engines.bundled.decoder import PHOTO
from engines.compile.comparison import psnr
from engines.pid import FoldedDecoder
from engines.runtime.tiles import TilePlan
from engines.size import Size

TILE, IMAGE = Size(128, 128), Size(128, 192)


@pytest.fixture(scope="module")
def decoder() -> FoldedDecoder:
    return load_decoder()


@torch.inference_mode()
def test_the_first_variants_are_what_the_runtime_computes(decoder: FoldedDecoder):
    runtime, latent = open_runtime(decoder, TILE, IMAGE.area), encode(PHOTO, IMAGE)
    plan = runtime.info.tiles(IMAGE)
    assert plan is not None
    for variant in (TABLE_NAMES[0], LINEAR):
        image = decode_variant(decoder, latent, plan, variant)
        assert (decode(runtime, latent, IMAGE) - image).abs().max() <= 1.01 / 127.5


@torch.inference_mode()
def test_the_condition_of_the_whole_image_is_closer_and_all_variants_differ(decoder: FoldedDecoder):
    plan, latent = TilePlan(IMAGE, TILE, (0,), (0, 64)), encode(PHOTO, IMAGE)
    whole = decode_whole(decoder, latent, IMAGE)
    names = [*TABLE_NAMES, *BLEND_NAMES[1:]]
    results = {name: psnr(decode_variant(decoder, latent, plan, name), whole) for name in names}
    assert len(set(results.values())) == len(names)
    assert max(results, key=lambda name: results[name]) == WHOLE_CONDITION


def test_a_visible_border_is_measured_at_its_place():
    plan = TilePlan(IMAGE, TILE, (0,), (0, 64))
    whole = torch.rand(3, *IMAGE, generator=torch.Generator().manual_seed(0))
    tiled = whole.clone()
    tiled[:, :, 64:] += 1.0
    measured = compare(tiled, whole, plan)
    assert measured.border > 2
    assert measured.elsewhere == pytest.approx(1, abs=1e-3)
    assert measured.block == pytest.approx(127.5)
    tiled[:, :, 64:] -= 1.0
    tiled[:, :, 96:] += 1.0
    measured = compare(tiled, whole, plan)
    assert measured.border == pytest.approx(1, abs=1e-3)
    assert measured.elsewhere > 2
