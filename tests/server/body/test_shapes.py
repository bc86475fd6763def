"""Packed latents and those of video pipelines, and the options height and width that go with them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save as save_safetensors

from engines.size import Size
from server.body.head import read_head
from server.body.media import JSON, NPY, RAW, SAFETENSORS
from server.errors import InvalidLatentError, InvalidOptionError, MalformedBodyError
from tests.server.body.bodies import (
    DECODER,
    FORM_TYPE,
    LATENT,
    LIMITS,
    file_part,
    form,
    json_body,
    limits_of,
    npy,
    packed,
    parse_request,
    raw,
    raw_query,
    rejected,
)

HEIGHT, WIDTH = 64, 96  # of the VAE's image of LATENT, at 8 pixels per cell
SIZE = [("height", str(HEIGHT)), ("width", str(WIDTH))]


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Pack [B, c, h, w] into tokens of 2 x 2 cells, [B, n, 4c], as FLUX pipelines do."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, height // 2 * (width // 2), channels * 4)


def tokens(latents: torch.Tensor) -> torch.Tensor:
    """Return [B, c, h, w] as tokens of one cell, [B, n, c], as FLUX.2 pipelines do."""
    return latents.flatten(2).transpose(1, 2).contiguous()


PACKED, TOKENS = pack(LATENT), tokens(LATENT)
VIDEO = LATENT.unsqueeze(2)  # [B, c, 1, h, w]


def test_the_packed_latent_of_this_file_has_the_documented_order():
    numbers = torch.arange(4 * 8 * 12.0).reshape(1, 4, 8, 12)
    token, channel, row, column = 7, 3, 1, 0  # the token in row 1, column 1 of six columns
    assert pack(numbers)[0, token, channel * 4 + row * 2 + column] == numbers[0, channel, 2 + row, 2 + column]


@pytest.mark.parametrize("tensor", [PACKED, TOKENS, LATENT, VIDEO], ids=["packed", "tokens", "plain", "video"])
def test_every_shape_is_accepted_in_every_body_with_height_and_width(tensor):
    fields = [(f'name="{name}"', value.encode()) for name, value in SIZE]
    for content_type, body, query in [
        (SAFETENSORS, save_safetensors({"latent": tensor}), SIZE),
        (NPY, npy(tensor.numpy()), SIZE),
        (RAW, raw(tensor), [*raw_query(tensor), *SIZE]),
        (JSON, json_body(latent=packed(tensor), height=HEIGHT, width=WIDTH), []),
        (FORM_TYPE, form(file_part(npy(tensor.numpy())), *fields), []),
    ]:
        latents = parse_request(content_type, body, query).latents
        assert torch.equal(latents, LATENT)
        assert latents.is_contiguous()
        assert latents.dtype == torch.float32


@pytest.mark.parametrize("tensor", [PACKED, TOKENS], ids=["packed", "tokens"])
def test_packed_latents_may_be_in_fortran_order_and_a_batch_of_one(tensor):
    body = npy(torch.from_numpy(tensor.numpy().copy())[:1].numpy().copy(order="F"))
    assert torch.equal(parse_request(NPY, body, SIZE).latents, LATENT[:1])


def test_a_single_latent_with_height_and_width_is_not_packed():
    limits = limits_of(replace(DECODER, channels=2, latent_sizes=(Size(8, 8),), max_images=2))
    latent = torch.randn(2, 8, 8)  # also the shape of two latents with 8 tokens, but these would be too few
    request = parse_request(NPY, npy(latent.numpy()), [("height", "64"), ("width", "64")], limits)
    assert torch.equal(request.latents[0], latent)


def test_latents_of_an_odd_size_are_packed_in_single_cells_only():
    limits = limits_of(replace(DECODER, latent_sizes=(Size(3, 5),)))
    latent = torch.randn(1, 4, 3, 5)
    size = [("height", "24"), ("width", "40")]
    assert torch.equal(parse_request(NPY, npy(tokens(latent).numpy()), size, limits).latents, latent)
    message = rejected(InvalidLatentError, NPY, npy(torch.zeros(1, 3, 16).numpy()), size, limits)
    assert "packed [batch, 15, 4]" in message


def test_a_latent_of_a_video_pipeline_needs_no_height_and_width():
    assert torch.equal(parse_request(NPY, npy(VIDEO.numpy()), []).latents, LATENT)


@pytest.mark.parametrize(
    ("shape", "part"),
    [
        ((1, 4, 2, 8, 12), "has 2 frames"),
        ((1, 4, 0, 8, 12), "has 0 frames"),
        ((1, 3, 1, 8, 12), "3 channels"),
        ((1, 4, 1, 8, 9), "height 8 and width 9"),
        ((4, 4, 1, 8, 12), "batch of 4; send 1 to 3"),
        ((1, 24, 16), "for packed latents, add the options height and width"),
        ((3, 96, 4), "for packed latents, add the options height and width"),
        ((1, 24, 15), "1 channel; this decoder needs 4"),
    ],
)
def test_an_unsupported_shape_is_rejected_before_and_in_the_body(shape, part):
    latent = torch.zeros(shape)
    assert part in rejected(InvalidLatentError, NPY, npy(latent.numpy()))
    with pytest.raises(InvalidLatentError, match=part):
        read_head([("content-type", RAW)], raw_query(latent), LIMITS)


@pytest.mark.parametrize(
    "shape",
    [
        (4, 8, 8),
        (1, 4, 8, 8),
        (1, 4, 1, 16, 16),
        (1, 3, 8, 12),
        (1, 23, 16),
        (1, 24, 15),
        (1, 95, 4),
        (1, 384, 1),
        (4, 24, 4),
    ],
)
def test_a_shape_that_contradicts_height_and_width_is_rejected_with_the_right_ones(shape):
    latent = torch.zeros(shape)
    message = rejected(InvalidLatentError, NPY, npy(latent.numpy()), SIZE)
    assert "send [4, 8, 12], [batch, 4, 8, 12] or packed [batch, 24, 16]" in message
    with pytest.raises(InvalidLatentError, match="with this height and width"):
        read_head([("content-type", RAW)], [*raw_query(latent), *SIZE], LIMITS)


@pytest.mark.parametrize("batch", [0, 4])
def test_a_packed_batch_has_the_same_limit_as_others(batch):
    message = rejected(InvalidLatentError, NPY, npy(torch.zeros(batch, 24, 16).numpy()), SIZE)
    assert f"batch of {batch}; send 1 to 3" in message


def test_packed_raw_elements_need_the_declared_length():
    with pytest.raises(MalformedBodyError):
        read_head([("content-type", RAW), ("content-length", "5")], [*raw_query(PACKED), *SIZE], LIMITS)


@pytest.mark.parametrize("name", ["height", "width"])
def test_height_and_width_are_sent_together(name):
    message = rejected(InvalidOptionError, JSON, json_body(latent=packed(LATENT), **{name: 64}))
    assert f"has the option {name} but not" in message
    with pytest.raises(InvalidOptionError, match="send both"):
        read_head([("content-type", NPY)], [(name, "64")], LIMITS)
    both = json_body(latent=packed(PACKED), **{name: HEIGHT if name == "height" else WIDTH})
    assert torch.equal(parse_request(JSON, both, [field for field in SIZE if field[0] != name]).latents, LATENT)


@pytest.mark.parametrize("size", [("65", "96"), ("64", "97"), ("256", "384"), ("1", "1"), ("65536", "65536")])
def test_an_unsupported_height_and_width_is_rejected_with_the_nearest_ones(size):
    query = [("height", size[0]), ("width", size[1])]
    for tensor in (LATENT, PACKED):
        message = rejected(InvalidOptionError, JSON, json_body(latent=packed(tensor)), query)
        assert "64x96 (decoded to 256x384)" in message
    with pytest.raises(InvalidOptionError, match="nearest"):
        read_head([("content-type", NPY)], query, LIMITS)


def test_cells_of_sixteen_pixels_and_other_factors_of_upscaling_are_supported():
    limits = limits_of(replace(DECODER, pixels_per_cell=128, upscale=8))
    size = [("height", "128"), ("width", "192")]
    assert torch.equal(parse_request(NPY, npy(TOKENS.numpy()), size, limits).latents, LATENT)
