"""Train the bundled decoder: first the teacher, then the student that ships.

    python -m engines.training.train --stage teacher --data DIR --out DIR
    python -m engines.training.train --stage student --data DIR --out DIR

Uses the GPU if this machine has one, otherwise the CPU. At regular intervals it writes to OUT/<stage>: a checkpoint
from which the same command resumes, the current weights (decoder.safetensors), a sheet of samples (samples.png) and the
loss curves (losses.png). See docs/bundled-decoder.md.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: its threads spin otherwise and starve a busy CPU

import json
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
from engines.training.initialise import initialise_as_linear_decoder
from engines.training.student import Student
from engines.training.teacher import Teacher

# Output sizes and their probabilities. Positions depend on the size of the whole image, so all kinds must be trained.
SIZES = (Size(256, 256), Size(384, 384), Size(512, 512), Size(256, 384), Size(384, 256))
SIZE_PROBABILITIES = (0.6, 0.1, 0.1, 0.1, 0.1)
WARM_UP_STEPS = 50  # of a rising learning rate
DECAY_SHARE = 0.9  # share of the steps, at the end, of a falling learning rate
SAMPLE_SIGMA = 0.4  # noise level of the noised samples in a report


class Trainer(Protocol):
    """Training of one network, as the training loop uses it: the teacher or the student."""

    title: str  # stored in the metadata of the weights
    save_every: int  # steps between checkpoints
    crops: int  # batch size in crops of 256×256; larger crops are fewer

    @property
    def average(self) -> PidDecoder:
        """The network with the EMA weights that are exported."""

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


def rate_factor(step: int, steps: int) -> float:
    """Return the learning rate at a step relative to its peak: linear warm-up, constant, linear decay to zero."""
    return min(1.0, (step + 1) / WARM_UP_STEPS, (steps - step) / (DECAY_SHARE * steps))


def export(decoder: nn.Module, trained: str, path: Path) -> None:
    """Save the weights in bfloat16 under the released names; configuration and `trained` become metadata."""
    weights = {name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in decoder.state_dict().items()}
    metadata = {"config": json.dumps(PUBLISHED), "latent_space": "dct", "trained": trained}
    save_file(weights, path, metadata)


class Run:
    """A training run in a directory: the trainer, and the losses of every step so far."""

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        self.trainer, self.folder = trainer, folder
        self.losses: list[dict[str, float]] = []

    @property
    def steps(self) -> int:
        """Number of steps so far, those before a resumption included."""
        return len(self.losses)

    def save(self) -> None:
        """Write the checkpoint; an interruption leaves the previous one intact."""
        new = self.folder / "checkpoint.pt.new"
        torch.save({"stage": self.trainer.state_dict(), "losses": self.losses}, new)
        new.replace(self.folder / "checkpoint.pt")

    def resume(self) -> bool:
        """Load the checkpoint of the directory; return False if it has none."""
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return False
        state = torch.load(path, weights_only=True, map_location="cpu")
        self.trainer.load_state_dict(state["stage"])
        self.losses = state["losses"]
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


def train(run: Run, photo_set: list[np.ndarray], held_out: Tensor, steps: int) -> None:
    """Train until the run has `steps` steps; save and report every `save_every` steps and at the end."""
    random = np.random.default_rng(run.steps)
    torch.manual_seed(run.steps)
    with tqdm(total=steps, initial=run.steps, unit="step", mininterval=5) as bar:
        while run.steps < steps:
            image = random_batch(photo_set, run.trainer.crops, random).to(held_out.device)
            run.losses.append(run.trainer.step(image, rate_factor(run.steps, steps)))
            bar.update()
            if run.steps % run.trainer.save_every == 0 or run.steps == steps:
                run.save()
                means = _mean_losses(run.losses[-run.trainer.save_every :])
                bar.write(f"{run.steps} steps: {means}; held out: {run.report(held_out)}")


def _mean_losses(losses: list[dict[str, float]]) -> str:
    names = dict.fromkeys(name for step in losses for name in step)
    return ", ".join(f"{name} {np.mean([step[name] for step in losses if name in step]):.4f}" for name in names)


def make_trainer(stage: str, photo_set: list[np.ndarray], out: Path, device: torch.device) -> Trainer:
    """Return the teacher with its initial weights, or a student that starts as the teacher in OUT/teacher."""
    if stage == "teacher":
        decoder = PidDecoder(CONFIG)
        initialise_as_linear_decoder(decoder, photo_set, np.random.default_rng(0))
        return Teacher(decoder.to(device))
    teacher = Teacher(PidDecoder(CONFIG))
    run = Run(teacher, out / "teacher")
    if not run.resume():
        raise SystemExit(f"No teacher in {out}; run --stage teacher first.")
    return Student(teacher.average.to(device), f"student of a teacher of {run.steps} steps")


def main() -> None:
    """Run the command line."""
    parser = ArgumentParser(
        prog="python -m engines.training.train",
        usage="%(prog)s --stage {teacher,student} --data DIR --out DIR [--steps COUNT]",
        description="Train the bundled decoder: first the teacher, then the student, which is the one that ships. Uses "
        "the GPU if there is one. The same command resumes from the last checkpoint.",
    )
    add = parser.add_argument
    add("--stage", choices=("teacher", "student"), required=True, help="network to train (required)")
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
        "--steps",
        type=int,
        default=10000,
        metavar="COUNT",
        help="total steps, including those before a resumption (default: %(default)s)",
    )
    options = parser.parse_args()
    try:
        device = default_device()
    except ConfigError as error:
        parser.error(str(error))
    folder = options.out / options.stage
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    photo_set = photos.load(options.data, held_out=False)
    held_out = photos.random_crops(photos.load(options.data, held_out=True), 4, SIZES[0], np.random.default_rng(1))
    run = Run(make_trainer(options.stage, photo_set, options.out, device), folder)
    progress = f"resuming after {run.steps} steps" if run.resume() else "starting"
    print(f"{options.stage} on {device}: {progress}", flush=True)
    train(run, photo_set, held_out.to(device), options.steps)


if __name__ == "__main__":
    main()
