"""Loads published checkpoints. Files are untrusted: no code in them runs, and invalid ones raise CheckpointError."""

from __future__ import annotations

import os
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
from engines.pid.archive import read_archive
from engines.pid.config import PATCH_PIXELS, PidConfig
from engines.pid.network import PidDecoder

_PREFIX = "net."
_TRAINING_ONLY = ("net_ema.", "fake_score.", "discriminator.")  # networks used only in training
_TEACHER_HEAD = "lq_proj.lq_aux_rgb_head."  # distillation removes it; compared after the prefix is removed
_UNDISTILLED = "undistilled"  # in the names of the released teachers, which have the same tensors as the students
_USE_DISTILLED = (
    "Decoding takes four steps, in which an undistilled network gives bad images and no error; use the distilled "
    "checkpoint (…_distill_4step)"
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SPLIT_MODULATION = re.compile(r"(pixel_blocks\.\d+\.adaLN_modulation)_(msa|mlp)(?:\.0)?\.(weight|bias)")
# Latent spaces by their number of channels, as the adapter's first convolution sees them.
_FAMILIES = {4: "sdxl", 16: "flux, sd3 or qwenimage", 32: "flux2", 128: "flux2", 768: "dinov2", 1152: "siglip"}
_MAX_KEYS = 3  # keys that an error message lists before it only counts


def load_checkpoint(path: str | Path, config: PidConfig, dtype: torch.dtype | None = None) -> PidDecoder:
    """Read a PyTorch (.pth, .pt) or .safetensors checkpoint into a decoder on the CPU.

    Keys may have the published prefix `net.`. Networks used only in training are dropped, and pixel modulations that
    are split in two halves are joined. After that, names and shapes must be exactly those of `config`. The weights are
    copies, which do not change with the file. No code in the file is executed.

    Args:
        path: The checkpoint file.
        config: Dimensions of the network.
        dtype: Dtype to convert the weights to; by default they keep the one they are stored in.

    Raises:
        CheckpointError: The file cannot be read, is undistilled, or does not match `config`.
    """
    path = Path(path)
    check_distilled_name(path)
    state = _decoder_tensors(_read(path), path)
    with torch.device("meta"):
        decoder = PidDecoder(config)
    difference = state_difference(decoder, state)
    if difference:
        raise CheckpointError(
            f"{path.name} does not match this decoder: {difference}.{_describe_family(state, config)}"
        )
    _check_dtypes(state, path, mixed=dtype is not None)
    if dtype is not None:
        for key, tensor in state.items():
            state[key] = tensor.to(dtype)  # one at a time, so that memory never holds two networks
    decoder.load_state_dict(state, strict=True, assign=True)
    return decoder.eval().requires_grad_(False)


def check_distilled_name(path: Path) -> None:
    """Check that neither the path of a checkpoint nor the file that it links to is named as an undistilled one.

    Raises:
        CheckpointError: A component of the path contains "undistilled", in any case.
    """
    for part in (*path.absolute().parts, *Path(os.path.realpath(path)).parts):
        if _UNDISTILLED in part.lower():
            raise CheckpointError(
                f"{path.name} is undistilled according to its path, which contains {part}. {_USE_DISTILLED}, or rename "
                "the path if it is wrong."
            )


def state_difference(module: nn.Module, state: Mapping[str, Tensor]) -> str:
    """Describe how names and shapes of `state` differ from those of `module`; an empty string if they are equal."""
    expected = module.state_dict()

    def listed(kind: str, entries: list[str]) -> str:
        more = f" and {len(entries) - _MAX_KEYS} more" if len(entries) > _MAX_KEYS else ""
        return f"{kind} {', '.join(entries[:_MAX_KEYS])}{more}" if entries else ""

    parts = (
        listed("missing", [key for key in expected if key not in state]),
        listed("unexpected", [key for key in state if key not in expected]),
        listed(
            "wrong shape of",
            [
                f"{key} ({list(state[key].shape)} instead of {list(tensor.shape)})"
                for key, tensor in expected.items()
                if key in state and state[key].shape != tensor.shape
            ],
        ),
    )
    return "; ".join(part for part in parts if part)


def _read(path: Path) -> dict[str, Any]:
    """Read the entries of a checkpoint file by name; their values are unchecked."""
    if not path.is_file():
        raise CheckpointError(f"Checkpoint file {path} not found." if not path.exists() else f"{path} is not a file.")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path.name} is empty. Download it again.")
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise CheckpointError(f"{path.name} does not contain a dictionary of tensors.")
    return state


def _read_safetensors(path: Path) -> Any:
    try:
        return safetensors.torch.load_file(path, backend="pread")  # not mapped from the file
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path.name} is damaged or not a safetensors file ({error}).") from error


def _read_torch(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            starts_as_zip = file.read(4) == b"PK\x03\x04"
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    archive = zipfile.is_zipfile(path)  # checks the end of the file
    if starts_as_zip and not archive:
        raise CheckpointError(f"{path.name} is truncated. Download it again.")
    try:
        if archive:
            return read_archive(path)
        # weights_only restricts unpickling to tensors and plain containers, so that no code can run.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path.name} is damaged or contains objects other than tensors, which could run code. "
            "Nothing was executed."
        ) from error
    except Exception as error:  # damaged files raise almost any type of exception
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{path.name} is damaged or not a PyTorch checkpoint ({reason}). Download it again."
        ) from error


def _decoder_tensors(stored: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """Select the tensors of the decoder, under their published names."""
    state: dict[str, Tensor] = {}
    for stored_key, value in stored.items():
        key = stored_key.removeprefix(_PREFIX)
        if stored_key.startswith(_TRAINING_ONLY):
            continue
        if key.startswith(_TEACHER_HEAD):
            raise CheckpointError(
                f"{path.name} is undistilled: it has the training-only head {_TEACHER_HEAD.rstrip('.')}. "
                f"{_USE_DISTILLED}."
            )
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
            raise CheckpointError(f"{path.name} has something other than a dense tensor under {stored_key}.")
        if key in state:
            raise CheckpointError(f"{path.name} contains {key} twice, with and without the prefix {_PREFIX}.")
        state[key] = value
    if not state:
        raise CheckpointError(f"{path.name} contains no decoder weights.")
    return _join_modulations(state, path)


def _join_modulations(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Join pixel block modulations that a repackaged checkpoint splits into an attention half and an MLP half.

    The rows are [256 positions, 6 parts, C]. The first half has the first three parts of each position, the second
    half the last three.
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
            raise CheckpointError(f"{path.name} has no matching pair of halves (_msa, _mlp) for {key}.")
        by_position = [pair[half].unflatten(0, (PATCH_PIXELS, -1)) for half in ("msa", "mlp")]
        joined[key] = torch.cat(by_position, dim=1).flatten(0, 1)
    return joined


def _check_dtypes(state: Mapping[str, Tensor], path: Path, mixed: bool) -> None:
    dtypes = {tensor.dtype for tensor in state.values()}
    names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    if not dtypes.issubset(_DTYPES):
        raise CheckpointError(f"{path.name} contains {names}; only float32, bfloat16 and float16 are supported.")
    if len(dtypes) > 1 and not mixed:
        raise CheckpointError(f"{path.name} mixes {names}; specify the dtype to convert to.")


def _describe_family(state: Mapping[str, Tensor], config: PidConfig) -> str:
    """Guess which decoder the tensors belong to, as part of an error message; return "" if it is the expected one."""
    gate = state.get("lq_proj.gate_modules.0.content_proj.weight")
    convolution = state.get("lq_proj.latent_proj.0.weight")
    if gate is None or gate.ndim != 2 or convolution is None or convolution.ndim != 4:
        return " It does not look like a PiD decoder."
    generation = "v1.5" if len(gate) == 1 or "pit_lq_gate.content_proj.weight" in state else "v1"
    channels = convolution.shape[1]
    expected_generation = "v1" if config.gate_per_channel else "v1.5"
    expected_channels = config.latent_channels // config.latent_unpatchify**2
    if (generation, channels) == (expected_generation, expected_channels):
        return ""
    family = _FAMILIES.get(channels, "an unknown family")
    return (
        f" It looks like a {generation} decoder with {channels} latent channels ({family}); "
        f"expected a {expected_generation} decoder with {expected_channels}."
    )
