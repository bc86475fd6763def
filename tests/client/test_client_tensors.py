"""Arrays of numpy, torch and other packages, and safetensors files."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from pid_client.tensors import Tensor, save_safetensors, to_tensor
from server.body.tensors import read_safetensors

TORCH_DTYPES = [torch.float16, torch.bfloat16, torch.float32]
VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {  # of a tensor [6, 4, 10]
    "contiguous": lambda base: base,
    "transposed": lambda base: base.permute(2, 0, 1),
    "every second": lambda base: base[::2, :, 1::3],
    "offset": lambda base: base[3:, 2],
    "expanded": lambda base: base[:1, :, :1].expand(5, 4, 3),
    "channels last": lambda base: base.reshape(2, 3, 4, 10).to(memory_format=torch.channels_last),
    "zero-dimensional": lambda base: base[5, 3, 9],
    "empty": lambda base: base[:, 4:],
    "without memory": lambda base: torch.empty(0, 3, dtype=base.dtype),
}


def float32(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().numpy()


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_torch_tensors_keep_their_dtype_shape_and_values(
    view: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype
):
    source = view(torch.randn(6, 4, 10, dtype=dtype))
    tensor = to_tensor(source)
    assert (tensor.dtype, tensor.shape) == (str(dtype).removeprefix("torch."), tuple(source.shape))
    assert tensor.data.flags.c_contiguous
    np.testing.assert_array_equal(tensor.to_float32(), float32(source), strict=True)


def test_the_elements_are_a_copy():
    source = torch.ones(3).bfloat16()
    tensor = to_tensor(source)
    source.zero_()
    assert tensor.to_float32().tolist() == [1, 1, 1]


def test_a_tensor_may_require_grad():
    parameter = torch.nn.Parameter(torch.randn(2, 3))
    np.testing.assert_array_equal(to_tensor(parameter * 2).data, float32(parameter * 2))


def test_lazily_negated_tensors_keep_their_sign():
    imaginary = torch.tensor([1 + 2j]).conj().imag
    assert imaginary.is_neg()
    assert to_tensor(imaginary).data.tolist() == [-2]


def test_float64_becomes_float32():
    for source in (torch.randn(5, dtype=torch.float64), np.random.default_rng(0).normal(size=5)):
        tensor = to_tensor(source)
        assert tensor.dtype == "float32"
        np.testing.assert_array_equal(tensor.data, np.asarray(source, np.float32), strict=True)
    assert to_tensor(np.array([1e300])).data.tolist() == [math.inf]


def test_tensors_are_freed_after_the_conversion():
    source = torch.randn(4, 4).bfloat16()
    freed = weakref.ref(source.untyped_storage())
    to_tensor(source)
    del source
    gc.collect()
    assert freed() is None


@pytest.mark.parametrize("dtype", ["float16", "float32", ml_dtypes.bfloat16])
def test_numpy_arrays_keep_their_dtype_shape_and_values(dtype: Any):
    base = np.random.default_rng(0).normal(size=(4, 3, 6)).astype(dtype)
    read_only = base.copy()
    read_only.flags.writeable = False
    for array in (base, base.T, base[::-2, :, ::3], base[1, 2, 3:4].reshape(()), base[:, 3:], read_only):
        tensor = to_tensor(array)
        assert (tensor.dtype, tensor.shape) == (array.dtype.name, array.shape)
        np.testing.assert_array_equal(tensor.to_float32(), array.astype(np.float32), strict=True)


def test_contiguous_numpy_arrays_are_not_copied():
    array = np.zeros((2, 3), np.float16)
    assert to_tensor(array).data is array


def test_big_endian_arrays_are_converted():
    for code in (">f2", ">f4", ">f8"):
        tensor = to_tensor(np.array([1.5, -2], code))
        assert safetensors.numpy.load(save_safetensors({"latent": tensor}))["latent"].tolist() == [1.5, -2]


def test_nested_lists_become_float32():
    tensor = to_tensor([[1, 2.5], (-3, 4)])
    assert (tensor.dtype, tensor.data.tolist()) == ("float32", [[1, 2.5], [-3, 4]])
    assert to_tensor([[1, 2]]).dtype == "float32"


def test_lists_of_tensors_are_stacked():
    items = [torch.full((2, 3), float(value)).bfloat16() for value in range(3)]
    tensor = to_tensor(items)
    assert (tensor.dtype, tensor.shape) == ("bfloat16", (3, 2, 3))
    assert tensor.to_float32()[:, 0, 0].tolist() == [0, 1, 2]
    assert to_tensor((np.zeros(4, np.float16), to_tensor(torch.zeros(4).half()))).shape == (2, 4)


def test_a_tensor_is_returned_unchanged():
    tensor = to_tensor(np.zeros(3, np.float32))
    assert to_tensor(tensor) is tensor


def test_slices_are_items_along_the_first_axis():
    batch = to_tensor(torch.arange(12.0).reshape(3, 4).bfloat16())
    assert batch[1:2].dtype == "bfloat16"
    assert batch[1:2].to_float32().tolist() == [[4, 5, 6, 7]]
    assert batch[::-2].to_float32().tolist() == [[8, 9, 10, 11], [0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (np.zeros(3, np.int64), TypeError, "The tensor has the dtype int64; convert it to float16, bfloat16"),
        (np.zeros(3, np.bool_), TypeError, "the dtype bool; convert it"),
        (np.zeros(3, np.complex64), TypeError, "the dtype complex64; convert it"),
        (np.zeros(3, ml_dtypes.float8_e4m3fn), TypeError, "the dtype float8_e4m3fn; convert it"),
        (np.array([None]), TypeError, "the dtype object; convert it"),
        (torch.zeros(3, dtype=torch.uint8), TypeError, r"the dtype torch\.uint8; convert it"),
        (torch.zeros(3).to(torch.float8_e5m2), TypeError, r"the dtype torch\.float8_e5m2; convert it"),
        (torch.zeros(3, device="meta"), TypeError, r"Cannot read this torch\.Tensor \(.*; convert it to a numpy array"),
        (torch.eye(3).to_sparse(), TypeError, r"Cannot read this torch\.Tensor \(.*; convert it to a numpy array"),
        ("latent.npy", TypeError, "Cannot use 'str' as a tensor; pass a numpy array"),
        (1.5, TypeError, "Cannot use 'float' as a tensor; pass a numpy array"),
        (None, TypeError, "Cannot use 'NoneType' as a tensor; pass a numpy array"),
        ([], TypeError, "Cannot use 'list' as a tensor; pass a numpy array"),
        ([[1, 2], [3]], ValueError, "The nested list is ragged"),
        ([["1", "2"]], TypeError, "The nested list contains values other than numbers"),
        ([[True, False]], TypeError, "The nested list contains values other than numbers"),
        ([object()], TypeError, "The nested list contains values other than numbers"),
        ([torch.zeros(2), torch.zeros(3)], ValueError, r"same shape and dtype, not float32 \[2\], float32 \[3\]"),
        ([torch.zeros(2), torch.zeros(2).half()], ValueError, "same shape and dtype"),
        ([torch.zeros(2), 3], TypeError, "Cannot use 'int' as a tensor"),
    ],
)
def test_unsupported_values_are_rejected(value: object, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        to_tensor(value)


def test_tensors_cannot_be_constructed_from_other_data():
    for dtype, data in (
        ("bfloat16", np.zeros(3, np.float32)),
        ("float32", np.zeros((3, 2), np.float32).T),
        ("int8", np.zeros(3, np.int8)),
    ):
        with pytest.raises(ValueError, match="use to_tensor"):
            Tensor(dtype, data)


class OnDevice:
    """A tensor on a GPU: exports to the CPU only on request."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, *, dl_device: tuple[int, int] | None = None, copy: bool | None = None) -> object:
        if dl_device != (1, 0) or not copy:
            raise BufferError("the tensor is on a GPU")
        return self.tensor.__dlpack__()


class OnDeviceLikeTorch(OnDevice):
    """A tensor on a GPU that requires grad and has methods like those of torch."""

    def __dlpack__(self, **options: object) -> object:
        raise BufferError("the tensor requires grad and is on a GPU")

    def detach(self) -> OnDeviceLikeTorch:
        return OnDeviceLikeTorch(self.tensor.detach())

    def cpu(self) -> torch.Tensor:
        return self.tensor


class OnDeviceOfOldDlpack(OnDevice):
    """A tensor on a GPU whose package has no arguments for a copy to the CPU."""

    def __dlpack__(self, stream: int | None = None) -> object:
        return self.tensor.__dlpack__()


class InPinnedMemory(OnDevice):
    """A tensor in pinned memory, which the CPU can read."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return 3, 0

    def __dlpack__(self, **options: object) -> object:
        assert not options
        return self.tensor.__dlpack__()


@pytest.mark.parametrize("producer", [OnDevice, OnDeviceLikeTorch, InPinnedMemory])
def test_tensors_on_devices_are_copied_to_the_cpu(producer: type[OnDevice]):
    source = torch.randn(2, 3).bfloat16().requires_grad_(producer is OnDeviceLikeTorch)
    np.testing.assert_array_equal(to_tensor(producer(source)).to_float32(), float32(source), strict=True)


def test_tensors_that_cannot_be_copied_to_the_cpu_are_rejected():
    with pytest.raises(TypeError, match=r"Cannot read this .*OnDeviceOfOldDlpack \(.*; convert it to a numpy array"):
        to_tensor(OnDeviceOfOldDlpack(torch.zeros(3)))


def test_dtypes_of_producers_without_a_dtype_are_named_by_their_code():
    with pytest.raises(TypeError, match="the dtype of DLPack's type code 0, 64 bits, 1 lanes"):
        to_tensor(OnDevice(torch.zeros(3, dtype=torch.int64)))


@pytest.mark.parametrize(
    "sources",
    [
        {"latent": torch.randn(16, 8, 8).half()},
        {"latent": torch.randn(1, 3, 5).half(), "caption": torch.randn(2, 4)},
        {"latent": torch.randn(3, 3, 1).bfloat16(), "caption": torch.randn(1, 3).half()},
        {"latent": torch.empty(0, 3, 4)},
        {"latent": torch.tensor(1.5)},
        {},
    ],
)
def test_files_are_those_of_safetensors(sources: dict[str, torch.Tensor]):
    file = save_safetensors({name: to_tensor(tensor) for name, tensor in sources.items()})
    loaded = safetensors.torch.load(file)
    assert loaded.keys() == sources.keys()
    for name, tensor in sources.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_the_server_reads_the_files():
    sources = {"latent": torch.randn(1, 3, 5, 5).bfloat16(), "caption": torch.randn(2, 4)}
    tensors = read_safetensors(save_safetensors({name: to_tensor(tensor) for name, tensor in sources.items()}))
    assert tensors.keys() == sources.keys()
    for name, tensor in sources.items():
        assert torch.equal(tensors[name].to_float32(), tensor.float())


def test_elements_in_a_file_are_aligned():
    file = save_safetensors({"latent": to_tensor(np.ones((1, 1, 1), np.float16)), "caption": to_tensor([[1.0]])})
    length = int.from_bytes(file[:8], "little")
    assert length % 8 == 0
    assert np.frombuffer(file[8 + length :], "<f4", 1).tolist() == [1]
