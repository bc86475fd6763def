"""Published checkpoints: an untrusted file to a network, or a sentence that says why not."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from engines.errors import CheckpointError
from engines.pid.config import PATCH_PIXELS, PidConfig
from engines.pid.network import PidDecoder

_PREFIX = "net."
# Of training, not of the decoder; the second is met after the prefix is gone.
_LEFTOVERS = ("net_ema.", "fake_score.", "discriminator.")
_TRAINING_HEAD = "lq_proj.lq_aux_rgb_head."
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SPLIT_MODULATION = re.compile(r"(pixel_blocks\.\d+\.adaLN_modulation)_(msa|mlp)(?:\.0)?\.(weight|bias)")
# What is known by its number of latent channels, as the adapter's first convolution sees them.
_FAMILIES = {4: "sdxl", 16: "flux, sd3 or qwenimage", 32: "flux2", 128: "flux2", 768: "dinov2", 1152: "siglip"}
_NAMED = 3  # keys that an error names before it only counts


def load_checkpoint(path: str | Path, config: PidConfig, dtype: torch.dtype | None = None) -> PidDecoder:
    """Read a PyTorch (.pth, .pt) or .safetensors checkpoint into a decoder on the CPU.

    Keys may carry the published `net.` prefix; training leftovers are dropped; pixel modulations split in two halves
    are joined. Names and shapes must then be exactly those of `config`. Weights keep the dtype they are stored in and
    are mapped from the file rather than read where its format allows; `dtype` converts them. Nothing in the file is
    executed.
    Raises CheckpointError.
    """
    path = Path(path)
    state = _student(_read(path), path)
    with torch.device("meta"):
        decoder = PidDecoder(config)
    difference = state_difference(decoder, state)
    if difference:
        raise CheckpointError(f"{path.name} is not a checkpoint of this decoder: {difference}.{_family(state, config)}")
    _require_float(state, path, mixed=dtype is not None)
    if dtype is not None:
        for key, tensor in state.items():
            state[key] = tensor.to(dtype)  # one at a time: never two networks in memory
    decoder.load_state_dict(state, strict=True, assign=True)
    return decoder.eval().requires_grad_(False)


def state_difference(module: nn.Module, state: Mapping[str, Tensor]) -> str:
    """How the names and shapes of `state` differ from those of `module`, as part of a sentence; empty if nowhere."""
    expected = module.state_dict()

    def listed(kind: str, entries: list[str]) -> str:
        more = f" and {len(entries) - _NAMED} more" if len(entries) > _NAMED else ""
        return f"{kind} {', '.join(entries[:_NAMED])}{more}" if entries else ""

    parts = (
        listed("missing", [key for key in expected if key not in state]),
        listed("unexpected", [key for key in state if key not in expected]),
        listed(
            "of another shape",
            [
                f"{key} ({list(state[key].shape)} for {list(tensor.shape)})"
                for key, tensor in expected.items()
                if key in state and state[key].shape != tensor.shape
            ],
        ),
    )
    return "; ".join(part for part in parts if part)


def _read(path: Path) -> dict[str, Any]:
    """The tensors of a checkpoint file by name, values unchecked."""
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint file {path}." if not path.exists() else f"{path} is not a file.")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path.name} is empty.")
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise CheckpointError(f"{path.name} does not hold a dictionary of tensors.")
    return state


def _read_safetensors(path: Path) -> Any:
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path.name} is damaged or not a safetensors file ({error}).") from error


def _read_torch(path: Path) -> Any:
    with path.open("rb") as file:
        begins_as_zip = file.read(4) == b"PK\x03\x04"
    archive = zipfile.is_zipfile(path)  # looks at the end of the file
    if begins_as_zip and not archive:
        raise CheckpointError(f"{path.name} is cut short: its end is missing. Fetch it again.")
    try:
        # weights_only: an unpickler that makes tensors and plain containers and runs nothing.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path.name} is damaged or holds more than tensors, which could run code. Nothing in it was executed."
        ) from error
    except Exception as error:  # a damaged file surfaces as almost any type
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path.name} is damaged or not a PyTorch checkpoint ({reason}).") from error


def _student(stored: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """The decoder's own tensors under their published names."""
    state: dict[str, Tensor] = {}
    for stored_key, value in stored.items():
        key = stored_key.removeprefix(_PREFIX)
        if stored_key.startswith(_LEFTOVERS) or key.startswith(_TRAINING_HEAD):
            continue
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
            raise CheckpointError(f"{path.name} holds something other than a plain tensor under {stored_key}.")
        if key in state:
            raise CheckpointError(f"{path.name} holds {key} twice, with the prefix {_PREFIX} and without.")
        state[key] = value
    if not state:
        raise CheckpointError(f"{path.name} holds no decoder weights.")
    return _join_modulations(state, path)


def _join_modulations(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Undo the repackaging that splits a pixel block's modulation into an attention and an MLP half.

    Rows [256 positions, 6 parts, C]: the first half has each position's first three parts, the second its last three.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    joined: dict[str, Tensor] = {}
    for key, tensor in state.items():
        match = _SPLIT_MODULATION.fullmatch(key)
        if match is None:
            joined[key] = tensor
        else:
            halves.setdefault(f"{match[1]}.0.{match[3]}", {})[match[2]] = tensor
    for key, pair in halves.items():
        rows = {half: tensor.shape[0] if tensor.ndim else 0 for half, tensor in pair.items()}
        if len(pair) < 2 or pair["msa"].shape != pair["mlp"].shape or not rows["msa"] or rows["msa"] % PATCH_PIXELS:
            raise CheckpointError(f"{path.name} holds no matching pair of halves (_msa, _mlp) for {key}.")
        by_position = [pair[half].unflatten(0, (PATCH_PIXELS, -1)) for half in ("msa", "mlp")]
        joined[key] = torch.cat(by_position, dim=1).flatten(0, 1)
    return joined


def _require_float(state: Mapping[str, Tensor], path: Path, mixed: bool) -> None:
    dtypes = {tensor.dtype for tensor in state.values()}
    names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    if not dtypes.issubset(_DTYPES):
        raise CheckpointError(f"{path.name} holds {names}; decoders are read from float32, bfloat16 or float16.")
    if len(dtypes) > 1 and not mixed:
        raise CheckpointError(f"{path.name} mixes {names}; say which dtype the decoder is to have.")


def _family(state: Mapping[str, Tensor], config: PidConfig) -> str:
    """A guess at what decoder the tensors are of, as a sentence; empty where there is nothing to go by."""
    gate = state.get("lq_proj.gate_modules.0.content_proj.weight")
    convolution = state.get("lq_proj.latent_proj.0.weight")
    if gate is None or gate.ndim != 2 or convolution is None or convolution.ndim != 4:
        return " It does not look like a PiD decoder."
    generation = "v1.5" if len(gate) == 1 or "pit_lq_gate.content_proj.weight" in state else "v1"
    channels = convolution.shape[1]
    asked_generation = "v1" if config.gate_per_channel else "v1.5"
    asked_channels = config.latent_channels // config.latent_unpatchify**2
    if (generation, channels) == (asked_generation, asked_channels):
        return ""
    family = _FAMILIES.get(channels, "an unknown family")
    return (
        f" It looks like a {generation} decoder with {channels} latent channels ({family}); "
        f"a {asked_generation} decoder with {asked_channels} was asked for."
    )
