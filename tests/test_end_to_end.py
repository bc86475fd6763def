"""The whole way as its users go it: build_engines.py, python -m server, a request, a picture."""

from __future__ import annotations

import contextlib
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
from engines.bundled.decoder import PHOTO
from engines.pid import NoiseSource, load_checkpoint, sample
from engines.size import Size
from loadtest.demo import running_server

ROOT = Path(__file__).parent.parent
SIZE = Size(256, 256)


@pytest.fixture(scope="module")
def url(demo_bundle: Path) -> Iterator[str]:
    with running_server(demo_bundle) as url:
        yield url


def photo() -> torch.Tensor:
    """The bundled photo at 256x256, [3, 256, 256] in [-1, 1]."""
    pixels = np.asarray(Image.open(PHOTO).convert("RGB").resize(SIZE, Image.Resampling.LANCZOS))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1


def post(url: str, latent: torch.Tensor, **options: object) -> httpx.Response:
    headers = {"Content-Type": "application/x-safetensors"}
    return httpx.post(f"{url}/decode", content=save({"latent": latent}), headers=headers, params=options, timeout=60)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


def test_the_picture_is_the_photo_and_what_the_checkpoint_says(url: str):
    latent = dct.encode(dct.downscale(photo()[None]))[0]
    answer = post(url, latent, seed=3)
    assert answer.status_code == 200
    decoded = np.asarray(Image.open(io.BytesIO(answer.content)))
    expected = ((photo() + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert psnr(decoded, expected) > 20

    from engines.bundled.decoder import CAPTION_TOKENS, CHECKPOINT, CONFIG

    decoder = load_checkpoint(CHECKPOINT, CONFIG, torch.float32).eval().requires_grad_(False)
    noise = NoiseSource(3, "cpu")
    start, *step_noise = (noise.draw(SIZE)[None] for _ in range(4))
    caption = torch.zeros(1, CAPTION_TOKENS, CONFIG.caption_width)
    image = sample(decoder, decoder.condition(latent[None], caption, SIZE), start, 0.0, step_noise)[0]
    live = ((image.clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert np.abs(decoded - live).max() <= 1


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(url: str):
    latent = dct.encode(dct.downscale(photo()[None]))[0]
    first, again, other = (post(url, latent, seed=seed, steps=1).content for seed in (1, 1, 2))
    assert first == again
    assert first != other


class TestReadme:
    """The README's own code, run against the server it talks about."""

    def blocks(self, language: str) -> list[str]:
        return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)

    def run(self, command: list[str], folder: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        subprocess.run(command, cwd=folder, check=True, env=environment, timeout=120)

    def test_python(self, url: str, tmp_path: Path):
        (code,) = self.blocks("python")
        self.run([sys.executable, "-c", code.replace("http://127.0.0.1:8000", url)], tmp_path)
        assert Image.open(tmp_path / "image.png").size == SIZE

    def test_curl(self, url: str, tmp_path: Path):
        (code,) = [block for block in self.blocks("sh") if "curl" in block]
        self.run(["sh", "-ec", code.replace("http://127.0.0.1:8000", url)], tmp_path)
        assert Image.open(tmp_path / "image.png").size == SIZE
        assert Image.open(tmp_path / "image.jpg").format == "JPEG"

    def test_every_option_is_in_its_table(self):
        from server.request import DecodeOptions

        readme = (ROOT / "README.md").read_text()
        for name in DecodeOptions.model_fields:
            assert f"| `{name}`" in readme, name


def serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "server", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


class TestStart:
    def test_a_folder_that_is_no_bundle_is_one_sentence(self, tmp_path: Path):
        result = serve("--bundle", str(tmp_path))
        assert result.returncode == 2
        assert "is not a bundle" in result.stderr
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
        result = serve("--bundle", str(copy))
        assert result.returncode == 2
        assert "SHA-256" in result.stderr

    def test_a_setting_out_of_range_is_one_sentence(self):
        result = serve("--bundle", ".", "--port", "70000")
        assert result.returncode == 2
        assert "--port (or PID_PORT)" in result.stderr

    def test_help_names_every_setting(self):
        from server.settings import Settings

        text = serve("--help").stdout
        for name in Settings.model_fields:
            assert f"--{name.replace('_', '-')}" in text

    def test_logs_are_json_and_it_ends_with_0_when_told_to(self, demo_bundle: Path):
        command = [sys.executable, "-m", "server", "--bundle", str(demo_bundle), "--port", "0", "--drain-delay", "0"]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            lines = []
            with contextlib.suppress(StopIteration):
                while "is warm" not in (line := next(process.stdout)):
                    lines.append(line)
            process.send_signal(signal.SIGTERM)
            lines += process.stdout.readlines()
            assert process.wait(30) == 0
        assert any("draining" in json.loads(line)["message"] for line in lines)
