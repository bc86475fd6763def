"""Programs that the rehearsal runs on the fake CUDA device, each in a separate process.

`python -m tests.rehearsal.programs NAME JSON` calls the function NAME with the keyword arguments in JSON and prints its
result as the last line, again as JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from engines.benchmark.decoders import make_runtime, random_sample
from engines.compile.planning.layer_rules import assign_rules, linear_layers
from engines.errors import PidError
from engines.pid import FoldedDecoder
from engines.pid.blocks import attentions
from engines.pid.fp8_attention import AttentionRange, quantise_attention
from engines.pid.quantised import KINDS, quantise
from engines.pid.released import DecoderDescription, released
from engines.pid.sampler import MAX_STEPS, MODEL_TIMESTEPS, step_indices
from engines.pid.toy import TOY
from engines.runtime import torch_runtime
from engines.runtime.buffers import DeviceBuffers
from engines.runtime.cuda_graphs import CudaGraphRunner
from engines.runtime.device_runtime import DeviceRuntime
from engines.runtime.protocol import Slot
from engines.runtime.torch_runtime import TorchBackend
from engines.runtime.weight_memory import WeightPool
from engines.runtime.weights import MovableWeights
from engines.size import Size
from tests.engines.runtime.kernels.by_name import choose_by_name
from tests.fakecuda.control import FakeCuda

FULL = released("flux-2kto4k-v1.5")
Result = dict[str, Any]


def folded_network(description: DecoderDescription, precision: str, device: torch.device) -> FoldedDecoder:
    """Return a folded network with weights that are not initialised: no value matters here."""
    with torch.device("meta"):
        folded = FoldedDecoder(description.config, MODEL_TIMESTEPS)
    folded = folded.bfloat16().to_empty(device=device).eval().requires_grad_(False)
    if precision in KINDS:
        layers = [layer for layer, rule in assign_rules(linear_layers(folded), ()).items() if rule.quantised]
        quantise(folded, dict.fromkeys(layers, 1.0), KINDS[precision])
        torch.cuda.empty_cache()  # of the weights in bf16
    return folded


def make(
    precision: str,
    size: Sequence[int] | None,
    batch: int,
    *,
    compiled: bool = False,
    fp8_attention: bool = False,
) -> DeviceRuntime:
    """Return the runtime of the full network at one size or, without a size, of the toy network."""
    description, sizes = (FULL, (Size(*size),)) if size else (TOY, TOY.sizes[:1])
    folded = folded_network(description, precision, torch.device("cuda", 0))
    if fp8_attention:
        for attention in attentions(folded).values():
            quantise_attention(attention, AttentionRange(4.0, 4.0, 4.0))
    return make_runtime(folded, description, sizes, batch, precision, compiled=compiled)  # type: ignore[arg-type]


def start_batch(runtime: DeviceRuntime, batch: int) -> list[Slot]:
    """Start random latents at the first size of the runtime."""
    return [runtime.start(random_sample(runtime, runtime.info.sizes[0])) for _ in range(batch)]


def decode_batch(runtime: DeviceRuntime, batch: int) -> None:
    """Decode random latents, and preview each of them after every step."""
    slots = start_batch(runtime, batch)
    for index in step_indices(MAX_STEPS):
        runtime.step(slots, [index] * batch)
        for slot in slots:
            runtime.preview(slot)
    for slot in slots:
        rows = runtime.finish(slot)
        rows.wait(rows.pixels.shape[0])
        rows.close()
        runtime.release(slot)


def decode(
    precision: str = "bf16",
    size: Sequence[int] | None = None,
    batch: int = 1,
    compiled: bool = False,
    kernels: Sequence[str] = (),
    fp8_attention: bool = False,
) -> Result:
    """Warm up and decode a batch; `kernels` are beginnings of names of implementations, in order of preference."""
    if kernels:
        torch_runtime.choose = partial(choose_by_name, kernels)  # type: ignore[assignment]
    fake = FakeCuda()
    runtime = make(precision, size, batch, compiled=compiled, fp8_attention=fp8_attention)
    fake.reset()
    weights = fake.used_memory()
    runtime.warm_up()
    peak, rest = fake.peak_memory(), fake.used_memory()
    operations = fake.operations()
    decode_batch(runtime, batch)
    return {
        "weights": weights,
        "peak": peak,
        "rest": rest,
        "after_decoding": fake.used_memory(),
        "operations": operations,
        "launches": fake.operations()["graph launch"],
        "chosen": {choice.name: choice.chosen for choice in runtime.kernel_choices()},
        "failed": [str(choice) for choice in runtime.kernel_choices() if len(choice.measured) < len(choice.results)],
    }


def graph_memory(size: Sequence[int], batch: int) -> Result:
    """Warm up; return by how many bytes each kind of work has increased the memory that PyTorch holds."""
    runtime, increases = make("bf16", size, batch), Counter[str]()
    prepare = CudaGraphRunner.prepare

    def measured(runner: CudaGraphRunner, key: tuple[str, Hashable], work: Callable[[], None]) -> None:
        before = torch.cuda.memory_reserved()
        prepare(runner, key, work)
        increases[key[0]] += torch.cuda.memory_reserved() - before

    CudaGraphRunner.prepare = measured  # type: ignore[method-assign, assignment]
    runtime.warm_up()
    return dict(increases)


def preview(batch: int) -> Result:
    """Preview each image of a batch after a step; return the operations of that, and whether it used the allocator."""
    fake = FakeCuda()
    runtime = make("bf16", None, batch)
    runtime.warm_up()
    slots = start_batch(runtime, batch)
    runtime.step(slots, [0] * batch)
    fake.reset()
    before = torch.cuda.memory_stats()
    for slot in slots:
        runtime.preview(slot)
    return {"operations": fake.operations(), "allocator_used": torch.cuda.memory_stats() != before}


def decode_in_tiles(max_pixels: int, image: Sequence[int]) -> Result:
    """Decode images in tiles of the toy network, with previews; return how the device's memory changed after that."""
    fake, network = FakeCuda(), folded_network(TOY, "bf16", torch.device("cuda", 0))
    runtime = make_runtime(network, TOY, TOY.sizes, 2, "bf16", max_pixels=max_pixels)
    runtime.warm_up()
    plan = runtime.info.tiles(Size(*image))
    assert plan is not None
    used, reserved = fake.used_memory(), torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    allocated = torch.cuda.memory_allocated()
    fake.reset()
    for _ in range(2):
        slot = runtime.start(random_sample(runtime, plan.image))
        for index in step_indices(MAX_STEPS):
            for _ in range(len(plan)):
                runtime.step([slot], [index])
            runtime.preview(slot)
        rows = runtime.finish(slot)
        rows.wait(plan.image.height)
        rows.close()
        runtime.release(slot)
    return {
        "tiles": len(plan),
        "launches": fake.operations()["graph launch"],
        "used": fake.used_memory() - used,
        "reserved": torch.cuda.memory_reserved() - reserved,
        "temporary": torch.cuda.max_memory_allocated() - allocated,
    }


def warm_up_beside_decodes(precision: str = "bf16", compiled: bool = False, backend: str | None = None) -> Result:
    """Warm up a second toy network on another thread while the first one decodes, as for the swap of a bundle.

    Then close the first one. Return the errors, the decodes beside the warm-up, and memory of the device before the
    second one, with both, and without the first one.
    """
    if backend is not None:
        torch_runtime.COMPILE_BACKEND = backend
    device, done, error = torch.device("cuda", 0), threading.Event(), ""
    first, second = (
        make_runtime(folded_network(TOY, precision, device), TOY, TOY.sizes, 2, precision, compiled=compiled)  # type: ignore[arg-type]
        for _ in range(2)
    )
    first.warm_up()

    def warm_up() -> None:
        nonlocal error
        try:
            second.warm_up()
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        finally:
            done.set()

    before, decodes = torch.cuda.memory_allocated(), 0
    thread = threading.Thread(target=warm_up)
    thread.start()
    while not done.is_set() or decodes == 0:
        decode_batch(first, 2)
        decodes += 1
    thread.join()
    both = torch.cuda.memory_allocated()
    first.close()
    del first
    torch.cuda.empty_cache()
    after = torch.cuda.memory_allocated()
    decode_batch(second, 2)
    return {"error": error, "decodes": decodes, "before": before, "both": both, "after": after}


def decode_with_two_decoders(shared: bool, sizes: Sequence[Sequence[int]]) -> Result:
    """Warm up the full network and the toy network on a device, and decode with both in turns.

    Then warm up another toy network in place of the second one, beside the first one, with separate buffers, and
    close both. All results are bytes in use on the device, without weights.

    Args:
        shared: Whether they share buffers.
        sizes: Size of the full network, and of the toy network.
    """
    torch_runtime.choose = partial(choose_by_name, ())  # type: ignore[assignment]
    fake, device = FakeCuda(), torch.device("cuda", 0)
    buffers = DeviceBuffers(device) if shared else None
    networks = [(folded_network(each, "bf16", device), each) for each in (FULL, TOY, TOY)]
    full, toy, new = (
        make_runtime(folded, each, [Size(*size)], 1, "bf16", slots=2, max_pixels=4 * Size(*size).area, buffers=own)
        for (folded, each), size, own in zip(networks, (*sizes, sizes[1]), (buffers, buffers, None), strict=True)
    )
    del networks, buffers
    weights = fake.used_memory()
    full.warm_up()
    one = fake.used_memory() - weights
    toy.warm_up()
    two = fake.used_memory() - weights
    for _ in range(2):
        decode_batch(full, 1)
        decode_batch(toy, 1)
    decoded = fake.used_memory() - weights
    new.warm_up()
    beside = fake.used_memory() - weights
    decode_batch(full, 1)
    decode_batch(new, 1)
    new.close()
    del new
    torch.cuda.empty_cache()
    closed = fake.used_memory() - weights
    decode_batch(full, 1)
    full.close()
    toy.close()
    del full, toy
    torch.cuda.empty_cache()
    return {
        "one": one,
        "two": two,
        "decoded": decoded,
        "beside": beside,
        "closed": closed,
        "rest": torch.cuda.memory_reserved(),
    }


def decode_on_all_devices(precision: str = "bf16", compiled: bool = False, backend: str | None = None) -> Result:
    """Warm up the toy network and decode in one thread per device, as the server does; return the errors."""
    if backend is not None:
        torch_runtime.COMPILE_BACKEND = backend
    devices = range(torch.cuda.device_count())
    networks = [folded_network(TOY, precision, torch.device("cuda", device)) for device in devices]
    runtimes = [make_runtime(folded, TOY, TOY.sizes, 2, precision, compiled=compiled) for folded in networks]  # type: ignore[arg-type]
    start, errors = threading.Barrier(len(runtimes)), [""] * len(runtimes)

    def drive(number: int) -> None:
        try:
            start.wait()
            runtimes[number].warm_up()
            for _ in range(3):
                decode_batch(runtimes[number], 2)
        except Exception as error:
            errors[number] = f"{type(error).__name__}: {error}"

    threads = [threading.Thread(target=drive, args=(number,)) for number in devices]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"errors": errors, "used": [FakeCuda().used_memory(device) for device in devices]}


def decode_until_it_fails(precision: str = "bf16", size: Sequence[int] | None = None, batch: int = 1) -> Result:
    """Warm up and decode until an error; return it and what a second attempt raises."""
    stage = "warm-up"
    torch_runtime.choose = partial(choose_by_name, ())  # type: ignore[assignment]  # it launches no graphs
    runtime = make(precision, size, batch)
    try:
        runtime.warm_up()
        stage = "decode"
        for _ in range(5):
            decode_batch(runtime, batch)
    except PidError as error:
        cause = error.__cause__
        return {"stage": stage, "error": type(error).__name__, "message": str(error), "cause": type(cause).__name__}
    return {"stage": stage, "error": None}


def hashes(network: FoldedDecoder) -> dict[str, str]:
    """Return a hash of each weight on the device, by address."""
    found = {}
    for tensor in (*network.parameters(), *network.buffers()):
        content = tensor.cpu().flatten().view(torch.uint8).numpy()
        found[f"{tensor.data_ptr():x}"] = hashlib.sha256(content).hexdigest()
    return found


def make_movable(pool: WeightPool, precision: str, compiled: bool = False, batch: int = 2) -> DeviceRuntime:
    """Return the runtime of a shallow network as wide as the full one, with weights that move."""
    description = replace(FULL, config=replace(FULL.config, patch_depth=2, pixel_depth=1))
    torch.manual_seed(len(precision))
    network = folded_network(description, precision, torch.device("cpu"))
    for parameter in network.parameters():
        parameter.normal_()
    info = make_runtime(network, description, (Size(512, 512),), batch, precision).info  # type: ignore[arg-type]
    weights = MovableWeights(network, pool)
    backend = TorchBackend(network, compiled, device=pool.device)
    return DeviceRuntime(backend, torch.zeros(info.caption_tokens, info.caption_width), info, weights=weights)


def offload_and_restore(precision: str, compiled: bool = False) -> Result:
    """Move the weights to host memory and back in the middle of a decode; return what changes by that."""
    fake, pool = FakeCuda(), WeightPool(torch.device("cuda", 0), resident=1)
    runtime = make_movable(pool, precision, compiled)
    opened = fake.used_memory()
    runtime.warm_up()
    network = runtime.backend.decoder  # type: ignore[attr-defined]
    slots = start_batch(runtime, 2)
    runtime.step(slots, [0, 0])
    before, used, allocated = hashes(network), fake.used_memory(), torch.cuda.memory_allocated()
    fake.reset()
    runtime.offload()
    mapped_after_offload = fake.mapped_memory()
    runtime.restore()
    moves = fake.operations()
    runtime.step(slots, [1, 1])
    result = {
        "opened": opened,
        "weights": sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers())),
        "pool": pool.nbytes,
        "mapped": fake.mapped_memory(),
        "mapped_after_offload": mapped_after_offload,
        "unchanged": hashes(network) == before,
        "moves": moves,
        "grown": (fake.used_memory() - used, torch.cuda.memory_allocated() - allocated),
        "used": used,
        "peak": runtime.peak_memory(),
    }
    runtime.close()
    return {**result, "closed": used - fake.used_memory()}


def take_turns() -> Result:
    """Decode with two networks, of which only one fits on the device at a time; return failures and allocations."""
    fake, pool = FakeCuda(), WeightPool(torch.device("cuda", 0), resident=1)
    first, second = (make_movable(pool, precision) for precision in ("bf16", "fp8"))
    first.warm_up()
    first.offload()
    second.warm_up()
    try:
        first.restore()
        error = ""
    except PidError as raised:
        error = type(raised).__name__
    decode_batch(second, 2)  # not affected
    fake.reset()
    for _ in range(2):
        second.offload()
        first.restore()
        decode_batch(first, 2)
        first.offload()
        second.restore()
        decode_batch(second, 2)
    operations, pooled = fake.operations(), pool.nbytes
    first.close()
    return {"error": error, "operations": operations, "pool": pooled, "closed": pool.nbytes}


def take_turns_in_pairs() -> Result:
    """Let two of three networks be on the device at a time; return what is allocated after the warm-ups."""
    fake, pool = FakeCuda(), WeightPool(torch.device("cuda", 0), resident=2)
    runtimes = [make_movable(pool, precision) for precision in ("fp8", "bf16", "bf16")]
    for runtime in runtimes:
        runtime.warm_up()
        runtime.offload()
    fake.reset()
    for leaving, arriving in ((None, 0), (None, 1), (0, 2), (1, 0), (2, 1)):
        if leaving is not None:
            runtimes[leaving].offload()
        runtimes[arriving].restore()
        decode_batch(runtimes[arriving], 2)
    return {"operations": fake.operations()}


def offload_beside_a_warm_up() -> Result:
    """Move the weights of a network while another one is warmed up on another thread; return the errors."""
    pool, errors = WeightPool(torch.device("cuda", 0), resident=1), []
    first, second = (make_movable(pool, "bf16") for _ in range(2))
    first.warm_up()

    def warm_up() -> None:
        try:
            second.warm_up()
        except Exception as raised:
            errors.append(f"{type(raised).__name__}: {raised}")

    thread, turns = threading.Thread(target=warm_up), 0
    thread.start()
    while thread.is_alive() or turns == 0:
        first.offload()
        first.restore()
        decode_batch(first, 2)
        turns += 1
    decode_batch(second, 2)
    return {"errors": errors, "pool": pool.nbytes}


def read_offloaded() -> Result:
    """Read a weight that is in host memory, at its address on the device."""
    pool = WeightPool(torch.device("cuda", 0), resident=1)
    runtime = make_movable(pool, "bf16")
    runtime.warm_up()
    runtime.offload()
    return {"read": hashes(runtime.backend.decoder)}  # type: ignore[attr-defined]


_FUNCTIONS = (
    *(decode, graph_memory, preview, decode_in_tiles, decode_with_two_decoders, warm_up_beside_decodes),
    *(decode_on_all_devices, decode_until_it_fails),
    *(offload_and_restore, take_turns, take_turns_in_pairs, offload_beside_a_warm_up, read_offloaded),
)
PROGRAMS = {function.__name__: function for function in _FUNCTIONS}

if __name__ == "__main__":
    print(json.dumps(PROGRAMS[sys.argv[1]](**json.loads(sys.argv[2]))), flush=True)
    os._exit(0)  # as the server does: after the loss of a device, PyTorch aborts when it frees page-locked memory
