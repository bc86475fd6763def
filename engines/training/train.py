"""Trains the bundled decoder, first the teacher, then the student that ships:

    python -m engines.training.train --stage teacher --data DIR --out DIR
    python -m engines.training.train --stage student --data DIR --out DIR

Runs on a CUDA device where there is one and on the CPU elsewhere. Every so often it writes to OUT/<stage>: a checkpoint
from which the same command goes on, the weights so far (decoder.safetensors), a sheet of samples (samples.png) and the
curves of all losses (losses.png). See docs/bundled-decoder.md.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: its threads spin otherwise and starve a busy CPU

import argparse
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
from engines.pid import PidDecoder
from engines.training import measures, photos, pictures
from engines.training.start import start_linear, wire
from engines.training.student import Student
from engines.training.teacher import Teacher

# Output sizes and their odds: positions depend on the size of the whole picture, so every kind has to be seen.
SIZES = ((256, 256), (384, 384), (512, 512), (256, 384), (384, 256))
SIZE_ODDS = (0.6, 0.1, 0.1, 0.1, 0.1)
WARM_UP = 50  # steps of a rising learning rate
FALL = 0.9  # the share of the steps, at the end, of a falling one


class Trainer(Protocol):
    """What the loop needs of the teacher and of the student."""

    title: str  # for the history in the file of weights
    save_every: int  # steps
    crops: int  # of 256×256, or as many pixels of another size

    @property
    def average(self) -> PidDecoder: ...
    def step(self, image: Tensor, factor: float) -> dict[str, float]: ...
    def decode(self, latent: Tensor, noise: Tensor, sigma: float) -> Tensor: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def batch(photo_set: list[np.ndarray], crops: int, random: np.random.Generator) -> Tensor:
    """Crops [B, 3, H, W] of one output size, about as many pixels as `crops` of 256×256 have."""
    size = SIZES[random.choice(len(SIZES), p=SIZE_ODDS)]
    count = max(1, crops * 256 * 256 // (size[0] * size[1]))
    return photos.random_crops(photo_set, count, size, random, photos.CHOICE)


def rate_factor(step: int, steps: int) -> float:
    """The learning rate at a step, against its peak: rising, level, falling to zero."""
    return min(1.0, (step + 1) / WARM_UP, (steps - step) / (FALL * steps))


def export(decoder: nn.Module, trained: str, path: Path) -> None:
    """The weights in bfloat16 under the released names, with the configuration and their history as metadata."""
    weights = {name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in decoder.state_dict().items()}
    metadata = {"config": json.dumps(PUBLISHED), "latent_space": "dct", "trained": trained}
    save_file(weights, path, metadata)


class Run:
    """A stage, the steps it has made and the losses of each, in a folder."""

    def __init__(self, stage: Trainer, folder: Path) -> None:
        self.stage, self.folder = stage, folder
        self.losses: list[dict[str, float]] = []

    @property
    def steps(self) -> int:
        return len(self.losses)

    def save(self) -> None:
        new = self.folder / "checkpoint.pt.new"
        torch.save({"stage": self.stage.state_dict(), "losses": self.losses}, new)
        new.replace(self.folder / "checkpoint.pt")

    def resume(self) -> bool:
        """Go on from the folder's checkpoint; False where there is none."""
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return False
        state = torch.load(path, weights_only=True, map_location="cpu")
        self.stage.load_state_dict(state["stage"])
        self.losses = state["losses"]
        return True

    def report(self, held_out: Tensor) -> str:
        """Write the weights, samples of them and the loss curves; returns what the samples measure."""
        export(self.stage.average, f"{self.stage.title}, {self.steps} steps", self.folder / "decoder.safetensors")
        pictures.loss_curves(self.losses, self.folder / "losses.png")
        latent = dct.encode(dct.downscale(held_out))
        random = torch.Generator().manual_seed(0)
        noise = torch.randn(held_out.shape, generator=random).to(held_out)
        noisy = 0.6 * latent + 0.4 * torch.randn(latent.shape, generator=random).to(latent)
        rows = [held_out, measures.bicubic(latent)]
        rows += [self.stage.decode(z, noise, sigma).clamp(-1, 1) for z, sigma in ((latent, 0.0), (noisy, 0.4))]
        pictures.save(rows, self.folder / "samples.png")
        finished, stopped = (measures.psnr(row, held_out) for row in rows[2:])
        look = f"sharpness {measures.sharpness(rows[2], held_out):.2f}, grid {measures.grid(rows[2]):.2f}"
        return f"{finished:.2f} dB, {look}, at sigma 0.4 {stopped:.2f} dB"


def train(run: Run, photo_set: list[np.ndarray], held_out: Tensor, steps: int) -> None:
    """Until `steps` steps have been made, saving and reporting on the way."""
    random = np.random.default_rng(run.steps)
    torch.manual_seed(run.steps)
    with tqdm(total=steps, initial=run.steps, unit="step", mininterval=5) as bar:
        while run.steps < steps:
            image = batch(photo_set, run.stage.crops, random).to(held_out.device)
            run.losses.append(run.stage.step(image, rate_factor(run.steps, steps)))
            bar.update()
            if run.steps % run.stage.save_every == 0 or run.steps == steps:
                run.save()
                recent = run.losses[-run.stage.save_every :]
                names = dict.fromkeys(name for step in recent for name in step)
                means = (f"{name} {np.mean([step[name] for step in recent if name in step]):.4f}" for name in names)
                bar.write(f"{run.steps} steps: {', '.join(means)}; held out: {run.report(held_out)}")


def begin(stage: str, photo_set: list[np.ndarray], out: Path, device: torch.device) -> Trainer:
    """A stage before its first step: a teacher as engines/training/start.py wires it, a student as its teacher."""
    if stage == "teacher":
        decoder = PidDecoder(CONFIG)
        wire(decoder)
        start_linear(decoder, photo_set, np.random.default_rng(0))
        return Teacher(decoder.to(device))
    teacher = Teacher(PidDecoder(CONFIG))
    run = Run(teacher, out / "teacher")
    if not run.resume():
        raise SystemExit(f"There is no teacher in {out}: train one with --stage teacher first.")
    return Student(teacher.average.to(device), f"student of a teacher of {run.steps} steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("teacher", "student"), required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder that engines.training.photos filled")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that training writes")
    parser.add_argument("--steps", type=int, default=10000, help="steps in all, those of a resumed run included")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = options.out / options.stage
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    photo_set = photos.load(options.data, held_out=False)
    held_out = photos.random_crops(photos.load(options.data, held_out=True), 4, (256, 256), np.random.default_rng(1))
    run = Run(begin(options.stage, photo_set, options.out, device), folder)
    print(
        f"{options.stage} on {device}: {'going on after' if run.resume() else 'beginning;'} {run.steps} steps",
        flush=True,
    )
    train(run, photo_set, held_out.to(device), options.steps)


if __name__ == "__main__":
    main()
