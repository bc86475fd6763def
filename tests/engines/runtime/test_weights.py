"""Weights that move to host memory and back."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engines.bundle import open_bundle
from engines.errors import ConfigError, DecodeError, DeviceMemoryError
from engines.pid import FoldedDecoder
from engines.pid.sampler import step_indices
from engines.runtime.device_runtime import DeviceRuntime
from engines.runtime.kernels.adapter import lay_out
from engines.runtime.open import open_runtime
from engines.runtime.protocol import Sample
from engines.runtime.torch_runtime import TorchBackend
from engines.runtime.weight_memory import CHUNK_BYTES, CudaWeightMemory, HostWeightMemory, WeightPool
from engines.runtime.weights import MovableWeights
from tests.engines.runtime.runtimes import INFO, decode, fp4_decoder, make_decoder, make_sample, pixels, ready

CPU = torch.device("cpu")


@pytest.fixture
def pool() -> WeightPool:
    return WeightPool(CPU, resident=1)


def movable(decoder: FoldedDecoder, pool: WeightPool) -> DeviceRuntime:
    """Return a runtime that has not been warmed up."""
    weights = MovableWeights(decoder, pool)
    return DeviceRuntime(TorchBackend(decoder, device=pool.device), torch.zeros(5, 24), INFO, weights=weights)


def memory_of(network: nn.Module) -> int:
    """Return the bytes of the weights that are in memory, outside the copy on the host."""
    storages = (tensor.untyped_storage() for tensor in (*network.parameters(), *network.buffers()))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class TestRuntime:
    @pytest.mark.parametrize("precision", ["fp32", "fp4"])
    def test_an_image_is_the_same_if_weights_move_during_the_decode(
        self, precision: str, pool: WeightPool, tmp_path: Path
    ):
        fixed, moved = (
            make_decoder("cpu") if precision == "fp32" else fp4_decoder(tmp_path / name, "cpu") for name in "ab"
        )
        expected = decode(ready(TorchBackend(fixed)), make_sample(1))
        runtime = movable(moved, pool)
        runtime.warm_up()
        slot = runtime.start(make_sample(1))
        for index in step_indices(4):
            runtime.offload()
            runtime.restore()
            runtime.step([slot], [index])
        assert (pixels(runtime, slot) == expected).all()

    def test_weights_are_only_on_the_device_between_restore_and_offload(self, pool: WeightPool):
        decoder = make_decoder("cpu")
        nbytes = memory_of(decoder)
        runtime = movable(decoder, pool)
        assert memory_of(decoder) == 0
        runtime.warm_up()
        assert memory_of(decoder) >= nbytes
        runtime.offload()
        assert memory_of(decoder) == 0
        runtime.restore()
        assert memory_of(decoder) >= nbytes
        runtime.close()
        assert memory_of(decoder) == 0

    def test_an_image_waits_for_the_weights(self, pool: WeightPool):
        runtime = movable(make_decoder("cpu"), pool)
        with pytest.raises(DecodeError, match="in host memory"):
            runtime.start(make_sample())
        runtime.warm_up()
        slot = runtime.start(make_sample())
        runtime.offload()
        with pytest.raises(DecodeError, match="in host memory"):
            runtime.step([slot], [0])
        with pytest.raises(DecodeError, match="in host memory"):
            runtime.start(make_sample())
        runtime.release(slot)
        assert runtime.peak_memory() is None
        assert list(runtime.kernel_choices()) == []
        runtime.close()

    def test_weights_may_be_where_they_should_move(self, pool: WeightPool):
        runtime = movable(make_decoder("cpu"), pool)
        runtime.offload()
        runtime.warm_up()
        runtime.restore()
        before = decode(runtime, make_sample(1))
        runtime.warm_up()
        assert (decode(runtime, make_sample(1)) == before).all()

    def test_weights_that_the_warm_up_rearranged_are_restored(self, pool: WeightPool, monkeypatch):
        expected = decode(ready(TorchBackend(make_decoder("cpu"))), make_sample(1)).astype(int)
        runtime = movable(decoder := make_decoder("cpu"), pool)
        monkeypatch.setattr(runtime.backend, "prepare", rearranging(runtime.backend))
        runtime.warm_up()
        runtime.offload()
        runtime.restore()
        convolutions = [module for module in decoder.lq_proj.modules() if isinstance(module, nn.Conv2d)]
        assert any(not layer.weight.is_contiguous() for layer in convolutions)
        assert abs(decode(runtime, make_sample(1)) - expected).max() <= 1

    def test_decoders_of_a_pool_take_turns(self, pool: WeightPool):
        decoders = [make_decoder("cpu"), make_decoder("cpu")]
        with torch.no_grad():
            decoders[1].y_pos_embedding.add_(0.5)
        runtimes = [movable(decoder, pool) for decoder in decoders]
        images = []
        for _ in range(2):
            for runtime in runtimes:
                runtime.warm_up() if not images[1:] else runtime.restore()
                images.append(decode(runtime, make_sample(1)))
                runtime.offload()
        assert (images[0] == images[2]).all()
        assert (images[1] == images[3]).all()
        assert (images[0] != images[1]).any()

    def test_weights_that_do_not_fit_stay_in_host_memory(self, pool: WeightPool, monkeypatch):
        runtime = movable(make_decoder("cpu"), pool)
        with monkeypatch.context() as patch:
            patch.setattr(HostWeightMemory, "allocate", too_little_memory)
            with pytest.raises(DeviceMemoryError):
                runtime.warm_up()
        runtime.warm_up()
        before = decode(runtime, make_sample(1))
        runtime.offload()
        with monkeypatch.context() as patch:
            patch.setattr(HostWeightMemory, "allocate", too_little_memory)
            with pytest.raises(DeviceMemoryError):
                runtime.restore()
        with pytest.raises(DecodeError, match="in host memory"):
            runtime.start(make_sample())
        runtime.restore()
        assert (decode(runtime, make_sample(1)) == before).all()

    def test_without_a_pool_weights_stay_on_the_device(self):
        runtime = ready(TorchBackend(make_decoder("cpu")))
        with pytest.raises(ConfigError, match="without a pool"):
            runtime.offload()
        decode(runtime, make_sample())

    def test_a_bundle_is_opened_without_memory_for_weights(self, demo_bundle: Path, pool: WeightPool):
        bundle = open_bundle(demo_bundle)
        size = bundle.manifest.sizes[0]
        fixed, moved = (open_runtime(bundle, sizes=[size], max_batch=1, weights=weights) for weights in (None, pool))
        assert isinstance(moved.backend, TorchBackend)
        assert memory_of(moved.backend.decoder) == 0
        sample = Sample(torch.ones(fixed.info.latent_channels, *fixed.info.latent_size(size)), size)
        fixed.warm_up()
        moved.warm_up()
        assert (decode(moved, sample, 1) == decode(fixed, sample, 1)).all()


def rearranging(backend: object):
    """Return `prepare` of a backend, followed by what the choice of kernels may do on CUDA."""
    assert isinstance(backend, TorchBackend)
    prepare = backend.prepare

    def rearrange(info, buffers) -> None:
        prepare(info, buffers)
        lay_out(backend.decoder.lq_proj, torch.channels_last)

    return rearrange


def too_little_memory(memory: HostWeightMemory) -> None:
    raise DeviceMemoryError("Too little.")


class Mixed(nn.Module):
    """Weights with the dtypes, shapes and layouts that networks have."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Parameter(torch.randn(3, 5))
        self.same = self.shared
        self.part: Tensor
        for name, value in {
            "alias": self.shared.detach(),
            "scalar": torch.tensor(7.0, dtype=torch.bfloat16),
            "empty": torch.empty(0, 4),
            "transposed": torch.randn(6, 4).t(),
            "fp8": torch.randn(7, 3).to(torch.float8_e4m3fn),
            "fp4": torch.randint(0, 255, (2, 9), dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
            "flags": torch.tensor([True, False]),
            "index": torch.arange(5),
        }.items():
            self.register_buffer(name, value, persistent=name != "index")


def contents(network: nn.Module) -> dict[str, tuple[object, ...]]:
    return {
        name: (tensor.dtype, tensor.shape, tensor.stride(), tensor.detach().contiguous().view(torch.uint8).tolist())
        if tensor.ndim
        else (tensor.dtype, tensor.item())
        for name, tensor in network.state_dict().items()
    }


class TestMovableWeights:
    def test_dtype_shape_layout_and_values_are_kept(self, pool: WeightPool):
        network = Mixed()
        before = contents(network)
        weights = MovableWeights(network, pool)
        for _ in range(2):
            weights.restore()
            assert contents(network) == before
            assert network.get_buffer("index").tolist() == [0, 1, 2, 3, 4]
            weights.offload()

    def test_weights_that_share_memory_still_do(self, pool: WeightPool):
        network = Mixed()
        MovableWeights(network, pool).restore()
        assert network.same is network.shared
        assert network.get_buffer("alias").data_ptr() == network.shared.data_ptr()

    def test_addresses_are_aligned(self, pool: WeightPool):
        network = Mixed()
        MovableWeights(network, pool).restore()
        first = network.shared.untyped_storage().data_ptr()
        assert {(tensor.data_ptr() - first) % 256 for tensor in network.parameters()} == {0}
        assert {(tensor.data_ptr() - first) % 256 for tensor in network.buffers() if tensor.numel()} == {0}

    def test_weights_of_several_chunks_are_kept(self, pool: WeightPool):
        network = nn.Linear(1024, CHUNK_BYTES // 2048, bias=False)  # two chunks
        network.register_buffer("last", torch.arange(10))
        before = network.weight.detach().clone()
        weights = MovableWeights(network, pool)
        weights.restore()
        assert torch.equal(network.weight, before)
        assert network.get_buffer("last").tolist() == list(range(10))


class LimitedMemory:
    """Memory of a device with room for a number of chunks; replaces `VirtualMemory`."""

    def __init__(self, limit: int) -> None:
        self.limit, self.created, self.live = limit, 0, set[int]()

    def create(self, nbytes: int) -> int:
        if len(self.live) == self.limit:
            raise DeviceMemoryError("Too little.")
        self.created += 1
        self.live.add(self.created)
        return self.created

    def release(self, handle: int) -> None:
        self.live.remove(handle)

    def reserve(self, nbytes: int) -> int:
        return 0

    def free(self, address: int, nbytes: int) -> None:
        pass

    def map(self, address: int, nbytes: int, handle: int) -> None:
        assert handle in self.live

    def allow_access(self, address: int, nbytes: int) -> None:
        pass

    def unmap(self, address: int, nbytes: int) -> None:
        pass


def cuda_memory(pool: WeightPool, chunks: int) -> CudaWeightMemory:
    """Return memory on the device of `pool.addresses`, without a tensor for it."""
    memory = pool.memory(chunks * CHUNK_BYTES)
    assert isinstance(memory, CudaWeightMemory)
    memory.bytes = torch.empty(0)
    return memory


class TestPool:
    @pytest.fixture
    def device(self) -> LimitedMemory:
        return LimitedMemory(10)

    @pytest.fixture
    def pool(self, device: LimitedMemory) -> WeightPool:
        pool = WeightPool(CPU, resident=1)
        pool.addresses = device  # type: ignore[assignment]
        return pool

    def test_chunks_are_used_again(self, pool: WeightPool, device: LimitedMemory):
        for count in (6, 4):
            pool.open(count)
        for count in (6, 4, 6, 4):
            pool.release(pool.acquire(count))
        assert device.created == 6
        assert pool.nbytes == pool.peak_bytes == 6 * CHUNK_BYTES

    def test_each_decoder_has_its_own_chunks(self, pool: WeightPool):
        assert not set(pool.acquire(4)) & set(pool.acquire(4))

    def test_too_little_memory_leaves_the_pool_as_it_was(self, pool: WeightPool, device: LimitedMemory):
        for count in (6, 6):
            pool.open(count)
        held = pool.acquire(6)
        with pytest.raises(DeviceMemoryError):
            pool.acquire(6)
        assert device.live == set(held)
        assert pool.nbytes == 6 * CHUNK_BYTES
        pool.release(held)
        assert len(pool.acquire(6)) == 6

    def test_a_warm_up_on_another_thread_takes_no_chunks_that_the_device_relies_on(
        self, pool: WeightPool, device: LimitedMemory
    ):
        for count in (4, 4, 3):
            pool.open(count)
        used = pool.acquire(4)
        with ThreadPoolExecutor(1) as other:
            own = other.submit(pool.acquire, 3).result()
            pool.release(used)
            assert device.live == {*used, *own}
            device.limit = 7
            with pytest.raises(DeviceMemoryError):
                other.submit(pool.acquire, 3).result()
            assert set(pool.acquire(4)) == set(used)
            other.submit(pool.release, own).result()
        assert device.live == set(used)

    def test_the_first_allocation_is_all_that_the_pool_keeps(self, device: LimitedMemory):
        pool = WeightPool(CPU, resident=2)
        pool.addresses = device  # type: ignore[assignment]
        small, *large = (cuda_memory(pool, chunks) for chunks in (1, 3, 4))
        small.allocate()
        assert device.created == 7
        small.free()
        for memory in (*large, small):
            memory.allocate()
        assert device.created == 8  # one more decoder than expected
        for memory in (small, *large):
            memory.close()
        assert device.live == set()

    def test_too_little_memory_at_the_first_allocation_is_an_error(self, pool: WeightPool, device: LimitedMemory):
        device.limit = 3
        small, large = cuda_memory(pool, 1), cuda_memory(pool, 4)
        with pytest.raises(DeviceMemoryError):
            small.allocate()
        for memory in (small, large):
            memory.close()
        assert device.live == set()

    def test_weights_that_are_warmed_up_on_another_thread_keep_their_chunks_until_the_device_uses_them(
        self, pool: WeightPool, device: LimitedMemory
    ):
        old = cuda_memory(pool, 4)
        old.allocate()
        new = cuda_memory(pool, 4)
        with ThreadPoolExecutor(1) as other:
            for move in (new.allocate, new.free, new.allocate, new.free):
                other.submit(move).result()
                old.free()
                old.allocate()
        assert (device.created, len(device.live)) == (8, 8)
        old.free()
        new.allocate()
        old.close()
        assert (device.created, len(device.live)) == (8, 4)
        new.close()
        assert device.live == set()

    def test_a_warm_up_on_another_thread_that_fails_returns_its_chunks(self, pool: WeightPool, device: LimitedMemory):
        old, new = cuda_memory(pool, 4), cuda_memory(pool, 6)
        old.allocate()
        with ThreadPoolExecutor(1) as other:
            assert other.submit(new.allocate).exception() is not None
            other.submit(new.close).result()
        assert len(device.live) == 4

    def test_chunks_that_no_decoder_needs_return_to_the_device(self, pool: WeightPool, device: LimitedMemory):
        for count in (6, 4):
            pool.open(count)
        both = pool.acquire(6), pool.acquire(4)  # during the warm-up of a new version
        assert pool.nbytes == 10 * CHUNK_BYTES
        pool.release(both[1])
        assert len(device.live) == 6
        pool.release(both[0])
        assert len(device.live) == 6
        pool.close(6)
        assert len(device.live) == 4
        pool.close(4)
        assert device.live == set()
        assert (pool.nbytes, pool.peak_bytes) == (0, 10 * CHUNK_BYTES)
