"""The path of a user: build_engines.py, python -m server, a request, an image."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from engines.bundled import dct
from engines.bundled.decoder import CAPTION_TOKENS, CHECKPOINT, CONFIG, PHOTO, read_photo
from engines.pid import NoiseSource, load_checkpoint, sample
from engines.pixels import to_uint8
from engines.size import Size
from loadtest import demo
from loadtest.processes import decode_server, running
from server.settings import Settings
from server.start import main as serve

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SIZE = Size(256, 256)


@pytest.fixture(scope="module")
def port(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Port of a server with the bundled decoder."""
    server = decode_server(demo_bundle, ["--drain-delay", "0"], tmp_path_factory.mktemp("server") / "log")
    with running(server):
        yield server.port


@pytest.fixture(scope="module")
def url(port: int) -> str:
    return f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled photo at 256x256."""
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    with Image.open(PHOTO) as image:
        image.convert("RGB").resize(SIZE, Image.Resampling.LANCZOS).save(path)
    return path


@pytest.fixture(scope="module")
def latent(photo: Path) -> torch.Tensor:
    return dct.encode(dct.downscale(read_photo(photo)[None]))[0]


def post(url: str, latent: torch.Tensor, **options: object) -> httpx.Response:
    headers = {"Content-Type": "application/x-safetensors"}
    return httpx.post(f"{url}/decode", content=save({"latent": latent}), headers=headers, params=options, timeout=60)


def pixels_of(image: torch.Tensor) -> np.ndarray:
    """[3, H, W] in [-1, 1] to uint8 [H, W, 3]."""
    return to_uint8(image).permute(1, 2, 0).numpy()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


def test_the_image_resembles_the_photo_and_equals_the_output_of_the_checkpoint(
    url: str, photo: Path, latent: torch.Tensor
):
    response = post(url, latent, seed=3)
    assert response.status_code == 200
    decoded = np.asarray(Image.open(io.BytesIO(response.content)))
    assert psnr(decoded, pixels_of(read_photo(photo))) > 20

    decoder = load_checkpoint(CHECKPOINT, CONFIG, torch.float32).eval().requires_grad_(False)
    noise = NoiseSource(3, "cpu")
    start, *step_noise = (noise.draw(SIZE)[None] for _ in range(4))
    caption = torch.zeros(1, CAPTION_TOKENS, CONFIG.caption_width)
    image = sample(decoder, decoder.condition(latent[None], caption, SIZE), start, 0.0, step_noise)[0]
    difference = decoded.astype(int) - pixels_of(image)
    assert np.abs(difference).max() <= 1


def test_the_seed_determines_the_bytes(url: str, latent: torch.Tensor):
    first, again, other = (post(url, latent, seed=seed, steps=1).content for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_the_demo_decodes_the_latent_of_a_photo(port: int, photo: Path):
    decoded = demo.decode(port, demo.photo_latent(read_photo(photo)), seed=0)
    assert "denoise;dur=" in decoded.timing
    image = Image.open(io.BytesIO(decoded.png))
    assert image.size == SIZE
    assert demo.comparison(read_photo(photo), image).width <= 1000


def test_a_form_with_an_option_returns_the_chosen_format(url: str, latent: torch.Tensor):
    file = io.BytesIO()
    np.save(file, latent.half().numpy())
    files = {"latent": ("latent.npy", file.getvalue(), "application/x-npy")}
    response = httpx.post(f"{url}/decode", files=files, data={"format": "jpeg"}, timeout=60)
    assert response.status_code == 200
    image = Image.open(io.BytesIO(response.content))
    assert (image.format, image.size) == ("JPEG", SIZE)


def test_the_health_check_ignores_proxies(port: int):
    command = [sys.executable, str(ROOT / "docker" / "healthcheck.py")]
    proxies = dict.fromkeys(("HTTP_PROXY", "http_proxy", "ALL_PROXY"), "http://127.0.0.1:9")
    environment = {**os.environ, **proxies, "NO_PROXY": "", "PID_PORT": str(port)}
    assert subprocess.run(command, env=environment).returncode == 0


class TestReadme:
    """The code in the README, run against a server."""

    def blocks(self, language: str) -> list[str]:
        return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)

    def run(self, command: list[str], folder: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_PROXY": "", "http_proxy": "http://127.0.0.1:9"}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        subprocess.run(command, cwd=folder, check=True, env=environment, timeout=120)

    def test_the_python_example_runs(self, url: str, tmp_path: Path):
        (code,) = [block for block in self.blocks("python") if "PidClient(" in block]
        self.run([sys.executable, "-c", code.replace("http://127.0.0.1:8000", url)], tmp_path)
        assert Image.open(tmp_path / "image.png").size == SIZE

    def test_the_curl_example_runs(self, url: str, tmp_path: Path):
        (code,) = [block for block in self.blocks("sh") if "curl" in block]
        self.run(["sh", "-ec", code.replace("http://127.0.0.1:8000", url)], tmp_path)
        assert Image.open(tmp_path / "image.png").size == SIZE


def run_server(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "server", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


class TestStart:
    def test_a_folder_that_is_not_a_bundle_is_rejected_in_one_line(self, tmp_path: Path):
        result = run_server("--bundle", str(tmp_path))
        assert result.returncode == 2
        assert "is not a bundle" in result.stderr
        assert result.stderr.count("\n") == 1

    def test_a_file_as_a_bundle_is_rejected_in_one_line(self, demo_bundle: Path):
        result = run_server("--bundle", str(demo_bundle / "weights.safetensors"))
        assert result.returncode == 2
        assert "is a file" in result.stderr
        assert result.stderr.count("\n") == 1

    def test_an_altered_bundle_is_not_served(self, demo_bundle: Path, tmp_path: Path):
        copy = tmp_path / "bundle"
        copy.mkdir()
        for file in demo_bundle.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        weights = copy / "weights.safetensors"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        result = run_server("--bundle", str(copy))
        assert result.returncode == 2
        assert "SHA-256" in result.stderr

    def test_a_setting_out_of_range_is_rejected_in_one_line(self, capfd: pytest.CaptureFixture[str]):
        assert serve(["--bundle", ".", "--port", "70000"]) == 2
        error = capfd.readouterr().err
        assert "--port (or PID_PORT)" in error
        assert error.count("\n") == 1

    def test_help_names_every_setting(self, capsys: pytest.CaptureFixture[str]):
        with pytest.raises(SystemExit, match="0"):
            serve(["--help"])
        text = capsys.readouterr().out
        for name in Settings.model_fields:
            assert f"--{name.replace('_', '-')}" in text

    def test_logs_are_json_and_sigterm_ends_with_status_0(self, demo_bundle: Path, tmp_path: Path):
        async def start_and_stop() -> int:
            server = decode_server(demo_bundle, ["--drain-delay", "0"], tmp_path / "log")
            await server.start()
            return await server.stop(signal.SIGTERM)

        assert asyncio.run(start_and_stop()) == 0
        lines = (tmp_path / "log").read_text().splitlines()
        assert any("draining" in json.loads(line)["message"] for line in lines)
