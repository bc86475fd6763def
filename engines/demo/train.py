"""Trains the bundled decoder on a CPU: `python -m engines.demo.train --data DIR --out DIR [--minutes N] [--resume]`.

Two stages share the time. In the first the adapter alone learns to turn a latent into pixels: a plain regression, ten
times cheaper than the whole network. The second trains everything by flow matching, starting from a wiring in which
the pixel block already computes (x − x0) / t from that regression (see engines/demo/start.py).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from engines.demo import dct, evaluate, photos
from engines.demo.decoder import CAPTION_TOKENS, CONFIG, PUBLISHED
from engines.demo.start import TIMES, regress, start_linear, wire
from engines.pid import PidDecoder

TIME_ODDS = (0.08, 0.23, 0.23, 0.23, 0.23)
SIGMA_MAX = 0.8
NOISED_SHARE = 0.25
# Output sizes and their odds: positions depend on the size of the whole picture, so every kind has to be seen.
SIZES = ((256, 256), (384, 384), (512, 512), (256, 384), (384, 256))
REGRESSION_SHARE = 0.3  # of the training time
EMA_DECAY = 0.99
SAVE_SECONDS = 60.0


@dataclass(frozen=True)
class Stage:
    """One stage: learning rate at its peak, pixels in a batch, and the odds of the five output sizes."""

    learning_rate: float
    batch_pixels: int
    size_odds: tuple[float, float, float, float, float]


REGRESSION = Stage(2e-4, 8 * 256 * 256, (0.6, 0.1, 0.1, 0.1, 0.1))
FLOW = Stage(3e-5, 4 * 256 * 256, (0.6, 0.1, 0.1, 0.1, 0.1))


def flow_x0(decoder: PidDecoder, image: Tensor, latent: Tensor, sigma: Tensor) -> Tensor:
    """x0 = x_t − t·v predicted from image [B, 3, H, W] noised to one of the sampler's times."""
    batch = image.shape[0]
    t = torch.tensor(TIMES)[torch.multinomial(torch.tensor(TIME_ODDS), batch, replacement=True)]
    tt = t.view(-1, 1, 1, 1)
    x = (1 - tt) * image + tt * torch.randn_like(image)
    caption = torch.zeros(batch, CAPTION_TOKENS, CONFIG.caption_width)
    conditioning = decoder.condition(latent, caption, (image.shape[2], image.shape[3]))
    return x - tt * decoder.velocity(x, t, conditioning, sigma)


def picture_loss(predicted: Tensor, target: Tensor, sigma: Tensor) -> Tensor:
    """L1 on pixels and on their differences to the right and below: edges count more than a flat offset.

    On x0, so the velocity's error is weighted by t and all four times matter alike in the picture. Noisy latents weigh
    less: their error is several times larger, mostly unavoidable, and would drown the finished ones.
    """
    error = (predicted - target) / (1 + 10 * sigma.view(-1, 1, 1, 1))
    return error.abs().mean() + 0.5 * (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean())


def noised(latent: Tensor) -> tuple[Tensor, Tensor]:
    """Latents at flow-matching noise levels sigma [B]: mostly 0, else uniform up to SIGMA_MAX."""
    batch = latent.shape[0]
    sigma = torch.rand(batch) * SIGMA_MAX * (torch.rand(batch) < NOISED_SHARE)
    level = sigma.view(-1, 1, 1, 1)
    return (1 - level) * latent + level * torch.randn_like(latent), sigma


def batch(photo_set: list[np.ndarray], stage: Stage, random: np.random.Generator) -> Tensor:
    """Crops [B, 3, H, W] of one output size, as many as `batch_pixels` allows."""
    size = SIZES[random.choice(len(SIZES), p=stage.size_odds)]
    return photos.random_crops(photo_set, max(1, stage.batch_pixels // (size[0] * size[1])), size, random)


@dataclass
class Run:
    """A training run: everything that a resumed one needs."""

    decoder: PidDecoder
    seconds: float = 0.0  # spent so far
    steps: int = 0
    stage: Stage | None = None
    ema: AveragedModel = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)

    @property
    def average(self) -> PidDecoder:
        """The moving average of the weights, which is what ships."""
        decoder = self.ema.module
        assert isinstance(decoder, PidDecoder)  # noqa: S101
        return decoder

    def enter(self, stage: Stage) -> None:
        """Begin a stage from the averaged weights of the one before."""
        if self.stage is not None:
            self.decoder.load_state_dict(self.average.state_dict())
        self.stage = stage
        self.ema = AveragedModel(self.decoder, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
        self.optimizer = torch.optim.AdamW(self.decoder.parameters(), betas=(0.9, 0.98), weight_decay=0.0)

    def step(self, image: Tensor, progress: float) -> float:
        """One update; `progress` through the stage, 0..1, sets the learning rate: warm-up, then cosine to zero."""
        assert self.stage is not None  # noqa: S101
        rate = self.stage.learning_rate * min(1.0, progress / 0.02 + 0.01) * (0.5 + 0.5 * math.cos(math.pi * progress))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        latent, sigma = noised(dct.encode(dct.downscale(image)))
        if self.stage is REGRESSION:
            predicted = regress(self.decoder, latent, sigma)
        else:
            predicted = flow_x0(self.decoder, image, latent, sigma)
        loss = picture_loss(predicted, image, sigma)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.decoder.parameters(), 1.0)
        self.optimizer.step()
        self.ema.update_parameters(self.decoder)
        self.steps += 1
        return loss.item()

    def save(self, folder: Path) -> None:
        state = {
            "decoder": self.decoder.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "regression": self.stage is REGRESSION,
            "seconds": self.seconds,
            "steps": self.steps,
        }
        torch.save(state, folder / "run.pt.new")
        (folder / "run.pt.new").replace(folder / "run.pt")

    def resume(self, folder: Path) -> None:
        state = torch.load(folder / "run.pt", weights_only=True)
        self.enter(REGRESSION if state["regression"] else FLOW)
        self.decoder.load_state_dict(state["decoder"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.seconds, self.steps = state["seconds"], state["steps"]


def export(decoder: nn.Module, trained: str, path: Path) -> None:
    """The weights in bfloat16 under the released names, with the configuration and their history as metadata."""
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in decoder.state_dict().items()}
    metadata = {"config": json.dumps(PUBLISHED), "latent_space": "dct", "trained": trained}
    save_file(weights, path, metadata)


def report(run: Run, held_out: Tensor, folder: Path) -> str:
    """Held-out PSNR of the averaged weights; also writes a sheet of decoded over original pictures."""
    latent = dct.encode(dct.downscale(held_out))
    if run.stage is REGRESSION:
        with torch.no_grad():
            image = regress(run.average, latent, torch.zeros(len(latent))).clamp(-1, 1)
    else:
        image = evaluate.decode(run.average, latent)
    evaluate.save([image[:6], held_out[:6]], folder / "sheet.png")
    return f"{evaluate.psnr(image, held_out):.2f} dB"


def train(data: Path, folder: Path, minutes: float, resume: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    decoder = PidDecoder(CONFIG)
    decoder.pixel_memory_budget = 2**40  # in one piece: chunks save memory only where no gradients are kept
    run = Run(decoder)
    if resume:
        run.resume(folder)
    photo_set = photos.load(data, held_out=False)
    random = np.random.default_rng(run.steps)
    if not resume:
        wire(decoder)
        start_linear(decoder, photo_set, random)
    held_out = evaluate.held_out(data, 12, (256, 256))
    losses: list[float] = []
    saved = clock = time.monotonic()
    while run.seconds < 60 * minutes:
        done = run.seconds / (60 * minutes)
        stage = REGRESSION if done < REGRESSION_SHARE else FLOW
        if stage is not run.stage:
            run.enter(stage)
        start, end = (0.0, REGRESSION_SHARE) if stage is REGRESSION else (REGRESSION_SHARE, 1.0)
        losses.append(run.step(batch(photo_set, stage, random), (done - start) / (end - start)))
        run.seconds, clock = run.seconds + time.monotonic() - clock, time.monotonic()
        if clock - saved > SAVE_SECONDS or run.seconds >= 60 * minutes:
            run.save(folder)
            trained = f"{run.steps} steps, {run.seconds / 60:.0f} minutes"
            export(run.average, trained, folder / "decoder.safetensors")
            print(f"{trained}: loss {np.mean(losses):.4f}, held out {report(run, held_out, folder)}", flush=True)
            losses.clear()
            saved = time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that engines.demo.photos filled")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and sample sheets")
    parser.add_argument("--minutes", type=float, default=60, help="training time")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    options = parser.parse_args()
    train(options.data, options.out, options.minutes, options.resume)


if __name__ == "__main__":
    main()
