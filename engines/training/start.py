"""Where training starts: a network wired to compute the velocity of the best linear decoder, at every time t.

A diffusion decoder of random weights has to discover what noise is before it can learn anything about pictures.
Written down instead, that leaves all of the training to the picture. Weights are set under their released names.

With f the best linear decode of the latent and r the root mean square of what it misses, the best guess of a pixel from
f and from x = (1 − t)·x0 + t·ε weighs both by their variances. Its velocity is linear in x and f:
v = x + g·((1 + s)·x − f), with g = t / (r²(1 − t)² + t²) and s = −t − r²(1 − t)(2 − t)/t.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.bundled import dct
from engines.bundled.decoder import CONFIG
from engines.pid import PidDecoder
from engines.pid.sampler import MODEL_TIMESTEPS
from engines.training.flow import SHORTEST
from engines.training.linear import COARSE_GATE, COARSE_RANK, FINE_GATE, FINE_RANK, fit_linear

PICTURE, RESIDUAL = 0.5, 0.06  # root mean squares of pictures in [-1, 1] and of what their linear decode misses
TIME_FEATURES = 16  # channels of the hidden size kept for the time
NOISE_FEATURES = 32  # and for what patches of x show, before them
OPENING = 8.0  # of the time embedding on those, through the SiLU behind it: open at t = 0, closed at t = 1
AMPLITUDE, CONSTANT = 400.0, 24000.0  # of a pixel's colour and of its constant channel; positions have amplitude 1
_PIXEL_BLOCK = f"pixel_blocks.{CONFIG.pixel_depth - 1}."
_MODULATION = _PIXEL_BLOCK + "adaLN_modulation.0."
# What blocks write; silent at first, so that the pixels hear of nothing but the picture.
_SILENT = ("attn.proj_x.weight", "mlp_x.w2.weight", "expand_from_attn.weight")
_RGB = slice(0, 3)
_NOISE = slice(-TIME_FEATURES - NOISE_FEATURES, -TIME_FEATURES)
_ATTENTION_GATE, _SHIFT, _SCALE, _GATE = 2, 3, 4, 5  # among the six modulations


def wired_gate(t: Tensor) -> Tensor:
    """g of the module's formula."""
    return t / (RESIDUAL**2 * (1 - t) ** 2 + t**2)


def wired_scale(t: Tensor) -> Tensor:
    """s of the module's formula."""
    return -t - RESIDUAL**2 * (1 - t) * (2 - t) / t


def _rows(tensor: Tensor) -> Tensor:
    """Weight or bias of a pixel block's modulation as [256, 6, C, ...], a view."""
    return tensor.unflatten(0, (256, 6, CONFIG.pixel_channels))


def wire(decoder: PidDecoder) -> None:
    """Make the velocity of the module's formula, with f whatever `regress` finds in the latent.

    A pixel holds A·x on three channels and a constant on the last, large enough that RMS norms merely rescale and that
    the position pattern, added to all channels, hardly shows. Its MLP begins as the identity (GELU(a) − GELU(−a) = a),
    and the modulation does the rest: scale s, gate A·g and shift −f.
    """
    _wire_pixels(decoder.state_dict())
    _wire_time(decoder)
    _wire_patches(decoder)


@torch.no_grad()
def _wire_pixels(weights: dict[str, Tensor]) -> None:
    unit = torch.eye(CONFIG.pixel_channels)
    gain = CONSTANT / math.sqrt(CONFIG.pixel_channels) / AMPLITUDE  # from normalised channels back to colours
    for name, tensor in weights.items():
        if name.endswith((".bias", *_SILENT)):
            tensor.zero_()
        if "output_heads" in name and name.endswith(".weight"):
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
    for name in (_PIXEL_BLOCK + "norm1.weight", _PIXEL_BLOCK + "norm2.weight", "final_layer.norm.weight"):
        weights[name][_RGB] = gain
    for to, sign in ((slice(0, 3), 1), (slice(3, 6), -1)):
        weights[_PIXEL_BLOCK + "mlp.fc1.weight"][to] = sign * unit[_RGB]
        weights[_PIXEL_BLOCK + "mlp.fc2.weight"][:, to] = sign * unit[:, _RGB]
    weights[_PIXEL_BLOCK + "mlp.fc2.weight"][_RGB, 6:] *= 0.01
    weights["final_layer.linear.weight"].copy_(unit[_RGB])
    _rows(weights[_MODULATION + "bias"])[:, _ATTENTION_GATE, _RGB] = AMPLITUDE


def _wire_time(decoder: PidDecoder) -> None:
    """Keep the time in the last channels, the picture in the others, and make the modulations that depend on t.

    Six of those channels carry ±s, ±g and ±(1 − t), which SiLU passes in pairs (SiLU(a) − SiLU(−a) = a).
    """
    units = torch.tensor([1.0, 5.0, 1.0])  # of s, g and 1 − t, to bring all to about 1
    readout = _fit_times(decoder.t_embedder.mlp, units)
    weights = decoder.state_dict()
    last = weights["t_embedder.mlp.2.weight"]
    last[:-TIME_FEATURES] = 0
    last[-6:] = torch.cat((readout, -readout))
    last[_NOISE] = 2 * OPENING * readout[2]
    weights["t_embedder.mlp.2.bias"][_NOISE] = -OPENING
    weights["lq_proj.pit_head.weight"][-TIME_FEATURES:] = 0
    rows = _rows(weights[_MODULATION + "weight"])
    rows[:, [_SHIFT, _SCALE, _GATE], _RGB] = 0
    for part, feature, unit in ((_SCALE, -6, units[0]), (_GATE, -5, AMPLITUDE * units[1])):
        rows[:, part, _RGB, feature] = unit
        rows[:, part, _RGB, feature + 3] = -unit


@torch.no_grad()
def _wire_patches(decoder: PidDecoder) -> None:
    """Let the patch blocks see of x what the latent leaves open, the more the less noise there is on it.

    Seen at all times alike, it would be learned where t is small and be noise in the picture where t is large.
    """
    embedding = decoder.s_embedder.proj.weight
    embedding.zero_()
    embedding[_NOISE] = _next_frequencies(NOISE_FEATURES)
    for name, weight in decoder.state_dict().items():
        if "adaLN_modulation" in name and name.endswith(".weight"):
            weight[:, _NOISE] = 0
        if "adaLN_modulation_img" in name:
            for part in (1, 4):  # the scales of what attention and MLP are given
                scale = weight.unflatten(0, (6, -1))[part, _NOISE]
                if name.endswith(".bias"):
                    scale.fill_(-1)
                else:
                    scale.zero_()
                    scale[:, -4], scale[:, -1] = 1, -1


def hold(decoder: PidDecoder, modulation: bool) -> None:
    """Keep some of the wiring from training: the picture's own channels hear of x by nothing but what t gates.

    Where t is small, x tells much, and would be let in by every way there is; where t is large the same ways let noise
    into the picture, and learning to close them again takes longer than all the rest. With `modulation`, which is for
    networks that learn small t, the picture's channels have no say in how far a pixel's own noise is let through.
    """
    embedding = decoder.s_embedder.proj.weight
    seen = torch.zeros_like(embedding)
    seen[_NOISE] = 1
    embedding.register_hook(lambda gradient: gradient * seen)
    if modulation:
        weight = decoder.get_parameter(_MODULATION + "weight")
        free = torch.ones_like(weight)
        _rows(free)[:, _SCALE:, _RGB, : _NOISE.start] = 0
        weight.register_hook(lambda gradient: gradient * free)


def _next_frequencies(count: int) -> Tensor:
    """The lowest frequencies of a patch's luma that the latent does not have, [count, 3·256], orthonormal."""
    waves, luma = dct.basis(CONFIG.cell_side), F.normalize(dct.ycbcr()[0], dim=0)
    pairs = [(v, total - v) for total in range(dct.BLOCK, CONFIG.cell_side) for v in range(total + 1)]
    return torch.stack([torch.einsum("c,y,x->cyx", luma, waves[v], waves[u]).flatten() for v, u in pairs[:count]])


def _fit_times(mlp: nn.Sequential, units: Tensor, steps: int = 1500) -> Tensor:
    """Train the first layer of the time embedding until s, g and 1 − t are linear in what it makes; the maps, [3, D].

    The embedding's waves are far quicker than s and g, so that random weights would not do. An error of s or g counts
    as what it does to the velocity, against the error that the velocity has anyway.
    """
    first = mlp[0]
    assert isinstance(first, nn.Linear)  # noqa: S101
    t = torch.cat(
        (torch.linspace(SHORTEST, 1, 3000), torch.linspace(SHORTEST, 0.2, 1000), torch.tensor(MODEL_TIMESTEPS))
    )
    s, g = wired_scale(t), wired_gate(t)
    wanted = torch.stack((s, g, 1 - t), dim=1) / units  # [times, 3]
    x = ((1 - t) ** 2 * PICTURE**2 + t**2).sqrt()
    picture = (((1 + s) * (1 - t) - 1) ** 2 * PICTURE**2 + ((1 + s) * t) ** 2).sqrt()  # of (1 + s)·x − f
    weight = torch.stack((g * x, picture, 0.1 * g), dim=1) * units / (RESIDUAL * (g / t).sqrt())[:, None]
    frequencies = torch.exp(-math.log(10) / 128 * torch.arange(128, dtype=torch.float32))
    angles = 1000 * t[:, None] * frequencies
    waves = torch.cat((angles.cos(), angles.sin()), dim=1)  # as TimeEmbedder makes them
    readout = torch.zeros(3, first.out_features, requires_grad=True)
    optimizer = torch.optim.Adam([first.weight, first.bias, readout], lr=3e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        some = torch.randint(len(t), (1000,))
        error = F.silu(first(waves[some])) @ readout.T - wanted[some]
        optimizer.zero_grad()
        (weight[some] * error).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        hidden = F.silu(first(waves)).double()
        rows = []
        for column, heavy in zip(wanted.double().T, weight.double().T, strict=True):
            weighted = heavy[:, None] * hidden
            gram = weighted.T @ weighted + 1e-6 * len(t) * torch.eye(hidden.shape[1])
            rows.append(torch.linalg.solve(gram, weighted.T @ (heavy * column)))
        return torch.stack(rows).float()


@torch.no_grad()
def start_linear(decoder: PidDecoder, photo_set: list[np.ndarray], random: np.random.Generator) -> None:
    """Give a wired network the best linear decoder as the picture to begin with.

    Features pass the adapter unchanged (SiLU(a) − SiLU(−a) = a). The fine ones reach the pixel block's condition by its
    own gate, the coarse ones by the first gate of the patch blocks and, in pairs, through the SiLU behind them.
    """
    coarse, fine = fit_linear(photo_set, random)
    weights, channels = decoder.state_dict(), dct.CHANNELS
    first, second = weights["lq_proj.latent_proj.0.weight"], weights["lq_proj.latent_proj.2.weight"]
    mean = torch.tensor(dct.MEANS)
    count = channels + len(mean)
    rank = FINE_RANK + COARSE_RANK
    kernels = torch.cat((fine.kernels, coarse.kernels)).float()
    second[:rank] = 0
    for start, sign in ((0, 1.0), (count, -1.0)):
        first[start : start + count] = 0
        first[start : start + channels, :, 1, 1] = sign * torch.eye(channels)
        first[start + channels : start + count] = sign * torch.eye(channels)[mean, :, None, None] / 9
        second[:rank, start : start + count] = sign * kernels[:, :-1].unflatten(1, (count, 3, 3))
    weights["lq_proj.latent_proj.2.bias"][:rank] = kernels[:, -1]
    for name in weights:
        if name.endswith("block.5.weight"):
            weights[name][:rank] = 0
    for gate, (bias, log_alpha) in (("lq_proj.gate_modules.0", COARSE_GATE), ("pit_lq_gate", FINE_GATE)):
        weights[gate + ".content_proj.bias"].fill_(bias)
        weights[gate + ".log_alpha"].fill_(log_alpha)
    unit = torch.eye(rank, CONFIG.adapter_width)
    ends = [FINE_RANK, rank, rank + COARSE_RANK]
    opened = [1 / torch.tensor(gate[0]).sigmoid() for gate in (FINE_GATE, COARSE_GATE)]
    weights["lq_proj.pit_head.weight"][: ends[2]] = 0
    weights["lq_proj.pit_head.weight"][: ends[0]] = opened[0] * unit[: ends[0]]
    for head, factor in (("lq_proj.output_heads.0.weight", opened[1]), ("lq_proj.output_heads.1.weight", 0.0)):
        weights[head][: ends[2]] = 0
        weights[head][ends[0] : ends[1]] = factor * unit[FINE_RANK:]
        weights[head][ends[1] : ends[2]] = -factor * unit[FINE_RANK:]
    shift = _rows(weights[_MODULATION + "weight"])[:, _SHIFT, _RGB]  # [256, 3, D]
    shift.zero_()
    shift[..., : ends[2]] = (
        -torch.cat((fine.patches, coarse.patches, -coarse.patches)).view(-1, 3, 256).permute(2, 1, 0)
    )


def regress(decoder: PidDecoder, latent: Tensor, sigma: Tensor) -> Tensor:
    """x0 as the wired network has it, from the latent alone: [B, 16, h, w], sigma [B] -> [B, 3, 16h, 16w]."""
    injections, pixel = decoder.lq_proj(latent)
    assert decoder.pit_lq_gate is not None  # noqa: S101  the demo's configuration has it
    tokens = torch.zeros_like(pixel)  # [B, L, D]
    for gate, injection in zip(decoder.lq_proj.gate_modules, injections, strict=True):
        tokens = gate(tokens, injection, sigma)
    s = decoder.pit_lq_gate(F.silu(tokens), pixel, sigma)
    weight, bias = (_rows(decoder.get_parameter(_MODULATION + n))[:, _SHIFT, _RGB] for n in ("weight", "bias"))
    shift = F.linear(s, weight.transpose(0, 1).flatten(0, 1), bias.T.flatten())  # [B, L, 3·256]
    return F.pixel_shuffle(-shift.transpose(1, 2).unflatten(2, latent.shape[2:]), 16)
