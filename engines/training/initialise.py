"""Initial weights: a network that computes the velocity of the best linear decoder, at every timestep t.

A diffusion decoder with random weights has to learn what noise is before it can learn anything about images. Here that
part is set by construction, so that all training goes into the content of images. Weights are set under their released
names; the formula of the velocity is in `linear_velocity`.

The hidden channels are divided into three groups: those of the image, XT_CHANNELS that carry the patches of x_t, and
TIME_CHANNELS that carry functions of t.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.bundled import dct
from engines.bundled.decoder import CONFIG
from engines.pid import PidDecoder
from engines.pid.config import PATCH, PATCH_PIXELS
from engines.training.linear_velocity import fit_time_embedding

TIME_CHANNELS = 16  # the last hidden channels: functions of t
XT_CHANNELS = 32  # the hidden channels before them: the patches of x_t
IMAGE_CHANNELS = CONFIG.hidden_size - XT_CHANNELS - TIME_CHANNELS
XT = slice(-TIME_CHANNELS - XT_CHANNELS, -TIME_CHANNELS)
XT_GATE_LOGIT = 8.0  # of the time embedding on those channels, before a SiLU: +8 (open) at t = 0, −8 (closed) at t = 1
# Amplitudes of a pixel's colour and of its constant channel; its position has amplitude 1.
COLOUR_AMPLITUDE, CONSTANT_AMPLITUDE = 400.0, 24000.0
_PIXEL_BLOCK = f"pixel_blocks.{CONFIG.pixel_depth - 1}."
_MODULATION = _PIXEL_BLOCK + "adaLN_modulation.0."
_ZEROED = (".bias", "attn.proj_x.weight", "mlp_x.w2.weight", "expand_from_attn.weight")  # outputs of residual branches
_RGB = slice(0, 3)
_ATTENTION_GATE, _MLP_SHIFT, _MLP_SCALE, _MLP_GATE = 2, 3, 4, 5  # among the six modulations of a block


def initialise_velocity(decoder: PidDecoder) -> None:
    """Make the network compute the linear velocity of x_t and f, where f is the result of `decode_mean`.

    A pixel holds A·x on its colour channels and a constant on its last channel. The constant is so large that RMS norms
    only rescale, and that the position encoding, which is added to all channels, is negligible. The pixel block's MLP
    starts as the identity (GELU(a) − GELU(−a) = a), and its modulation does the rest: scale s, gate A·g, shift −f.
    """
    weights = decoder.state_dict()
    _scale_random_weights(weights)
    _set_pixel_path(weights)
    _set_time_path(decoder)
    _set_patch_path(decoder)


@torch.no_grad()
def _scale_random_weights(weights: dict[str, Tensor]) -> None:
    """Zero the outputs of residual branches, and shrink what is learned on top of the linear decoder."""
    for name, tensor in weights.items():
        if name.endswith(_ZEROED):
            tensor.zero_()
        if "output_heads" in name and name.endswith(".weight"):
            tensor *= 0.02
            tensor[-TIME_CHANNELS:] = 0
        if name.endswith("block.5.weight") or "adaLN_modulation" in name:
            tensor *= 0.2
        if "adaLN_modulation_" in name and name.endswith(".bias"):
            tensor.view(6, -1)[[2, 5]] = 1  # gates of attention and MLP are open
        if name.endswith("content_proj.weight"):
            tensor.zero_()
        if name.endswith("content_proj.bias"):
            tensor.fill_(2)
        if name.endswith("log_alpha"):
            tensor.fill_(1)


@torch.no_grad()
def _set_pixel_path(weights: dict[str, Tensor]) -> None:
    """Carry colours unchanged through the pixel embedder, the pixel block's MLP and the final layer."""
    unit = torch.eye(CONFIG.pixel_channels)
    gain = CONSTANT_AMPLITUDE / math.sqrt(CONFIG.pixel_channels) / COLOUR_AMPLITUDE  # from normalised to colours
    weights["pixel_embedder.proj.weight"][_RGB] = COLOUR_AMPLITUDE * torch.eye(3)
    weights["pixel_embedder.proj.weight"][-1] = 0
    weights["pixel_embedder.proj.bias"][-1] = CONSTANT_AMPLITUDE
    for name in (_PIXEL_BLOCK + "norm1.weight", _PIXEL_BLOCK + "norm2.weight", "final_layer.norm.weight"):
        weights[name][_RGB] = gain
    for to, sign in ((slice(0, 3), 1), (slice(3, 6), -1)):
        weights[_PIXEL_BLOCK + "mlp.fc1.weight"][to] = sign * unit[_RGB]
        weights[_PIXEL_BLOCK + "mlp.fc2.weight"][:, to] = sign * unit[:, _RGB]
    weights[_PIXEL_BLOCK + "mlp.fc2.weight"][_RGB, 6:] *= 0.01
    weights["final_layer.linear.weight"].copy_(unit[_RGB])
    _by_pixel(weights[_MODULATION + "bias"])[:, _ATTENTION_GATE, _RGB] = COLOUR_AMPLITUDE


def _set_time_path(decoder: PidDecoder) -> None:
    """Represent functions of t on the time channels, and make the modulations that depend on t from them.

    Six of the channels carry ±s, ±g and ±(1 − t). SiLU passes such pairs unchanged: SiLU(a) − SiLU(−a) = a.
    """
    units = torch.tensor([1.0, 5.0, 1.0])  # of s, g and 1 − t, so that all three are about 1
    readout = fit_time_embedding(decoder.t_embedder.mlp, units)
    weights = decoder.state_dict()
    last = weights["t_embedder.mlp.2.weight"]
    last[:-TIME_CHANNELS] = 0
    last[-6:] = torch.cat((readout, -readout))
    last[XT] = 2 * XT_GATE_LOGIT * readout[2]
    weights["t_embedder.mlp.2.bias"][XT] = -XT_GATE_LOGIT
    weights["lq_proj.pit_head.weight"][-TIME_CHANNELS:] = 0
    modulation = _by_pixel(weights[_MODULATION + "weight"])
    modulation[:, [_MLP_SHIFT, _MLP_SCALE, _MLP_GATE], _RGB] = 0
    for part, channel, unit in ((_MLP_SCALE, -6, units[0]), (_MLP_GATE, -5, COLOUR_AMPLITUDE * units[1])):
        modulation[:, part, _RGB, channel] = unit
        modulation[:, part, _RGB, channel + 3] = -unit


@torch.no_grad()
def _set_patch_path(decoder: PidDecoder) -> None:
    """Give the patch blocks the frequencies of x_t that the latent does not determine, scaled up as noise decreases.

    Without that scale, the blocks would learn to use them at small t, and pass noise on at large t.
    """
    embedding = decoder.s_embedder.proj.weight
    embedding.zero_()
    embedding[XT] = _frequencies_above_latent(XT_CHANNELS)
    for name, weight in decoder.state_dict().items():
        if "adaLN_modulation" in name and name.endswith(".weight"):
            weight[:, XT] = 0
        if "adaLN_modulation_img" in name:
            for part in (1, 4):  # the scales of the inputs of attention and MLP
                scale = weight.unflatten(0, (6, -1))[part, XT]
                if name.endswith(".bias"):
                    scale.fill_(-1)
                else:
                    scale.zero_()
                    scale[:, -4], scale[:, -1] = 1, -1  # 1 − t


def _frequencies_above_latent(count: int) -> Tensor:
    """Return the lowest luma frequencies of a patch that the latent lacks, [count, 3·256], orthonormal."""
    waves, luma = dct.basis(CONFIG.cell_side), F.normalize(dct.ycbcr()[0], dim=0)
    pairs = [(v, total - v) for total in range(dct.BLOCK, CONFIG.cell_side) for v in range(total + 1)]
    return torch.stack([torch.einsum("c,y,x->cyx", luma, waves[v], waves[u]).flatten() for v, u in pairs[:count]])


def freeze_noise_paths(decoder: PidDecoder, pixel_modulation: bool) -> None:
    """Keep x_t away from the image channels during training, except through the channels that are gated by t.

    At small t, x_t is informative, and the network learns to use it through every path that is open. At large t, the
    same paths pass noise into the image, and closing them again takes longer than the rest of the training.

    Args:
        decoder: The network; hooks are added to its parameters that zero parts of their gradients.
        pixel_modulation: Also keep the image channels from controlling how much of a pixel's own noise passes. For
            networks that are trained at small t.
    """
    embedding = decoder.s_embedder.proj.weight
    trained = torch.zeros_like(embedding)
    trained[XT] = 1
    embedding.register_hook(lambda gradient: gradient * trained)
    if pixel_modulation:
        weight = decoder.get_parameter(_MODULATION + "weight")
        free = torch.ones_like(weight)
        _by_pixel(free)[:, _MLP_SCALE:, _RGB, : XT.start] = 0
        weight.register_hook(lambda gradient: gradient * free)


def decode_mean(decoder: PidDecoder, latent: Tensor, sigma: Tensor) -> Tensor:
    """Return f, which the initial network computes from the latent: [B, 16, h, w], sigma [B] -> [B, 3, 16h, 16w]."""
    adapter, pixel = decoder.lq_proj(latent)
    assert decoder.pit_lq_gate is not None  # noqa: S101  the bundled decoder's configuration has it
    *injections, pixel = (tokens.flatten(1, 2) for tokens in (*adapter, pixel))  # each [B, L, D]
    tokens = torch.zeros_like(pixel)
    for gate, injection in zip(decoder.lq_proj.gate_modules, injections, strict=True):
        tokens = gate(tokens, injection, sigma)
    s = decoder.pit_lq_gate(F.silu(tokens), pixel, sigma)
    weight, bias = pixel_shift(decoder)
    shift = F.linear(s, weight.transpose(0, 1).flatten(0, 1), bias.T.flatten())  # [B, L, 3·256]
    return F.pixel_shuffle(-shift.transpose(1, 2).unflatten(2, latent.shape[2:]), PATCH)


def pixel_shift(decoder: PidDecoder) -> tuple[Tensor, Tensor]:
    """Return the layer that subtracts f from a patch: views of the weight [256, 3, D] and the bias [256, 3]."""
    weight, bias = (_by_pixel(decoder.get_parameter(_MODULATION + name)) for name in ("weight", "bias"))
    return weight[:, _MLP_SHIFT, _RGB], bias[:, _MLP_SHIFT, _RGB]


def _by_pixel(tensor: Tensor) -> Tensor:
    """Return a view [256, 6, C, ...] of the weight or bias of a pixel block's modulation."""
    return tensor.unflatten(0, (PATCH_PIXELS, 6, CONFIG.pixel_channels))
