"""Memory of a device that is planned before decoders are loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engines.bundle import Bundle, write_bundle
from engines.errors import DeviceMemoryError
from engines.pid import FoldedDecoder
from engines.pid.released import released
from engines.pid.sampler import MODEL_TIMESTEPS
from engines.runtime.buffers import DeviceBuffers, Needs, runtime_needs
from engines.runtime.device_runtime import DeviceRuntime
from engines.runtime.memory_plan import MemoryItem, MemoryPlan, PlannedDecoder, plan_memory
from engines.runtime.open import open_runtime, runtime_info
from engines.runtime.tensorrt_runtime import TensorRTBackend
from engines.runtime.torch_runtime import TorchBackend
from engines.size import Size
from tests.engines.runtime.fake_tensorrt import engine_bundle, fake_tensorrt
from tests.engines.runtime.runtimes import CONFIG, INFO, SIZE, WIDE, make_decoder
from tests.engines.test_bundle import FILES
from tests.tiny import manifest

CPU = torch.device("cpu")
LARGE = PlannedDecoder(3_000_000_000, Needs(2, {"slots": 600_000_000, "image": 10_000_000}))
SMALL = PlannedDecoder(1_000_000_000, Needs(2, {"slots": 200_000_000, "image": 20_000_000, "tile x": 50_000_000}))


def open_torch(folder: Path, buffers: DeviceBuffers) -> tuple[Bundle, DeviceRuntime]:
    bundle = write_bundle(folder / "tiny", manifest(max_batch=3), FILES)
    return bundle, open_runtime(bundle, max_batch=2, slots=2, max_pixels=128 * 96, buffers=buffers)


def open_fake_engines(folder: Path, buffers: DeviceBuffers) -> tuple[Bundle, DeviceRuntime]:
    bundle = engine_bundle(folder / "tiny", network=CONFIG, sizes=(SIZE, WIDE))
    backend = TensorRTBackend(bundle, fake_tensorrt(make_decoder("cpu")), CPU, None)
    info = runtime_info(bundle, CPU, 2, 2).with_tiles(128 * 96)
    return bundle, DeviceRuntime(backend, torch.zeros(5, 24), info, buffers)


@pytest.mark.parametrize("open_bundle", [open_torch, open_fake_engines])
def test_the_plan_of_a_bundle_is_what_its_runtime_reserves(tmp_path: Path, open_bundle):
    buffers = DeviceBuffers(CPU)
    bundle, runtime = open_bundle(tmp_path, buffers)
    planned = PlannedDecoder.of(bundle, runtime.info)
    assert planned.needs == buffers.needs
    files = [path for path in bundle.path.iterdir() if path.name.endswith((".engine", "weights.safetensors"))]
    assert planned.weight_bytes == sum(path.stat().st_size for path in files) > 0
    assert {item.part for item in plan_memory({"tiny": planned}).items} == {"weights", "slots", "tiles", "other"}


def test_buffers_are_shared_and_weights_are_not():
    plan = plan_memory({"large": LARGE, "small": SMALL})
    assert plan.items == (
        MemoryItem("weights", "large", 3_000_000_000),
        MemoryItem("weights", "small", 1_000_000_000),
        MemoryItem("slots", None, 1_200_000_000),
        MemoryItem("tiles", None, 400_000_000),
        MemoryItem("other", None, 20_000_000),
    )
    assert plan.nbytes == 5_620_000_000
    assert plan.of_decoder("small").items == plan.items[1:]


@pytest.mark.parametrize(("resident", "gigabytes"), [(1, 3), (2, 5), (3, 6), (9, 6), (None, 6)])
def test_only_the_largest_weights_that_are_resident_together_count(resident: int | None, gigabytes: int):
    decoders = {"small": SMALL, "large": LARGE, "middle": LARGE._replace(weight_bytes=2_000_000_000)}
    plan = plan_memory(decoders, resident=resident)
    assert plan.items == plan_memory(decoders).items
    assert plan.nbytes == gigabytes * 10**9 + sum(item.nbytes for item in plan.items if item.part != "weights")


def test_a_plan_says_which_weights_share_their_memory():
    plan = plan_memory({"large": LARGE, "small": SMALL}, resident=1)
    assert str(plan).startswith("largest 1 of (weights of large 3.00 GB, weights of small 1.00 GB) + slots 1.20 GB")
    assert str(plan).endswith("= 4.62 GB")
    assert str(plan.of_decoder("small")).startswith("weights of small 1.00 GB + slots")


def test_a_decoder_beside_others_owns_its_buffers():
    assert {item.decoder for item in plan_memory({"small": SMALL}, owner="small").items} == {"small"}


def test_too_little_memory_is_explained_with_every_item():
    plan = plan_memory({"large": LARGE, "small": SMALL})
    assert plan.problem("cuda:0", 5_620_000_000) is None
    assert plan.problem("cpu", None) is None
    assert plan.problem("cuda:0", 5_610_000_000) == (
        "cuda:0 has 5.61 GB of free memory, but this is needed: weights of large 3.00 GB + weights of small 1.00 GB + "
        "slots 1.20 GB + tiles 0.40 GB + other buffers 0.02 GB = 5.62 GB, and the working memory of the steps, which "
        "is known only after the warm-up. Use fewer decoders, set --resident, or lower --device-slots, --max-batch, "
        "--sizes or --max-pixels."
    )


def test_a_warm_up_that_runs_out_of_memory_says_what_was_planned(monkeypatch: pytest.MonkeyPatch):
    plan = MemoryPlan((MemoryItem("slots", None, 1_200_000_000),))
    runtimes = [
        DeviceRuntime(TorchBackend(make_decoder("cpu")), torch.zeros(5, 24), INFO, buffers)
        for buffers in (DeviceBuffers(CPU, str(plan)), None)
    ]
    monkeypatch.setattr(torch, "zeros", out_of_memory)
    messages = []
    for runtime in runtimes:
        with pytest.raises(DeviceMemoryError) as caught:
            runtime.warm_up()
        messages.append(str(caught.value))
    explained, plain = messages
    assert explained == f"{plain} Planned, without the working memory of the steps: slots 1.20 GB = 1.20 GB."


def planned(name: str, size: Size, max_pixels: int | None = None) -> PlannedDecoder:
    """Return what a released decoder in bf16 needs for single images of one size in two slots."""
    description = released(name)
    with torch.device("meta"):
        network = FoldedDecoder(description.config, MODEL_TIMESTEPS)
    parameters = sum(2 * parameter.numel() for parameter in network.parameters())  # in bf16; the tables are not
    config = description.config
    info = replace(
        INFO,
        latent_channels=config.latent_channels,
        pixels_per_cell=config.pixels_per_cell,
        upscale=config.upscale,
        caption_tokens=config.caption_tokens,
        caption_width=config.caption_width,
        sizes=(size,),
        max_batch=1,
        slots=2,
    )
    weights = parameters + sum(table.nbytes for table in network.buffers())
    return PlannedDecoder(weights, runtime_needs(config, torch.bfloat16, info.with_tiles(max_pixels)))


def test_the_example_in_the_documentation_is_what_the_code_plans():
    text = (Path(__file__).parents[3] / "docs/operations.md").read_text()
    size, max_pixels = Size(2048, 2048), 4096**2
    flux, sdxl = (planned(name, size, max_pixels) for name in ("flux-2kto4k-v1.5", "sdxl-2kto4k"))
    plan = plan_memory({"flux": flux})
    assert f"    {plan}\n" in text
    assert f"--max-pixels {max_pixels}" in text
    tiles = next(item.nbytes for item in plan.items if item.part == "tiles")
    assert 0 < tiles - 2 * 24 * max_pixels < 0.02 * tiles  # and the latent
    added = plan_memory({"flux": flux, "sdxl": sdxl}).nbytes - plan.nbytes
    assert added == sdxl.weight_bytes
    assert f"weights, {added / 1e9:.2f} GB" in text
    whole = planned("flux-2kto4k-v1.5", Size(4096, 4096)).needs.device_bytes()
    assert f"{whole['slots'] / 1e9:.2f} GB, and their steps" in text.replace("\n", " ")
    assert whole["tiles"] == 0


def out_of_memory(*arguments: object, **options: object) -> None:
    raise torch.OutOfMemoryError("no room")
