"""Train the bundled decoder: the start of the teacher by regression, the teacher, then the student that ships.

    python -m engines.training.train --data DIR --out DIR --minutes MINUTES

Uses the GPU if this machine has one, otherwise the CPU. Every minute it writes to OUT/<stage>: a checkpoint from which
the same command resumes, the current weights (decoder.safetensors), a sheet of samples (samples.png) and the loss
curves (losses.png). See docs/bundled-decoder.md.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: its threads spin otherwise and starve a busy CPU

import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from engines.bundled import dct
from engines.bundled.decoder import CONFIG, PUBLISHED
from engines.cli import ArgumentParser
from engines.errors import ConfigError
from engines.pid import PidDecoder
from engines.runtime.devices import default_device
from engines.size import Size
from engines.training import figures, flow, metrics, photos
from engines.training.regression import Regression
from engines.training.student import Student
from engines.training.teacher import Teacher

# Output sizes and their probabilities. Positions depend on the size of the whole image, so all kinds must be trained.
SIZES = (Size(256, 256), Size(384, 384), Size(512, 512), Size(256, 384), Size(384, 256))
SIZE_PROBABILITIES = (0.6, 0.1, 0.1, 0.1, 0.1)
GPU_CROPS_FACTOR = 8  # batches on a GPU, relative to those on a CPU; small ones would not use it fully
BATCHES_AHEAD = 4  # prepared by a thread while the network is trained
STAGES = {"regression": 0.35, "teacher": 0.2, "student": 0.45}  # and their shares of the time
WARM_UP_STEPS = 50  # of a rising learning rate
DECAY_SHARE = 0.9  # share of a stage, at the end, of a falling learning rate
SAVE_SECONDS = 60.0  # between checkpoints
SAMPLE_SIGMA = 0.4  # noise level of the noised samples in a report


class Trainer(Protocol):
    """Training of one network, as the training loop uses it."""

    title: str  # stored in the metadata of the weights
    crops: int  # batch size on a CPU in crops of 256×256; larger crops are fewer

    @property
    def average(self) -> PidDecoder:
        """A decoder with the EMA weights, which is exported."""

    def step(self, image: Tensor, rate_factor: float) -> dict[str, float]:
        """Take one optimiser step on images [B, 3, H, W] in [-1, 1]; return the losses by name."""

    def decode(self, latent: Tensor, noise: Tensor, sigma: float) -> Tensor:
        """Decode latents [B, 16, h, w] from noise [B, 3, H, W] with the EMA weights."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to resume."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a `state_dict`."""


def random_batch(photo_set: list[np.ndarray], crops: int, random: np.random.Generator) -> Tensor:
    """Return crops [B, 3, H, W] of one random output size, with about as many pixels as `crops` of 256×256."""
    size = SIZES[random.choice(len(SIZES), p=SIZE_PROBABILITIES)]
    count = max(1, crops * 256 * 256 // size.area)
    return photos.random_crops(photo_set, count, size, random, photos.CANDIDATES)


def batches(
    photo_set: list[np.ndarray], crops: int, random: np.random.Generator, device: torch.device
) -> Iterator[Tensor]:
    """Yield random batches on the device without end, in the order of the generator; a thread prepares them ahead."""

    def prepare() -> Tensor:
        return random_batch(photo_set, crops, random).to(device)

    with ThreadPoolExecutor(1) as thread:
        ahead: deque[Future[Tensor]] = deque(thread.submit(prepare) for _ in range(BATCHES_AHEAD))
        while True:
            image = ahead.popleft().result()
            ahead.append(thread.submit(prepare))
            yield image


def rate_factor(step: int, progress: float) -> float:
    """Return the learning rate relative to its peak: linear warm-up, constant, linear decay to zero at progress 1."""
    return min(1.0, (step + 1) / WARM_UP_STEPS, max(0.0, 1 - progress) / DECAY_SHARE)


def export(decoder: nn.Module, trained: str, path: Path) -> None:
    """Save the weights in bfloat16 under the released names; configuration and `trained` become metadata."""
    weights = {name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in decoder.state_dict().items()}
    metadata = {"config": json.dumps(PUBLISHED), "latent_space": "dct", "trained": trained}
    save_file(weights, path, metadata)


class Run:
    """A training run in a directory: the trainer, the losses of every step so far, and the time that they took."""

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        self.trainer, self.folder = trainer, folder
        self.losses: list[dict[str, float]] = []
        self.seconds = 0.0

    @property
    def steps(self) -> int:
        """Number of steps so far, those before a resumption included."""
        return len(self.losses)

    def save(self) -> None:
        """Write the checkpoint; an interruption leaves the previous one intact."""
        new = self.folder / "checkpoint.pt.new"
        torch.save({"stage": self.trainer.state_dict(), "losses": self.losses, "seconds": self.seconds}, new)
        new.replace(self.folder / "checkpoint.pt")

    def resume(self) -> bool:
        """Load the checkpoint of the directory; return False if it has none."""
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return False
        state = torch.load(path, weights_only=True, map_location="cpu")
        self.trainer.load_state_dict(state["stage"])
        self.losses, self.seconds = state["losses"], state["seconds"]
        return True

    def report(self, held_out: Tensor) -> str:
        """Write the weights, samples from images [B, 3, H, W] and loss curves; return the samples' metrics."""
        export(self.trainer.average, f"{self.trainer.title}, {self.steps} steps", self.folder / "decoder.safetensors")
        figures.save_loss_curves(self.losses, self.folder / "losses.png")
        latent = dct.encode(dct.downscale(held_out))
        random = torch.Generator().manual_seed(0)
        noise = torch.randn(held_out.shape, generator=random).to(held_out)
        noisy = flow.diffuse(latent, SAMPLE_SIGMA, torch.randn(latent.shape, generator=random).to(latent))
        decoded, denoised = (
            self.trainer.decode(z, noise, sigma).clamp(-1, 1) for z, sigma in ((latent, 0.0), (noisy, SAMPLE_SIGMA))
        )
        figures.save_sheet([held_out, metrics.bicubic(latent), decoded, denoised], self.folder / "samples.png")
        return (
            f"{metrics.psnr(decoded, held_out):.2f} dB, sharpness {metrics.sharpness(decoded, held_out):.2f}, "
            f"grid {metrics.grid(decoded):.2f}, at sigma {SAMPLE_SIGMA} {metrics.psnr(denoised, held_out):.2f} dB"
        )


def train(
    run: Run,
    photo_set: list[np.ndarray],
    held_out: Tensor,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Train until the steps of the run have taken `seconds`; report and save every SAVE_SECONDS and at the end."""
    device = held_out.device
    crops = run.trainer.crops * (GPU_CROPS_FACTOR if device.type == "cuda" else 1)
    images = batches(photo_set, crops, np.random.default_rng(run.steps), device)
    torch.manual_seed(run.steps)
    saved, reported = run.seconds, run.steps
    with tqdm(total=round(seconds), initial=round(min(run.seconds, seconds)), unit="s", mininterval=5) as bar:
        while run.seconds < seconds:
            began = clock()
            run.losses.append(run.trainer.step(next(images), rate_factor(run.steps, run.seconds / seconds)))
            run.seconds += clock() - began
            bar.update(round(min(run.seconds, seconds)) - bar.n)
            if run.seconds >= min(saved + SAVE_SECONDS, seconds):
                bar.write(f"{run.steps} steps: {_mean_losses(run.losses[reported:])}; held out: {run.report(held_out)}")
                run.save()  # last, so that a run that was interrupted before it reported does not count as finished
                saved, reported = run.seconds, run.steps


def _mean_losses(losses: list[dict[str, float]]) -> str:
    names = dict.fromkeys(name for step in losses for name in step)
    return ", ".join(f"{name} {np.mean([step[name] for step in losses if name in step]):.4f}" for name in names)


def make_trainer(stage: str, photo_set: list[np.ndarray], out: Path, device: torch.device) -> Trainer:
    """Return the trainer of a stage with its initial weights, which are the result of the stage before it."""
    if stage == "regression":
        return Regression(photo_set, device)
    if stage == "teacher":
        return Teacher(_finished(Regression(None, device), out / "regression").trainer.average.to(device))
    finished = _finished(Teacher(PidDecoder(CONFIG).to(device)), out / "teacher")
    return Student(finished.trainer.average, f"student of a teacher of {finished.steps} steps")


def _finished(trainer: Trainer, folder: Path) -> Run:
    run = Run(trainer, folder)
    run.resume()
    return run


def main() -> None:
    """Run the command line."""
    parser = ArgumentParser(
        prog="python -m engines.training.train",
        usage="%(prog)s --data DIR --out DIR [--minutes MINUTES]",
        description="Train the bundled decoder in three stages: regression, teacher and student; the student is the "
        "one that ships. Uses the GPU if there is one. The same command resumes from the last checkpoint.",
    )
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        required=True,
        metavar="DIR",
        help="output of engines.training.photos (required)",
    )
    add(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="directory for checkpoints, weights, samples and loss curves, in a directory per stage (required)",
    )
    add(
        "--minutes",
        type=float,
        default=90.0,
        metavar="MINUTES",
        help="duration of all stages, including the time before a resumption (default: %(default)g)",
    )
    options = parser.parse_args()
    if not 0 < options.minutes < math.inf:
        parser.error(f"--minutes must be a positive number, got {options.minutes:g}")
    try:
        device = default_device()
    except ConfigError as error:
        parser.error(str(error))
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs
    photo_set = photos.load(options.data, held_out=False)
    held_out = photos.random_crops(photos.load(options.data, held_out=True), 4, SIZES[0], np.random.default_rng(1))
    for stage, share in STAGES.items():
        folder = options.out / stage
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        run = Run(make_trainer(stage, photo_set, options.out, device), folder)
        progress = f"resuming after {run.steps} steps" if run.resume() else "starting"
        print(f"{stage} on {device}: {progress}", flush=True)
        train(run, photo_set, held_out.to(device), 60 * share * options.minutes)


if __name__ == "__main__":
    main()
