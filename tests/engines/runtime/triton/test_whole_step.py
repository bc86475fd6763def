"""A whole step with all kernels, chosen as on a GPU, against the reference vectors and against plain PyTorch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engines.accuracy import relative_error
from engines.benchmark.gpu_check.parity import read_case
from engines.compile.planning.layer_rules import assign_rules, linear_layers
from engines.pid import FoldedDecoder, PidDecoder, fold
from engines.pid.blocks import PatchBlock, PixelBlock, attentions
from engines.pid.fp8_attention import AttentionRange, quantise_attention
from engines.pid.quantised import quantise
from engines.pid.sampler import MODEL_TIMESTEPS
from engines.runtime.kernels.attention import attention_operations
from engines.runtime.kernels.mlp import mlp_operations
from engines.runtime.kernels.pixels import pixel_operations
from engines.runtime.kernels.workload import Workload
from engines.runtime.triton import pixel_update
from engines.size import Size
from tests.engines.runtime.kernels.by_name import choose_by_name
from tests.tiny import TINY

VECTORS = sorted((Path(__file__).parents[3] / "parity").glob("*.npz"))
SIZE, CAPTION = Size(64, 96), 5
TOLERANCE = 1e-4  # relative, in float32: mostly of the approximate GELU


def use_kernels(decoder: FoldedDecoder, size: Size, caption_tokens: int, *names: str) -> dict[str, str | None]:
    """Install the kernels whose names begin so; return the chosen ones by operation."""
    workload = Workload(size, caption_tokens, "sm_100")
    operations = (attention_operations, mlp_operations, pixel_operations)
    choices = [c for make in operations for c in choose_by_name(names, make(decoder, workload))]
    return {choice.name: choice.chosen for choice in choices}


@pytest.fixture(autouse=True)
def _whole_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute all pixels of a token in one program: the interpreter needs as long for a program with fewer."""
    if not torch.cuda.is_available():
        monkeypatch.setitem(pixel_update.CONFIGS, "sm_100", (pixel_update.PixelConfig(256, 1),))  # type: ignore[arg-type]


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
def test_the_velocity_matches_that_of_the_published_network(
    path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # of the convolutions of the adapter
    case = read_case(path, device)
    decoder = fold(case.decoder, case.expected["t_list"][:-1].tolist())
    chosen = use_kernels(decoder, case.size, case.inputs["caption"].shape[1], "Triton", "fused")
    assert set(chosen) == {"joint attention", "pixel attention", "pixel update"}
    assert all(str(name).startswith(("Triton", "fused")) for name in chosen.values())
    with torch.inference_mode():
        conditioning = decoder.condition(case.inputs["latent"], case.inputs["caption"], case.size)
        velocity = decoder.velocity(case.inputs["x"], case.expected["t"], conditioning, case.expected["sigma"])
    assert relative_error(velocity, case.expected["velocity"]) < TOLERANCE


def fp8_decoder(attention: bool) -> FoldedDecoder:
    torch.manual_seed(0)
    decoder = fold(PidDecoder(TINY), MODEL_TIMESTEPS)
    layers = [name for name, rule in assign_rules(linear_layers(decoder), ()).items() if rule.quantised]
    quantise(decoder, dict.fromkeys(layers, 4.0))
    if attention:
        for module in attentions(decoder).values():
            quantise_attention(module, AttentionRange(4.0, 4.0, 4.0))
    return decoder


@pytest.mark.parametrize("kernel", ["Triton, scores in FP8", "Triton, FP8", "Triton, 128"])
def test_a_decoder_in_fp8_computes_the_same(kernel: str, device: torch.device):
    decoder = fp8_decoder(attention="FP8" in kernel).to(device)
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 3, *SIZE), (1, 16, 2, 3), (1, CAPTION, 24)
    x, latent, caption = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    conditioning = decoder.condition(latent, caption, SIZE)

    @torch.inference_mode()  # with gradients, pixels are not updated in place
    def velocity() -> torch.Tensor:
        return decoder.velocity(x, MODEL_TIMESTEPS[0], conditioning, 0.3)

    expected = velocity()
    chosen = use_kernels(decoder, SIZE, CAPTION, kernel, "fused")
    assert all(str(name).startswith((kernel, "fused")) for name in chosen.values())
    assert "MLP" in chosen
    assert 0 < relative_error(velocity(), expected) < 0.02


def test_kernels_do_not_break_the_compiled_graphs(device: torch.device):
    """A break would keep torch.compile from fusing what is before and after it."""
    decoder = fp8_decoder(attention=True).to(device)
    use_kernels(decoder, SIZE, CAPTION, "Triton, FP8", "fused")
    geometry, rotary = decoder.geometry(SIZE, device), decoder.caption_rotary(CAPTION, device)
    tokens, width = SIZE.area // 256, TINY.hidden_size
    x, y = (torch.randn(1, n, width, device=device) for n in (tokens, CAPTION))
    modulation = torch.randn(1, 1, 6 * width, device=device)
    pixels = torch.randn(1, tokens, 256, TINY.pixel_channels, device=device)
    block, pixel_block = decoder.patch_blocks[0], decoder.pixel_blocks[0]
    assert isinstance(block, PatchBlock)
    assert isinstance(pixel_block, PixelBlock)
    attended = torch.randn(1, tokens, TINY.pixel_attention_size, device=device)
    with torch.inference_mode():
        for function, inputs in (
            (block, (x, y, modulation, modulation, geometry.image, rotary)),
            (pixel_block.attn, (attended, geometry.pixel_tokens)),
            (pixel_block.expand_in_place, (pixel_block.modulation_out, pixels, x, attended)),
        ):
            torch.compile(function, backend="aot_eager", fullgraph=True)(*inputs)
