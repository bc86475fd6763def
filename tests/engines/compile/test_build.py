"""Builds for PyTorch through the command line: bundles decode like the checkpoint, and errors are explained."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import engines
from build_engines import main
from engines.accuracy import largest
from engines.bundle import WEIGHTS, empty_caption, load_folded, open_bundle
from engines.captions.__main__ import parser as captions_parser
from engines.compile import verify_fold
from engines.compile import weights as weights_module
from engines.compile.inputs.random_weights import random_decoder
from engines.compile.planning import plan as plan_module
from engines.decoders import find_decoder
from engines.pid import fold
from engines.pid.released import DecoderDescription, released
from engines.pid.sampler import MODEL_TIMESTEPS
from engines.size import Size
from tests.tiny import TINY

CONFIG = TINY
SPACE = released("flux-2k").latent_space

Build = Callable[..., int]


@pytest.fixture(autouse=True)
def tiny_decoder(monkeypatch: pytest.MonkeyPatch):
    """Make `--decoder tiny` available."""
    tiny = DecoderDescription("tiny", CONFIG, SPACE, (Size(64, 64), Size(64, 96)), max_side=96)
    monkeypatch.setattr(plan_module, "find_decoder", lambda name: tiny if name == "tiny" else find_decoder(name))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "model_ema.pth"
    torch.save({f"net.{key}": value for key, value in random_decoder(CONFIG, 3).state_dict().items()}, path)
    return path


@pytest.fixture
def build(tmp_path: Path) -> Build:
    def run(*options: object, decoder: str = "tiny", target: str = "cpu") -> int:
        arguments = ["--decoder", decoder, "--target", target, "--output", tmp_path / "out", *options]
        return main([str(argument) for argument in arguments])

    return run


def build_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> str:
    """Return the error message of a failed build, after checking that no files remain."""
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("build_engines.py: ")
    assert last.endswith(".")
    assert not [path.name for path in tmp_path.iterdir() if "out" in path.name]
    return last


def test_a_bundle_decodes_like_its_checkpoint(
    build: Build, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    caption = torch.randn(5, 24)
    save_file({"caption": caption}, tmp_path / "caption.safetensors")
    assert build("--checkpoint", checkpoint, "--empty-caption", tmp_path / "caption.safetensors") == 0

    bundle = open_bundle(tmp_path / "out")
    manifest = bundle.manifest
    assert (manifest.decoder, manifest.precision, manifest.sizes) == ("tiny", "fp32", ((64, 64),))
    assert (manifest.origin.kind, manifest.origin.file) == ("checkpoint", "model_ema.pth")
    assert "research" in manifest.licence
    assert manifest.builder_version == engines.__version__
    assert manifest.warnings == ()
    assert manifest.verification.max_velocity_error < 1e-5
    assert torch.equal(empty_caption(bundle), caption)

    probe = verify_fold.make_probe(CONFIG)
    expected = verify_fold.velocities(random_decoder(CONFIG, 3), probe)
    assert largest(verify_fold.relative_errors(verify_fold.velocities(load_folded(bundle), probe), expected)) < 1e-5

    output = capsys.readouterr()
    stages = re.findall(r"^\[ *[\d.]+ s\] (\w+)", output.err, re.MULTILINE)
    assert stages == ["load", "verify", "fold", "verify", "cast", "verify", "write", "done"]
    assert "fewer weight bytes" in output.out


def test_a_released_decoder_needs_an_empty_caption(
    build: Build, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert build("--checkpoint", checkpoint) == 2
    error = build_error(capsys, tmp_path)
    assert "tiny needs --empty-caption FILE" in error
    (command,) = re.findall(r"python -m engines\.captions (.*?)\. ", error)
    assert captions_parser().parse_args(shlex.split(command)).text == ""
    assert "With --zero-caption the builder uses zeros" in error


def test_a_released_decoder_is_built_with_zeros_on_request(build: Build, checkpoint: Path, tmp_path: Path):
    assert build("--checkpoint", checkpoint, "--zero-caption") == 0
    manifest = open_bundle(tmp_path / "out").manifest
    assert manifest.empty_caption.zeros
    assert any("zeros, which the decoder was not trained on" in warning for warning in manifest.warnings)


def test_an_empty_caption_and_zeros_exclude_each_other(build: Build, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        build("--random-weights", "--zero-caption", "--empty-caption", "caption.safetensors")
    assert "--zero-caption: not allowed with argument --empty-caption" in capsys.readouterr().err


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"build_engines.py {engines.__version__}\n"


def test_the_help_lists_targets_and_decoders(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    help_text = " ".join(capsys.readouterr().out.split())
    assert "cpu, cuda, rtx5090, gb200, h200" in help_text
    assert "dct-demo (ships with the project), flux-2k" in help_text


def test_a_misspelt_option_is_corrected(build: Build, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        build("--precison", "fp8")
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Did you mean --precision? See --help" in error


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_random_weights_are_built_in_16_bits(build: Build, tmp_path: Path, precision: str, dtype: torch.dtype):
    options = ("--sizes", "64x96,96x64,64x96", "--max-batch", 3, "--seed", 5)
    assert build("--random-weights", "--precision", precision, *options) == 0
    bundle = open_bundle(tmp_path / "out")
    manifest = bundle.manifest
    assert manifest.sizes == ((64, 96), (96, 64))  # height first, without duplicates
    assert manifest.max_batch == 3
    assert (manifest.origin.kind, manifest.origin.seed) == ("random", 5)
    assert manifest.empty_caption.zeros
    assert manifest.empty_caption.tokens == 12
    assert any("random" in warning for warning in manifest.warnings)
    assert any("empty caption" in warning for warning in manifest.warnings)
    assert 1e-4 < manifest.verification.precision_error < 0.1
    assert load_folded(bundle).dtype == dtype
    assert bundle.file(WEIGHTS).stat().st_size < 1.1 * dtype.itemsize * sum(
        p.numel() for p in load_folded(bundle).parameters()
    ) + 4 * sum(b.numel() for b in load_folded(bundle).buffers())


def test_the_bundled_decoder_is_built_for_its_latent_space(build: Build, tmp_path: Path):
    assert build("--random-weights", "--sizes", "64x64", decoder="dct-demo") == 0
    manifest = open_bundle(tmp_path / "out").manifest
    assert (manifest.latent_space.name, manifest.latent_space.channels) == ("dct", 16)
    assert not any("caption" in warning for warning in manifest.warnings)  # it was trained with zeros
    assert find_decoder("dct-demo").sizes == ((512, 512), (256, 256), (384, 512), (512, 384))


def test_a_size_larger_than_intended_causes_a_warning(build: Build, tmp_path: Path):
    assert build("--random-weights", "--sizes", "64x128") == 0
    assert any("64x128 exceeds 96 pixels" in w for w in open_bundle(tmp_path / "out").manifest.warnings)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--checkpoint", "/nowhere.pth"], "The checkpoint /nowhere.pth does not exist"),
        ([], "needs --checkpoint FILE, or --random-weights"),
        (["--random-weights", "--sizes", "64x65"], "64x65 is not possible: both sides must be multiples of 32"),
        (["--random-weights", "--max-batch", "0"], "at least 1"),
        (
            ["--random-weights", "--size-range", "32-64"],
            "--size-range applies only to compiled targets; PyTorch runs any",
        ),
        (
            ["--random-weights", "--target", "rtx5090", "--size-range", "64-64"],
            "The size range 64-64 is empty: its first side must be smaller than its second.",
        ),
        (
            ["--random-weights", "--target", "rtx5090", "--size-range", "48-64"],
            "Output size 48x48 is not possible: both sides must be multiples of 32",
        ),
        (["--random-weights", "--empty-caption", "/nowhere"], "The empty caption /nowhere does not exist"),
        (["--random-weights", "--decoder", "flux-2kk"], "Did you mean flux-2k? Available decoders: flux-2k,"),
        (["--random-weights", "--decoder", "flux-2kk"], "dct-demo"),
        (
            ["--random-weights", "--target", "gb200", "--precision", "fp32"],
            "gb200 does not support fp32; choose one of bf16",
        ),
        (
            ["--random-weights", "--target", "rtx5090", "--precision", "fp16"],
            "rtx5090 does not support fp16; choose one of bf16, fp8, fp4. TensorRT's attention kernels sum in float16",
        ),
        (
            ["--random-weights", "--target", "gb200", "--compiler", "tensorrt-rtx"],
            "Available compilers: tensorrt, torch-tensorrt.",
        ),
        (["--random-weights", "--compiler", "tensorrt"], "--compiler applies only to compiled targets"),
        (["--random-weights", "--keep-onnx"], "cpu has no ONNX files"),
        (
            ["--random-weights", "--calibration", "."],
            "--calibration does not apply to --precision fp32, only to fp8, fp4, fp16",
        ),
        (
            ["--random-weights", "--precision", "fp8", "--calibration", "/nowhere"],
            "The calibration directory /nowhere does not exist",
        ),
        (["--random-weights", "--precision", "fp8", "--keep", "no.*"], "--keep no.* matches no layer"),
        (["--random-weights", "--precision", "fp8", "--keep", "*"], "--keep leaves no linear layer to quantise; use"),
        (["--random-weights", "--target", "abacus"], "Available targets: cpu, cuda, rtx5090, gb200, h200"),
        (["--random-weights", "--output", "/dev/null/out"], "/dev/null is a file"),
    ],
)
def test_invalid_options_are_rejected_before_any_work(
    build: Build, options: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert build(*options) == 2
    assert expected in build_error(capsys, tmp_path)


def test_a_single_number_is_a_square_size(build: Build, tmp_path: Path):
    assert build("--random-weights", "--sizes", "64") == 0
    assert open_bundle(tmp_path / "out").manifest.sizes == ((64, 64),)


@pytest.mark.parametrize("sizes", ["64x64x64", "64x", "x64", "64x64,", "-64x64", "64*64"])
def test_malformed_sizes_are_rejected(build: Build, sizes: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        build("--random-weights", f"--sizes={sizes}")
    assert "is not a size; use HEIGHTxWIDTH" in capsys.readouterr().err


@pytest.mark.parametrize("size_range", ["64", "64-", "-64", "64x64-128x128", "0-64", "64-9999999"])
def test_a_malformed_size_range_is_rejected(build: Build, size_range: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        build("--random-weights", "--target", "rtx5090", f"--size-range={size_range}")
    assert "range of sides" in capsys.readouterr().err


def test_a_checkpoint_of_a_different_decoder_is_rejected(
    build: Build, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert build("--checkpoint", checkpoint, "--zero-caption", decoder="sdxl") == 2
    assert "16 latent channels (flux, sd3 or qwenimage); expected a v1 decoder with 4" in build_error(capsys, tmp_path)


def test_a_link_with_the_name_of_an_undistilled_checkpoint_is_rejected(
    build: Build, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "PiD_flux_undistilled").mkdir()
    link = tmp_path / "PiD_flux_undistilled" / "model.pth"
    link.symlink_to(checkpoint)
    assert build("--checkpoint", link, "--dry-run") == 2
    assert "undistilled according to its path, which contains PiD_flux_undistilled" in build_error(capsys, tmp_path)


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"other": torch.ones(2, 24)}, "has no tensor 'caption'; expected one of shape [1..12, 24]"),
        ({"caption": torch.ones(13, 24)}, "shape [13, 24]"),
        ({"caption": torch.ones(1, 2, 24)}, "shape [1, 2, 24]"),
        ({"caption": torch.ones(2, 24, dtype=torch.int32)}, "finite floating-point"),
        ({"caption": torch.full((2, 24), torch.nan)}, "finite floating-point"),
    ],
)
def test_an_empty_caption_that_does_not_match_is_rejected(
    build: Build, tensors: dict[str, torch.Tensor], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    save_file(tensors, tmp_path / "caption.safetensors")
    assert build("--random-weights", "--empty-caption", tmp_path / "caption.safetensors") == 2
    assert expected in build_error(capsys, tmp_path)


def test_an_existing_bundle_is_replaced_only_with_overwrite(
    build: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert build("--random-weights") == 0
    before = open_bundle(tmp_path / "out")
    assert build("--random-weights", "--seed", 1) == 2
    assert "already contains a bundle" in capsys.readouterr().err
    assert open_bundle(tmp_path / "out") == before
    assert build("--random-weights", "--seed", 1, "--overwrite") == 0
    assert open_bundle(tmp_path / "out").manifest.origin.seed == 1


def test_an_interrupted_first_stage_leaves_no_files(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def interrupt(_state: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(weights_module, "save_file", interrupt)
    assert build("--random-weights") == 130
    assert "interrupted; no bundle was written." in build_error(capsys, tmp_path)


def test_a_wrong_fold_is_detected(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def wrong(decoder, times):
        folded = fold(decoder, times)
        folded.modulation_table[times.index(0.342)] *= 1.01
        return folded

    monkeypatch.setattr(weights_module, "fold", wrong)
    assert build("--random-weights") == 2
    assert "The velocity of the folded network differs from the original by" in build_error(capsys, tmp_path)


def test_overflow_in_float16_names_the_layer(build: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    state = random_decoder(CONFIG, 3).state_dict()
    state["patch_blocks.1.mlp_x.w3.weight"] *= 3e4
    torch.save(state, tmp_path / "large.pth")
    assert build("--checkpoint", tmp_path / "large.pth", "--zero-caption", "--precision", "fp16") == 2
    assert "produces infinity or NaN in float16, first in patch_blocks.1.mlp_x" in build_error(capsys, tmp_path)
    assert build("--checkpoint", tmp_path / "large.pth", "--zero-caption", "--precision", "bf16") == 0


def test_large_values_of_the_calibration_latents_are_rejected_in_float16(
    build: Build, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """They are finite in the small random probe of the verification."""
    folder = tmp_path / "latents"
    folder.mkdir()
    latent = torch.randn(16, 2, 2, generator=torch.Generator().manual_seed(0))
    save_file({"latent": latent}, folder / "small.safetensors")
    options = ("--checkpoint", checkpoint, "--zero-caption", "--precision", "fp16", "--calibration", folder)
    assert build(*options) == 0
    assert re.search(r"largest value in float16: [\d,]+\n", capsys.readouterr().err)
    assert not any("float16" in warning for warning in open_bundle(tmp_path / "out").manifest.warnings)

    save_file({"latent": 60_000 * latent.sign()}, folder / "large.safetensors")
    assert build(*options, "--overwrite") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        "in float16, whose largest value is 65,504, when large.safetensors is decoded. Use --precision bf16." in error
    )
    assert build(*options, "--overwrite", "--precision", "bf16") == 2  # which does not use --calibration
    assert "--calibration does not apply to --precision bf16" in capsys.readouterr().err


def test_the_range_of_float16_is_checked_with_synthetic_latents_by_default(build: Build, tmp_path: Path):
    assert build("--random-weights", "--precision", "fp16") == 0
    assert any(
        "checked with synthetic latents" in warning for warning in open_bundle(tmp_path / "out").manifest.warnings
    )


@pytest.mark.parametrize(("value", "dtype"), [(1e5, "float16"), (torch.nan, "float32")])
def test_weights_that_are_not_finite_are_rejected(
    build: Build, value: float, dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    state = random_decoder(CONFIG, 3).state_dict()
    state["lq_proj.gate_modules.0.log_alpha"].fill_(-value)
    torch.save(state, tmp_path / "bad.pth")
    assert build("--checkpoint", tmp_path / "bad.pth", "--zero-caption", "--precision", "fp16") == 2
    assert f"infinity or NaN in {dtype}" in build_error(capsys, tmp_path)


def test_the_probe_covers_every_timestep_with_every_sigma():
    probe = verify_fold.make_probe(CONFIG)
    pairs = {(round(t, 3), round(s, 1)) for t, s in zip(probe.timesteps.tolist(), probe.sigmas.tolist(), strict=True)}
    assert pairs == {(t, s) for t in MODEL_TIMESTEPS for s in verify_fold.SIGMAS}


@pytest.mark.parametrize("changed", ["model_ema.pth", "caption.safetensors"])
def test_an_input_that_changes_during_the_build_is_an_error(
    changed: str,
    build: Build,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def fold_and_change(decoder, times):
        with (tmp_path / changed).open("ab") as file:
            file.write(b"more")
        return fold(decoder, times)

    monkeypatch.setattr(weights_module, "fold", fold_and_change)
    save_file({"caption": torch.randn(5, 24)}, tmp_path / "caption.safetensors")
    assert build("--checkpoint", checkpoint, "--empty-caption", tmp_path / "caption.safetensors") == 2
    assert f"{tmp_path / changed} changed during the build; start the build again." in build_error(capsys, tmp_path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (lambda content: content[:-1], "is damaged or not a safetensors file"),
        (lambda content: content + b"x", "is damaged or not a safetensors file"),
        (lambda content: content.replace(b"[5,24]", b"[6,24]"), "is damaged or not a safetensors file"),
        (lambda content: content.replace(b"[0,480]", b"[0,484]"), "is damaged or not a safetensors file"),
        (lambda content: (10**15).to_bytes(8, "little") + content[8:], "is damaged or not a safetensors file"),
    ],
)
def test_a_caption_file_whose_header_does_not_match_is_rejected(
    content: Callable[[bytes], bytes], expected: str, build: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "caption.safetensors"
    save_file({"caption": torch.randn(5, 24)}, path)
    path.write_bytes(content(path.read_bytes()))
    assert build("--random-weights", "--empty-caption", path) == 2
    assert f"{path} {expected}" in build_error(capsys, tmp_path)
