"""Files read into memory: their hash, and the tensors in safetensors files."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from engines.tensors import parse_safetensors, read_file

TENSORS = {
    "matrix": torch.randn(3, 4),
    "half": torch.randn(5).half(),
    "bfloat": torch.randn(2, 1, 3).bfloat16(),
    "fp8": torch.randn(7).to(torch.float8_e4m3fn),
    "integers": torch.arange(6).view(2, 3),
    "flags": torch.tensor([True, False, True]),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 3),
}


def file_of(header: object, data: bytes = bytes(16)) -> bytearray:
    text = json.dumps(header).encode()
    return bytearray(len(text).to_bytes(8, "little") + text + data)


def entry(**changes: object) -> dict[str, object]:
    return {"x": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}}


def test_content_and_hash_are_those_of_the_file(tmp_path: Path):
    path = tmp_path / "file"
    for content in (b"", b"abc", bytes(range(256)) * 150_000):  # the last one is read in several parts
        path.write_bytes(content)
        assert read_file(path) == (content, hashlib.sha256(content).hexdigest())


def test_tensors_are_those_that_were_saved():
    tensors = parse_safetensors(bytearray(save(TENSORS, metadata={"format": "pt"})))
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in tensors.items():
        assert (tensor.dtype, tensor.shape) == (TENSORS[name].dtype, TENSORS[name].shape)
        assert torch.equal(tensor.view(-1).view(torch.uint8), TENSORS[name].view(-1).view(torch.uint8))


def test_tensors_are_views_of_the_content():
    content = file_of(entry())
    tensor = parse_safetensors(content)["x"]
    content[-16:] = torch.ones(4).numpy().tobytes()
    assert torch.equal(tensor, torch.ones(2, 2))


@pytest.mark.parametrize(
    "content",
    [
        bytearray(),
        bytearray(b"short"),
        bytearray((2**63).to_bytes(8, "little") + b"{}"),
        bytearray((100).to_bytes(8, "little") + b"{}"),
        file_of([1]),
        file_of({"x": 1}),
        file_of(entry(dtype="F6_E3M2")),
        file_of(entry(dtype="F4", shape=[2, 15])),
        file_of(entry(dtype="F4", shape=[])),
        file_of(entry(dtype="F4", shape=[2, 2, 2])),
        file_of(entry(shape=[2, -2])),
        file_of(entry(shape=[2, True])),
        file_of(entry(shape="22")),
        file_of(entry(shape=[2, 3])),
        file_of(entry(shape=[10**12, 10**12])),
        file_of(entry(data_offsets=[0, 12])),
        file_of(entry(data_offsets=[-16, 0])),
        file_of(entry(data_offsets=[16, 0])),
        file_of(entry(data_offsets=[8, 24])),
        file_of(entry(data_offsets=[0.0, 16.0])),
    ],
)
def test_an_invalid_file_is_an_error(content: bytearray):
    with pytest.raises(ValueError, match=r"header|entry of x"):
        parse_safetensors(content)


@given(data=st.data())
def test_damage_raises_nothing_but_value_errors(data: st.DataObject):
    content = bytearray(save(TENSORS))
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=5)):
        content[position] = data.draw(st.integers(0, 255))
    try:
        tensors = parse_safetensors(content)
    except ValueError:
        return
    assert all(tensor.numel() >= 0 for tensor in tensors.values())


def test_numbers_of_four_bits_are_pairs_as_in_pytorch():
    packed = torch.arange(24, dtype=torch.uint8).reshape(3, 8).view(torch.float4_e2m1fn_x2)
    content = save({"x": packed})
    assert json.loads(content[8:].partition(b"}}")[0] + b"}}")["x"]["shape"] == [3, 16]
    (found,) = parse_safetensors(bytearray(content)).values()
    assert (found.dtype, found.shape) == (packed.dtype, packed.shape)
    assert torch.equal(found.view(torch.uint8), packed.view(torch.uint8))
