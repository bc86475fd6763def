"""Formats that need optional packages: what is available without them, and what clients read about it."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import httpx
import pytest
from PIL import features
from safetensors.torch import save

from engines.size import Size
from server.body.negotiation import negotiate
from server.errors import InvalidOptionError, NotAcceptableError
from server.images.available import available_formats, check_available, check_format
from server.images.formats import IMAGE_FORMATS
from tests.server.conftest import Running, Serve, make_latent

ALWAYS = ("png", "webp", "jpeg", "raw", "npy")


@pytest.fixture
def without_packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process with neither imagecodecs nor libavif."""
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    monkeypatch.setattr(features, "check", lambda feature: False)
    available_formats.cache_clear()
    yield
    available_formats.cache_clear()


def test_every_format_is_available_with_all_packages():
    pytest.importorskip("imagecodecs", reason="needs the extra jxl")
    if not features.check("avif"):
        pytest.skip("Pillow without libavif")
    assert available_formats() == IMAGE_FORMATS
    for name in ("avif", "jxl"):
        assert negotiate(None, f"image/{name}, image/png;q=0.9", batch=False).format == name
    assert negotiate(None, "image/avif, image/webp, */*;q=0.8", batch=False).format == "webp"  # preferred to AVIF


@pytest.mark.usefixtures("without_packages")
class TestWithoutPackages:
    def test_the_other_formats_are_available(self):
        assert available_formats() == ALWAYS
        for name in (*ALWAYS, "planes-unit"):
            check_available(name)

    @pytest.mark.parametrize(
        ("image_format", "advice"),
        [("avif", "pip install --upgrade pillow"), ("jxl", r"imagecodecs: pip install 'pid-decode-server\[jxl\]'")],
    )
    def test_the_error_names_the_package_to_install(self, image_format: str, advice: str):
        with pytest.raises(InvalidOptionError, match=f"The format {image_format} is not available, .*{advice}"):
            check_available(image_format)

    def test_the_accept_header_cannot_choose_them(self):
        assert negotiate(None, "image/jxl, image/avif, image/webp;q=0.1", batch=False).format == "webp"
        for accept in ("image/jxl", "image/avif"):
            with pytest.raises(NotAcceptableError) as raised:
                negotiate(None, accept, batch=False)
            assert "jxl" not in str(raised.value)

    @pytest.mark.parametrize("image_format", ["avif", "jxl"])
    def test_a_server_rejects_them_and_lists_the_others(self, serve: Serve, image_format: str):
        with serve() as running:
            for response in (running.decode(format=image_format), post_json(running, image_format)):
                assert (response.status_code, response.json()["code"]) == (422, "invalid-option")
                assert "pip install" in response.json()["detail"]
            assert running.client.get("/info").json()["image_formats"] == list(ALWAYS)
            assert running.decode(format="webp").status_code == 200


def post_json(running: Running, image_format: str) -> httpx.Response:
    """Send a decode whose option `format` is in the body."""
    files = {"latent": ("latent.safetensors", save({"latent": make_latent()}))}
    return running.client.post("/decode", files=files, data={"format": image_format})


def test_a_size_that_the_format_does_not_support_is_the_requests_fault():
    check_format("webp", Size(16_383, 16))
    check_format("raw", Size(2**20, 16))
    with pytest.raises(InvalidOptionError, match="webp supports 1 to 16383 pixels per side, not 16 x 16384"):
        check_format("webp", Size(16_384, 16))
