"""The decoder of a request: named by it, or the only one that supports the latent; never guessed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engines.size import Size
from server.body.head import read_head
from server.body.media import JSON, NPY, RAW, SAFETENSORS
from server.errors import AmbiguousDecoderError, InvalidCaptionError, InvalidLatentError, InvalidOptionError
from server.http.protocols.remote_decode import RemoteDecode
from tests.server.body.bodies import (
    DECODER,
    json_body,
    limits_of,
    npy,
    packed,
    parse_request,
    raw,
    raw_query,
    rejected,
    save_safetensors,
)

FLUX = replace(DECODER, name="flux", channels=16, latent_sizes=(Size(8, 8), Size(8, 12)))
SD3 = replace(FLUX, name="sd3", latent_space="sd3", latent_sizes=(Size(8, 8), Size(16, 16)))
SDXL = replace(DECODER, name="sdxl", latent_space="sdxl", caption_tokens=0, caption_width=0, accepts_prompts=False)
LIMITS = limits_of(FLUX, SD3, SDXL)
BOTH, ONLY_FLUX, ONLY_SDXL = (torch.zeros(shape) for shape in ((16, 8, 8), (16, 8, 12), (4, 8, 8)))


def choose(latent: torch.Tensor, *query: tuple[str, str]) -> str:
    """Return the decoder of a request without a declared media type."""
    return parse_request(NPY, npy(latent.numpy()), list(query), LIMITS).decoder


def test_a_latent_that_fits_one_decoder_needs_no_name():
    assert choose(ONLY_FLUX) == "flux"
    assert choose(ONLY_SDXL) == "sdxl"
    assert choose(ONLY_SDXL[None]) == "sdxl"


def test_a_packed_latent_that_fits_one_decoder_needs_no_name():
    size = [("height", "64"), ("width", "96")]
    assert choose(torch.zeros(1, 24, 64), *size) == "flux"
    assert choose(torch.zeros(1, 24, 16), *size) == "sdxl"


def test_a_latent_that_fits_several_decoders_is_rejected_with_their_names():
    message = rejected(AmbiguousDecoderError, NPY, npy(BOTH.numpy()), (), LIMITS)
    assert "flux and sd3" in message
    assert "sdxl" not in message


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_a_named_decoder_is_used(name):
    assert choose(BOTH, ("decoder", name)) == name
    assert parse_request(JSON, json_body(latent=packed(BOTH), decoder=name), [], LIMITS).decoder == name


def test_an_unknown_name_is_rejected_before_the_body_with_the_names_there_are():
    with pytest.raises(InvalidOptionError, match="'flux', 'sd3' or 'sdxl'"):
        read_head([("content-type", NPY)], [("decoder", "flux2")], LIMITS)
    assert "'sdxl'" in rejected(InvalidOptionError, JSON, json_body(latent=packed(BOTH), decoder="flux2"), (), LIMITS)


def test_a_latent_that_does_not_fit_the_named_decoder_is_rejected_by_its_limits():
    message = rejected(InvalidLatentError, NPY, npy(ONLY_SDXL.numpy()), [("decoder", "flux")], LIMITS)
    assert "needs 16" in message


def test_a_latent_of_a_wrong_size_is_rejected_by_the_only_decoder_with_its_channels():
    message = rejected(InvalidLatentError, NPY, npy(torch.zeros(4, 9, 9).numpy()), (), LIMITS)
    assert "height 9" in message
    assert "8x8" in message


@pytest.mark.parametrize("shape", [(16, 9, 9), (7, 8, 8)])
def test_a_latent_that_fits_no_decoder_is_rejected_with_its_shape(shape):
    message = rejected(InvalidLatentError, NPY, npy(torch.zeros(shape).numpy()), (), LIMITS)
    assert f"{shape}, which no decoder of this server supports" in message


@pytest.mark.parametrize("shape", [(8, 8), (1, 1, 1, 1, 8, 8), (1, 16, 2, 8, 8), (5, 16, 8, 8)])
def test_faults_that_concern_every_decoder_are_reported_as_for_a_single_one(shape):
    body = npy(torch.zeros(shape).numpy())
    single = rejected(InvalidLatentError, NPY, body, [("decoder", "flux")], LIMITS)
    assert rejected(InvalidLatentError, NPY, body, (), LIMITS) == single


def test_raw_elements_are_checked_before_the_body():
    headers = [("content-type", RAW)]
    with pytest.raises(AmbiguousDecoderError):
        read_head(headers, raw_query(BOTH), LIMITS)
    with pytest.raises(InvalidLatentError):
        read_head(headers, raw_query(torch.zeros(7, 8, 8)), LIMITS)
    assert parse_request(RAW, raw(ONLY_FLUX), raw_query(ONLY_FLUX), LIMITS).decoder == "flux"


def test_prompts_are_checked_for_the_chosen_decoder():
    assert parse_request(NPY, npy(ONLY_FLUX.numpy()), [("prompt", "a cat")], LIMITS).prompts == ("a cat",)
    message = rejected(InvalidOptionError, NPY, npy(ONLY_SDXL.numpy()), [("prompt", "a cat")], LIMITS)
    assert "sdxl: no captions are supported" in message
    with pytest.raises(InvalidOptionError):
        read_head([("content-type", NPY)], [("prompt", "a cat"), ("decoder", "sdxl")], LIMITS)


def test_captions_are_checked_for_the_chosen_decoder():
    caption = torch.zeros(3, 5)
    body = save_safetensors({"latent": ONLY_FLUX, "caption": caption})
    assert parse_request(SAFETENSORS, body, [], LIMITS).captions.shape == (1, 3, 5)
    body = save_safetensors({"latent": ONLY_SDXL, "caption": caption})
    assert "omit it" in rejected(InvalidCaptionError, SAFETENSORS, body, (), LIMITS)


class TestRemoteDecode:
    """diffusers cannot name a decoder, but sends the factors of its latent space."""

    def choose(self, *parameters: tuple[str, str]) -> str:
        query = [("shape", "1"), ("shape", "16"), ("shape", "8"), ("shape", "8"), ("dtype", "float32")]
        head = RemoteDecode().read_head([("content-type", "tensor/binary")], [*query, *parameters], LIMITS)
        return head.parse(raw(BOTH)).decode.decoder

    @pytest.mark.parametrize(
        ("scale", "shift", "name"), [("0.3611", "0.1159", "flux"), ("1.5305", "0.0609", "sd3")], ids=["flux", "sd3"]
    )
    def test_the_factors_choose_the_decoder(self, scale, shift, name):
        assert self.choose(("scaling_factor", scale), ("shift_factor", shift)) == name

    def test_without_factors_the_decoder_has_to_be_named(self):
        with pytest.raises(AmbiguousDecoderError):
            self.choose(("do_scaling", "true"))
        assert self.choose(("do_scaling", "true"), ("decoder", "sd3")) == "sd3"

    def test_factors_of_another_latent_space_are_rejected_with_the_reason(self):
        with pytest.raises(InvalidOptionError, match="belongs to another latent space"):
            self.choose(("scaling_factor", "0.5"))
        with pytest.raises(InvalidOptionError, match="belongs to another latent space"):
            self.choose(("do_scaling", "true"), ("shift_factor", "0.5"))

    def test_a_decoder_whose_raw_latents_cannot_be_normalised_is_a_candidate_too(self):
        limits = limits_of(FLUX, replace(FLUX, name="custom", latent_space="custom"))
        query = [("shape", "1,16,8,8"), ("dtype", "float32")]
        with pytest.raises(AmbiguousDecoderError):
            RemoteDecode().read_head([("content-type", "tensor/binary")], query, limits)
