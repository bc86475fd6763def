"""Reading checkpoints in all supported formats, and rejecting invalid ones."""

import errno
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from engines.errors import CheckpointError
from engines.pid import PidConfig, PidDecoder, load_checkpoint
from engines.pid.archive import read_archive
from tests.tiny import TINY

V1 = replace(TINY, pixel_depth=2)
V15 = replace(V1, gate_per_channel=False, pixel_injection=True, adapter_padding="replicate")

State = dict[str, Tensor]


@pytest.fixture
def weights() -> State:
    torch.manual_seed(0)
    return {key: torch.randn_like(value) for key, value in PidDecoder(V1).state_dict().items()}


def write(path: Path, state: object) -> Path:
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


def same(decoder: PidDecoder, weights: State) -> bool:
    loaded = decoder.state_dict()
    return loaded.keys() == weights.keys() and all(torch.equal(loaded[key], weights[key]) for key in weights)


def error_message(path: Path, config: PidConfig = V1) -> str:
    """Read `path`, which must fail, and return the message."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, config)
    text = str(caught.value)
    assert path.name in text
    assert text.endswith((".", "?"))
    assert "\n" not in text
    return text


@pytest.mark.parametrize("prefix", ["", "net."])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_both_formats_are_read_with_and_without_the_prefix(tmp_path: Path, weights: State, suffix: str, prefix: str):
    path = write(tmp_path / f"model{suffix}", {prefix + key: value for key, value in weights.items()})
    decoder = load_checkpoint(path, V1)
    assert same(decoder, weights)
    assert not decoder.training
    assert not any(p.requires_grad for p in decoder.parameters())


def test_the_legacy_format_without_zip_is_read(tmp_path: Path, weights: State):
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(load_checkpoint(tmp_path / "old.pth", V1), weights)


def test_networks_used_only_in_training_are_dropped(tmp_path: Path, weights: State):
    training_only = ("net_ema.x_embedder", "fake_score.w", "discriminator.w")
    state = {f"net.{key}": value for key, value in weights.items()} | {key: torch.ones(2) for key in training_only}
    assert same(load_checkpoint(write(tmp_path / "model.pth", state), V1), weights)


@pytest.mark.parametrize("prefix", ["", "net."])
def test_a_checkpoint_with_the_head_of_a_teacher_is_rejected(tmp_path: Path, weights: State, prefix: str):
    state = {prefix + key: value for key, value in weights.items()}
    state[f"{prefix}lq_proj.lq_aux_rgb_head.1.weight"] = torch.ones(2)
    text = error_message(write(tmp_path / "model.pth", state))
    assert "is undistilled: it has the training-only head lq_proj.lq_aux_rgb_head." in text
    assert "use the distilled checkpoint" in text


@pytest.mark.parametrize("folder", ["PiD_v1pt5_official_flux_undistilled", "a/Undistilled/b", "UNDISTILLED-copy"])
def test_a_checkpoint_that_is_named_as_an_undistilled_one_is_rejected(
    tmp_path: Path, weights: State, folder: str, monkeypatch: pytest.MonkeyPatch
):
    """The released teachers have the same tensors as the students, so only the name can show it."""
    (tmp_path / folder).mkdir(parents=True)
    path = write(tmp_path / folder / "model.pth", weights)
    part = next(part for part in Path(folder).parts if "undistilled" in part.lower())
    assert f"is undistilled according to its path, which contains {part}." in error_message(path)
    # Links as in the cache of Hugging Face, where the name of the target says nothing, and the other way round.
    blob, link = tmp_path / "5ca1ab1e", tmp_path / "model.pth"
    path.rename(blob)
    path.symlink_to(blob)
    assert part in error_message(path)
    blob.replace(path)
    link.symlink_to(path)
    assert part in error_message(link)
    monkeypatch.chdir(path.parent)
    assert part in error_message(Path("model.pth"))


def test_a_checkpoint_that_is_named_as_a_distilled_one_is_read(tmp_path: Path, weights: State):
    folder = tmp_path / "PiD_v1pt5_res2kto4k_sr4x_official_flux_distill_4step"
    folder.mkdir()
    assert same(load_checkpoint(write(folder / "model.pth", weights), V1), weights)


@pytest.mark.parametrize("middle", ["", ".0"])
def test_split_modulations_are_joined(tmp_path: Path, weights: State, middle: str):
    split: State = {}
    for key, value in weights.items():
        if not key.startswith("pixel_blocks") or "adaLN" not in key:
            split[key] = value
            continue
        for half, start in (("_msa", 0), ("_mlp", 3)):
            # The definition, row by row: 256 positions, six parts, C channels.
            parts = range(start, start + 3)
            rows = [(position * 6 + part) * 4 + c for position in range(256) for part in parts for c in range(4)]
            split[key.replace("adaLN_modulation.0", f"adaLN_modulation{half}{middle}")] = value[rows]
    assert len(split) == len(weights) + 4
    assert same(load_checkpoint(write(tmp_path / "model.safetensors", split), V1), weights)

    lone = next(key for key in split if "_mlp" in key)
    del split[lone]
    assert "no matching pair of halves" in error_message(write(tmp_path / "model.safetensors", split))


def test_the_stored_dtype_is_kept_by_default(tmp_path: Path, weights: State):
    half = {key: value.bfloat16() for key, value in weights.items()}
    path = write(tmp_path / "model.pth", half)
    assert load_checkpoint(path, V1).dtype == torch.bfloat16
    wide = load_checkpoint(path, V1, torch.float32)
    assert same(wide, {key: value.float() for key, value in half.items()})


def test_mixed_dtypes_require_a_dtype(tmp_path: Path, weights: State):
    weights["final_layer.norm.weight"] = weights["final_layer.norm.weight"].bfloat16()
    path = write(tmp_path / "model.pth", weights)
    assert "mixes bfloat16, float32" in error_message(path)
    assert load_checkpoint(path, V1, torch.float32).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_other_dtypes_are_rejected(tmp_path: Path, weights: State, dtype: torch.dtype):
    path = write(tmp_path / "model.pth", {key: value.to(dtype) for key, value in weights.items()})
    assert str(dtype).removeprefix("torch.") in error_message(path)


def test_the_message_lists_missing_unexpected_and_misshapen_tensors(tmp_path: Path, weights: State):
    del weights["s_embedder.proj.bias"]
    weights |= {f"extra{i}": torch.ones(1) for i in range(5)}
    weights["final_layer.norm.weight"] = torch.ones(3)
    text = error_message(write(tmp_path / "model.pth", weights))
    assert "missing s_embedder.proj.bias;" in text
    assert "unexpected extra0, extra1, extra2 and 2 more;" in text
    assert "wrong shape of final_layer.norm.weight ([3] instead of [4])" in text


@pytest.mark.parametrize(
    ("stored", "expected", "guess"),
    [
        (V15, V1, "a v1.5 decoder with 16 latent channels (flux, sd3 or qwenimage); expected a v1 decoder with 16."),
        (V1, V15, "a v1 decoder with 16 latent channels"),
        (replace(V1, latent_channels=4), V1, "4 latent channels (sdxl)"),
        (replace(V1, latent_channels=128, pixels_per_cell=16), V1, "128 latent channels (flux2)"),
        (replace(V15, latent_channels=128, pixels_per_cell=16, latent_unpatchify=2), V1, "v1.5 decoder with 32"),
        (replace(V1, latent_channels=768, pixels_per_cell=16), V1, "(dinov2)"),
        (replace(V1, latent_channels=1152, pixels_per_cell=16), V1, "(siglip)"),
    ],
)
def test_the_message_guesses_the_family_of_a_different_decoder(
    tmp_path: Path, stored: PidConfig, expected: PidConfig, guess: str
):
    path = write(tmp_path / "model.pth", PidDecoder(stored).state_dict())
    assert guess in error_message(path, expected)


def test_the_message_reports_that_it_is_not_a_pid_decoder(tmp_path: Path):
    path = write(tmp_path / "model.pth", {"encoder.weight": torch.ones(3)})
    assert "does not look like a PiD decoder" in error_message(path)


@pytest.mark.parametrize("kept", [0.02, 0.5, 0.999])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_truncated_file_is_an_error(tmp_path: Path, weights: State, suffix: str, kept: float):
    path = write(tmp_path / f"model{suffix}", weights)
    os.truncate(path, int(path.stat().st_size * kept))
    assert "truncated" in error_message(path) or "damaged" in error_message(path)


class Bomb:
    """Unpickling this creates a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("packaging", ["zip", "old", "bare"])
def test_a_pickle_with_code_is_rejected_and_not_executed(tmp_path: Path, weights: State, packaging: str):
    path, evidence = tmp_path / "model.pth", tmp_path / "executed"
    state = {**weights, "bomb": Bomb(evidence)}
    if packaging == "bare":
        path.write_bytes(pickle.dumps(Bomb(evidence), protocol=2))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=packaging == "zip")
    assert "damaged" in error_message(path)
    assert not evidence.exists()


def test_files_that_are_not_checkpoints_are_errors(tmp_path: Path):
    empty, garbage, text = tmp_path / "empty.pth", tmp_path / "garbage.pth", tmp_path / "text.safetensors"
    empty.touch()
    garbage.write_bytes(bytes(range(256)) * 8)
    text.write_text("version https://git-lfs.example/spec/v1")
    assert "is empty" in error_message(empty)
    assert "damaged" in error_message(garbage)
    assert "damaged" in error_message(text)
    assert "not found" in error_message(tmp_path / "missing.pth")
    assert "is not a file" in error_message(tmp_path)
    assert "dictionary" in error_message(write(tmp_path / "list.pth", [torch.ones(1)]))
    assert "dense tensor under meta" in error_message(write(tmp_path / "nested.pth", {"meta": {"a": torch.ones(1)}}))
    assert "dense tensor" in error_message(write(tmp_path / "sparse.pth", {"a": torch.eye(3).to_sparse()}))
    assert "no decoder weights" in error_message(write(tmp_path / "ema.pth", {"net_ema.a": torch.ones(1)}))
    assert "twice" in error_message(write(tmp_path / "both.pth", {"net.a": torch.ones(1), "a": torch.ones(1)}))


def rewrite(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """Write an archive again, with valid checksums, after changing its entries."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, change(name, content))


def test_a_damaged_byte_in_any_entry_is_an_error(tmp_path: Path, weights: State):
    """Also in entries that are not read: they show that the file is damaged."""
    path = write(tmp_path / "model.pth", weights)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        entries = [info for info in archive.infolist() if info.file_size]
    assert len(entries) > len(weights)
    for info in entries:
        name_length, extra_length = struct.unpack_from("<HH", content, info.header_offset + 26)
        start = info.header_offset + 30 + name_length + extra_length
        damaged = bytearray(content)
        damaged[start + info.file_size // 2] ^= 1
        path.write_bytes(damaged)
        assert "damaged" in error_message(path)
    path.write_bytes(content)
    assert same(load_checkpoint(path, V1), weights)


@pytest.mark.parametrize("size", [0, 4, -4])
def test_a_tensor_with_another_size_than_declared_is_an_error(tmp_path: Path, weights: State, size: int):
    def change(name: str, content: bytes) -> bytes:
        if not name.endswith("/data/0"):
            return content
        return content[:size] if size <= 0 else content + bytes(size)

    path = write(tmp_path / "model.pth", weights)
    rewrite(path, change)
    assert "data/0 has" in error_message(path)


def test_an_entry_that_is_missing_or_compressed_is_an_error(tmp_path: Path, weights: State):
    path = write(tmp_path / "model.pth", weights)
    rewrite(path, lambda _name, content: content, zipfile.ZIP_DEFLATED)
    assert "is compressed" in error_message(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "no checkpoint")
    assert "it contains no data.pkl" in error_message(path)


def test_another_byte_order_is_an_error(tmp_path: Path, weights: State):
    path = write(tmp_path / "model.pth", weights)
    rewrite(path, lambda name, content: b"big" if name.endswith("/byteorder") else content)
    assert "another byte order" in error_message(path)


def test_tensors_that_share_memory_and_empty_ones_are_read(tmp_path: Path):
    shared = torch.arange(12.0)
    state = {"a": shared[:6].view(2, 3), "b": shared[2:8:2], "c": torch.empty(0), "d": shared.bfloat16()}
    content = read_archive(write(tmp_path / "model.pth", state))
    assert all(torch.equal(content[key], tensor) for key, tensor in state.items())
    assert content["a"].untyped_storage().data_ptr() == content["b"].untyped_storage().data_ptr()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_weights_do_not_change_with_the_file(tmp_path: Path, weights: State, suffix: str):
    path = write(tmp_path / f"model{suffix}", weights)
    decoder = load_checkpoint(path, V1)
    path.write_bytes(bytes(path.stat().st_size))
    os.truncate(path, 0)
    assert same(decoder, weights)


def test_a_safetensors_header_that_does_not_match_the_file_is_an_error(tmp_path: Path):
    path = write(tmp_path / "model.safetensors", {"a": torch.ones(2, 3)})
    content = path.read_bytes()
    for changed in (
        content + b"x",
        content[:-1],
        content.replace(b"[2,3]", b"[2,4]"),
        content.replace(b"[0,24]", b"[0,28]"),
        content.replace(b"[0,24]", b"[4,24]"),
        (2**40).to_bytes(8, "little") + content[8:],
    ):
        assert changed != content
        path.write_bytes(changed)
        assert "is damaged or not a safetensors file" in error_message(path)


def test_a_checkpoint_that_cannot_be_read_is_an_error(tmp_path: Path, weights: State, monkeypatch: pytest.MonkeyPatch):
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    path = write(tmp_path / "model.pth", weights)
    monkeypatch.setattr(Path, "open", denied)
    assert "cannot be read: Permission denied" in error_message(path)
