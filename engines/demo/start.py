"""Where training starts: a network wired to compute the velocity of the best linear decoder.

A diffusion decoder of random weights has to discover that v = (x − x0) / t before it can learn anything about pictures.
Written down instead, that leaves all of the training to the picture. Weights are set under their released names.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engines.demo import dct, photos
from engines.demo.decoder import CONFIG
from engines.pid import PidDecoder

TIMES = (1.0, 0.999, 0.866, 0.634, 0.342)  # where the sampler calls the network; 1.0 only for a single step
TIME_FEATURES = 16  # channels of the hidden size kept for the time
LINEAR_RANK = 48
AMPLITUDE, CONSTANT = 100.0, 6000.0  # of a pixel's colour and of its constant channel; positions have amplitude 1
_PIXEL_BLOCK = f"pixel_blocks.{CONFIG.pixel_depth - 1}."
_MODULATION = _PIXEL_BLOCK + "adaLN_modulation.0."
# What writes into the stream of patches; it starts nearly silent, so that the pixel block hears the picture alone.
_STREAM = ("s_embedder.proj.weight", "attn.proj_x.weight", "mlp_x.w2.weight")
_RGB = slice(0, 3)
_SHIFT, _SCALE, _GATE = 3, 4, 5  # of the MLP, among the six modulations


def _rows(tensor: Tensor) -> Tensor:
    """Weight or bias of a pixel block's modulation as [256, 6, C, ...], a view."""
    return tensor.unflatten(0, (256, 6, CONFIG.pixel_channels))


@torch.no_grad()
def wire(decoder: PidDecoder) -> None:
    """Make the velocity (x − x0) / t, with x0 whatever `regress` finds in the latent.

    A pixel holds A·x on three channels and a constant on the last, large enough that RMS norms merely rescale and that
    the position pattern, added to all channels, hardly shows. Its MLP begins as the identity (GELU(a) − GELU(−a) = a),
    and the modulation does the rest: scale −t, gate A/t and shift −x0 make
    A·x + A/t · ((1 − t)·x − x0) = A · (x − x0) / t.
    """
    weights = decoder.state_dict()  # the parameters themselves, without gradients
    unit = torch.eye(CONFIG.pixel_channels)
    gain = CONSTANT / math.sqrt(CONFIG.pixel_channels) / AMPLITUDE  # from normalised channels back to colours
    for name, tensor in weights.items():
        if name.endswith(".bias"):
            tensor.zero_()
        if name.endswith(".weight") and (name.endswith(_STREAM) or "output_heads" in name):
            tensor *= 0.02
            tensor[-TIME_FEATURES:] = 0
        if name.endswith("block.5.weight") or "adaLN_modulation" in name:
            tensor *= 0.2
        if "adaLN_modulation_" in name and name.endswith(".bias"):
            tensor.view(6, -1)[[2, 5]] = 1  # gates open
        if name.endswith("content_proj.weight"):
            tensor.zero_()
        if name.endswith("content_proj.bias"):
            tensor.fill_(2)
        if name.endswith("log_alpha"):
            tensor.fill_(1)

    weights["pixel_embedder.proj.weight"][_RGB] = AMPLITUDE * torch.eye(3)
    weights["pixel_embedder.proj.weight"][-1] = 0
    weights["pixel_embedder.proj.bias"][-1] = CONSTANT
    for name in (_PIXEL_BLOCK + "norm2.weight", "final_layer.norm.weight"):
        weights[name][_RGB] = gain
    for to, sign in ((slice(0, 3), 1), (slice(3, 6), -1)):
        weights[_PIXEL_BLOCK + "mlp.fc1.weight"][to] = sign * unit[_RGB]
        weights[_PIXEL_BLOCK + "mlp.fc2.weight"][:, to] = sign * unit[:, _RGB]
    weights[_PIXEL_BLOCK + "mlp.fc2.weight"][_RGB, 6:] *= 0.01
    weights["final_layer.linear.weight"].copy_(unit[_RGB])
    _wire_time(decoder)


def _wire_time(decoder: PidDecoder) -> None:
    """Keep the time in the last channels, the picture in the others, and solve for the modulations that depend on t."""
    weights = decoder.state_dict()
    weights["t_embedder.mlp.2.weight"][:-TIME_FEATURES] = 0
    weights["t_embedder.mlp.2.weight"][-TIME_FEATURES:] *= 20
    weights["lq_proj.pit_head.weight"][-TIME_FEATURES:] = 0
    t = torch.tensor(TIMES)
    features = F.silu(decoder.t_embedder(t))[:, 0, -TIME_FEATURES:]  # [times, features]
    wanted = torch.stack((-t, AMPLITUDE / t), dim=1)  # scale and gate, [times, 2]
    rows = _rows(weights[_MODULATION + "weight"])
    rows[:, [_SCALE, _GATE], _RGB] = 0
    rows[:, [_SCALE, _GATE], _RGB, -TIME_FEATURES:] = (torch.linalg.pinv(features) @ wanted).T[None, :, None]
    rows[:, _SHIFT, _RGB, -TIME_FEATURES:] = 0
    _rows(weights[_MODULATION + "bias"])[:, 2] = 1  # the attention's gate


def _fit_linear(photo_set: list[np.ndarray], random: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The best linear map from 3×3 latent cells to the patch in their middle, by reduced-rank least squares.

    Returns features [R, 16, 3, 3] with bias [R], of unit mean square, and the patch of each [R, 3·256].
    """
    channels, taps = dct.CHANNELS, 9 * dct.CHANNELS
    gram, cross = torch.zeros(taps + 1, taps + 1).double(), torch.zeros(taps + 1, 768).double()
    for _ in range(40):
        image = photos.random_crops(photo_set, 8, (256, 256), random)
        cells = F.unfold(F.pad(dct.encode(dct.downscale(image)), (1, 1, 1, 1), mode="replicate"), 3)
        cells = F.pad(cells.transpose(1, 2).flatten(0, 1), (0, 1), value=1.0)  # [B·L, taps + 1], the last constant
        gram += cells.T @ cells
        cross += cells.T @ F.pixel_unshuffle(image, 16).flatten(2).transpose(1, 2).flatten(0, 1)
    solution = torch.linalg.solve(gram + 1e-3 * torch.eye(taps + 1), cross)  # [taps + 1, 768]
    patches = torch.linalg.eigh(solution.T @ gram @ solution).eigenvectors[:, -LINEAR_RANK:]  # [768, R]
    features = solution @ patches  # [taps + 1, R]
    spread = (features * (gram @ features)).sum(dim=0).div(gram[-1, -1]).sqrt()
    features, patches = (features / spread).T.float(), (patches * spread).T.float()
    return features[:, :-1].unflatten(1, (channels, 3, 3)), features[:, -1], patches


@torch.no_grad()
def start_linear(decoder: PidDecoder, photo_set: list[np.ndarray], random: np.random.Generator) -> None:
    """Give a wired network the best linear decoder as the picture to begin with.

    The features pass the adapter unchanged (SiLU(a) − SiLU(−a) = a) and reach the pixel block's shift, whose rows hold
    the patch that belongs to each.
    """
    kernels, bias, patches = _fit_linear(photo_set, random)
    weights, channels = decoder.state_dict(), dct.CHANNELS
    first, second = weights["lq_proj.latent_proj.0.weight"], weights["lq_proj.latent_proj.2.weight"]
    second[:LINEAR_RANK] = 0
    for to, sign in ((slice(0, channels), 1), (slice(channels, 2 * channels), -1)):
        first[to] = 0
        first[to, :, 1, 1] = sign * torch.eye(channels)
        second[:LINEAR_RANK, to] = sign * kernels
    weights["lq_proj.latent_proj.2.bias"][:LINEAR_RANK] = bias
    for name in weights:
        if name.endswith("block.5.weight"):
            weights[name][:LINEAR_RANK] = 0
    gate = weights["pit_lq_gate.content_proj.bias"].sigmoid()
    weights["lq_proj.pit_head.weight"][:LINEAR_RANK] = torch.eye(LINEAR_RANK, CONFIG.adapter_width) / gate
    shift = _rows(weights[_MODULATION + "weight"])[:, _SHIFT, _RGB]  # [256, 3, D]
    shift.zero_()
    shift[..., :LINEAR_RANK] = -patches.view(-1, 3, 256).permute(2, 1, 0)


def regress(decoder: PidDecoder, latent: Tensor, sigma: Tensor) -> Tensor:
    """x0 as the wired network has it, from the latent alone: [B, 16, h, w], sigma [B] -> [B, 3, 16h, 16w]."""
    _, tokens = decoder.lq_proj(latent)
    assert decoder.pit_lq_gate is not None  # noqa: S101  the demo's configuration has it
    s = decoder.pit_lq_gate(torch.zeros_like(tokens), tokens, sigma)  # [B, L, D]
    weight, bias = (_rows(decoder.get_parameter(_MODULATION + n))[:, _SHIFT, _RGB] for n in ("weight", "bias"))
    shift = F.linear(s, weight.transpose(0, 1).flatten(0, 1), bias.T.flatten())  # [B, L, 3·256]
    return F.pixel_shuffle(-shift.transpose(1, 2).unflatten(2, latent.shape[2:]), 16)
