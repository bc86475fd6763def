"""Decoders by name: all spellings are found, and no name of another latent space is suggested."""

import re
from pathlib import Path

import pytest

from engines.decoders import find_decoder
from engines.errors import ConfigError
from engines.pid.names import spelling
from engines.pid.released import LATENT_SPACES, released, released_names

ALL = (*released_names(), "dct-demo")
FLUX, FLUX2, QWEN = "flux-2kto4k-v1.5", "flux2-2kto4k-v1.5", "qwenimage-2kto4k-v1.5"
DOCUMENT = (Path(__file__).parents[2] / "docs" / "engines.md").read_text()


def rejected(name: str) -> str:
    with pytest.raises(ConfigError) as caught:
        find_decoder(name)
    text = str(caught.value)
    assert text.endswith(".")
    assert len(text) < 500
    return text


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("change", [str, str.upper, lambda n: n.replace("-", "_"), lambda n: n.replace("-", ".")])
def test_a_decoder_is_found_in_every_spelling(name: str, change):
    assert find_decoder(change(name)).name == name


@pytest.mark.parametrize(
    ("model", "decoder"),
    [
        *((name, FLUX) for name in ("flux", "FLUX.1", "flux1", "flux.1-dev", "FLUX.1 [schnell]", "flux_dev")),
        *((name, FLUX) for name in ("FLUX.1-Krea-dev", "flux.1-kontext-dev", "black-forest-labs/FLUX.1-dev")),
        *((name, FLUX) for name in ("zimage", "Z-Image", "z_image_turbo", "zimage-turbo", "Tongyi-MAI/Z-Image-Turbo")),
        *((name, FLUX) for name in ("boogu", "Boogu-Image", "boogu_image_0.1_turbo", "Boogu/Boogu-Image-0.1-Base")),
        *((name, FLUX) for name in ("chroma", "Chroma1-HD", "lodestones/Chroma")),
        *((name, FLUX2) for name in ("flux2", "flux.2", "FLUX-2", "flux.2-dev", "flux2-klein", "FLUX.2-klein-4B")),
        *((name, FLUX2) for name in ("flux2_klein_9b", "FLUX.2-klein-base-9B", "black-forest-labs/FLUX.2-klein-4B")),
        *((name, FLUX2) for name in ("ernie-image", "ERNIE_Image", "ernieimage", "baidu/ERNIE-Image-Turbo")),
        *((name, QWEN) for name in ("qwenimage", "qwen-image", "qwen_image", "Qwen-Image-2512", "Qwen/Qwen-Image")),
        *((name, QWEN) for name in ("qwen-image-edit", "krea2", "krea-2", "Krea-2-Turbo", "krea/Krea-2-Raw")),
        *((name, "sd3-2kto4k") for name in ("sd3", "SD3.5", "sd35-large", "stable-diffusion-3.5", "sd3-medium")),
        ("stabilityai/stable-diffusion-3.5-large-turbo", "sd3-2kto4k"),
        *((name, "sdxl-2kto4k") for name in ("sdxl", "sdxl-base", "SDXL_1.0", "Stable Diffusion XL")),
        ("stabilityai/stable-diffusion-xl-base-1.0", "sdxl-2kto4k"),
        ("rae", "dinov2-2k"),
        ("Scale-RAE", "siglip-2k"),
        ("z-image-2k", "flux-2k"),
        ("zimage-turbo-2kto4k-v1.5", FLUX),
        ("FLUX.2-klein-9B-2k", "flux2-2k"),
        ("sd3.5-2k", "sd3-2k"),
        ("ernie_image_2k", "flux2-2k"),
        ("krea2-2kto4k-v15", QWEN),
    ],
)
def test_a_diffusion_model_selects_the_decoder_for_its_latents(model: str, decoder: str):
    assert find_decoder(model).name == decoder


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        *((name, "its own autoencoder with 64 channels") for name in ("Qwen-Image-2.1", "Qwen/qwen_image_2.1_edit")),
        *((name, "then use flux2.") for name in ("ideogram4", "Ideogram-4", "ideogram-ai/ideogram-4-fp8")),
        *((name, "nothing to decode") for name in ("Chroma1-Radiance", "chroma_radiance")),
    ],
)
def test_a_model_whose_latents_no_decoder_accepts_is_explained(model: str, expected: str):
    text = rejected(model)
    assert expected in text
    assert "Did you mean" not in text


@pytest.mark.parametrize(
    "model",
    [
        *("flux-3", "flux.3-dev", "flux2-pro", "z-image-2", "Qwen-Image-2", "qwen-image-3", "qwen-image-layered"),
        *("krea", "krea-3", "chroma2", "ChromaXL", "ernie-image-2", "boogu-image-0.2-base", "ideogram"),
        *("hunyuan-image", "hunyuanimage-2.1", "joyimage", "mage-flow", "omnigen2", "lumina-image", "hidream", "anima"),
        *("sd", "sd1.5", "sd2.1", "sd4", "stable-diffusion-4", "sdxs", "pixart", "sana", "cosmos", "wan2.1", "kolors"),
        *("dinov3", "dinov2-large", "vae", "dct", "demo", "2k", "", "/", "é", "flux-4k"),
    ],
)
def test_another_model_is_not_taken_for_a_misspelling(model: str):
    text = rejected(model)
    assert "Did you mean" not in text
    assert "this project does not know its latent space" in text
    assert text.endswith(f"Available decoders: {', '.join(ALL)}.")


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("flux-2kk", "flux-2k"),
        ("flux-2kt4k-v1.5", FLUX),
        ("qwenimge", "qwen-image"),
        ("chrma", "chroma"),
        ("z-imgae-turbo", "z-image-turbo"),
        ("ernie-imag", "ernie-image"),
        ("dct-dmo", "dct-demo"),
        ("flux.2-kelin-4b", "flux.2-klein-4b"),
        ("stable-difusion-3.5", "stable-diffusion-3.5"),
    ],
)
def test_a_misspelt_name_is_suggested(name: str, suggestion: str):
    assert f"Unknown decoder {name!r}. Did you mean {suggestion}? Available decoders: " in rejected(name)


def test_no_spelling_stands_for_two_decoders():
    decoders: dict[str, str] = {}
    for description in map(find_decoder, ALL):
        for name in (description.name, *description.aliases):
            assert decoders.setdefault(spelling(name), description.name) == description.name
            assert find_decoder(name) == description


def test_the_documents_list_every_decoder_and_model():
    rows = {cells[0]: cells for cells in re.findall(r"^\| (\w+) \| (`.*`) \| (`.*`) \|$", DOCUMENT, re.MULTILINE)}
    for space in LATENT_SPACES.values():
        _, decoders, models = rows[space.name]
        named = {name for name in released_names() if released(name).latent_space == space}
        assert set(re.findall("`([^`]+)`", decoders)) == named
        assert tuple(re.findall("`([^`]+)`", models)) == space.models
        properties = f"| {space.name} | {space.channels} | {space.pixels_per_cell} | {space.normalisation} |"
        assert properties in DOCUMENT
