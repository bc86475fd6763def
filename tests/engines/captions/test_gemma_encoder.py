"""The text encoder against transformers, called directly on the padded text."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engines.captions import encoder as encoder_module
from engines.captions.encoder import open_text_encoder
from engines.captions.protocol import TextEncoder
from engines.errors import CheckpointError, ConfigError, DecodeError, DeviceLostError, DeviceMemoryError
from tests.conftest import BuildOnce
from tests.tiny_text_encoder import SPECIAL, write_tiny_text_encoder

TOKENS = 12
PREFIX = "The cat of the red photo:\n- in "
PROMPTS = (
    "",
    "a photo of the red cat",
    "A Photo  of\tTHE red cat \n",
    "one word too many for the encoder, and then some more words that have no effect",
    "🙂 Grüße",
    "nul \x00, bell \x07, line \u2028",
    "<bos><pad>red<end_of_turn>",
)


def reference(directory: Path, prompt: str, prefix: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return the embedding [TOKENS, width] in float32, with padding and truncation by hand."""
    from transformers import AutoTokenizer, Gemma2Model

    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    ids = tokenizer(prefix + prompt)["input_ids"]
    length = len(tokenizer(prefix)["input_ids"]) + TOKENS - 2 if prefix else TOKENS
    count = min(len(ids), length)
    padded = torch.tensor([ids[:count] + [tokenizer.pad_token_id] * (length - count)])
    mask = torch.tensor([[1] * count + [0] * (length - count)])
    model = Gemma2Model.from_pretrained(directory, dtype=dtype, local_files_only=True)
    with torch.no_grad():
        hidden = model(input_ids=padded, attention_mask=mask).last_hidden_state[0].float()
    return torch.cat((hidden[:1], hidden[len(hidden) - TOKENS + 1 :]))


@pytest.fixture(scope="module")
def encoder(tiny_text_encoder: Path) -> TextEncoder:
    return open_text_encoder(tiny_text_encoder, PREFIX, tokens=TOKENS)


@pytest.fixture
def copied(tiny_text_encoder: Path, tmp_path: Path) -> Path:
    """A copy of the text encoder, to be modified."""
    return shutil.copytree(tiny_text_encoder, tmp_path / "encoder")


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("prefix", [PREFIX, ""])
def test_embeddings_are_those_of_transformers(tiny_text_encoder: Path, prompt: str, prefix: str):
    """Both compute in bfloat16; the comparison is in float32."""
    embedding = open_text_encoder(tiny_text_encoder, prefix, tokens=TOKENS).encode([prompt])
    assert embedding.shape == (1, TOKENS, 16)
    assert embedding.dtype == torch.bfloat16
    torch.testing.assert_close(embedding[0].float(), reference(tiny_text_encoder, prompt, prefix), rtol=0, atol=1e-6)


def test_embeddings_are_close_to_those_in_float32(tiny_text_encoder: Path, encoder: TextEncoder):
    exact = reference(tiny_text_encoder, "the cat", PREFIX, torch.float32)
    error = (encoder.encode(["the cat"])[0].float() - exact).norm() / exact.norm()
    assert error < 0.05


def test_the_first_row_and_the_rows_after_the_prefix_are_kept(encoder: TextEncoder):
    """The first two rows, of the first token and the last one of the prefix, do not see the prompt."""
    first, second = encoder.encode(["red"])[0], encoder.encode(["the cat"])[0]
    assert torch.equal(first[:2], second[:2])
    assert not torch.equal(first[2], second[2])


def test_case_and_white_space_matter(encoder: TextEncoder):
    embeddings = [encoder.encode([prompt])[0] for prompt in ("red cat", "Red cat", "red  cat", "red cat ", " red cat")]
    assert len({tuple(embedding.float().flatten().tolist()) for embedding in embeddings}) == len(embeddings)


def test_tokens_beyond_the_limit_have_no_effect(encoder: TextEncoder):
    prompt = "redcat" * 5
    assert torch.equal(encoder.encode([prompt + " the photo"]), encoder.encode([prompt + "!" * 1000]))


def test_padding_does_not_change_the_rows_of_the_prompt(tiny_text_encoder: Path, encoder: TextEncoder):
    short, long = (
        open_text_encoder(tiny_text_encoder, "", tokens=tokens).encode(["red cat"])[0].float() for tokens in (5, 12)
    )
    torch.testing.assert_close(short[:3], long[:3], rtol=0, atol=2**-6)


def test_a_batch_gives_the_embeddings_of_single_prompts(tiny_text_encoder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(encoder_module, "_MAX_BATCH", {"cpu": len(PROMPTS)})
    encoder = open_text_encoder(tiny_text_encoder, PREFIX, tokens=TOKENS)
    batch = encoder.encode(PROMPTS)
    for prompt, embedding in zip(PROMPTS, batch, strict=True):
        torch.testing.assert_close(embedding, encoder.encode([prompt])[0], rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("count", [0, 2])
def test_a_batch_of_the_wrong_size_is_an_error(encoder: TextEncoder, count: int):
    with pytest.raises(ValueError, match="a batch has 1 to 1"):
        encoder.encode([""] * count)


def test_the_info_describes_the_encoder(encoder: TextEncoder, tiny_text_encoder: Path):
    info = encoder.info
    assert (info.name, info.tokens, info.width, info.device) == (tiny_text_encoder.name, TOKENS, 16, "cpu")
    from transformers import AutoTokenizer

    assert info.prefix_tokens == len(AutoTokenizer.from_pretrained(tiny_text_encoder)(PREFIX)["input_ids"])


def test_a_model_in_a_cache_of_hugging_face_has_its_name(tiny_text_encoder: Path, tmp_path: Path):
    snapshots = tmp_path / "models--google--gemma-2-2b-it" / "snapshots"
    snapshots.mkdir(parents=True)
    shutil.copytree(tiny_text_encoder, snapshots / ("0" * 40))
    assert open_text_encoder(snapshots / ("0" * 40)).info.name == "gemma-2-2b-it"


def test_the_identity_is_that_of_files_and_options(
    encoder: TextEncoder, tiny_text_encoder: Path, copied: Path, tmp_path: Path
):
    def identity(directory: Path, prefix: str = PREFIX, tokens: int = TOKENS) -> str:
        return open_text_encoder(directory, prefix, tokens=tokens).info.identity

    assert identity(copied) == encoder.info.identity
    (copied / "README.md").write_text("Other files do not matter.")
    assert identity(copied) == encoder.info.identity
    others = [identity(copied, PREFIX + "\n"), identity(copied, tokens=13)]
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        content = (copied / name).read_bytes()
        (copied / name).write_bytes(content + b"\n")
        others.append(identity(copied))
        (copied / name).write_bytes(content)
    write_tiny_text_encoder(copied, seed=1)
    others.append(identity(copied))
    assert len({encoder.info.identity, *others}) == 1 + len(others)


def test_tokenizer_files_of_transformers_4_are_the_same(encoder: TextEncoder, copied: Path):
    """The published files were written by that version; a tokenizer with more than 100,000 tokens is a special case."""
    tokenizer = json.loads((copied / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary.update({f"unused {index}": index for index in range(len(vocabulary), 100_001)})
    tokenizer["model"]["merges"] = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    (copied / "tokenizer.json").write_text(json.dumps(tokenizer))
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    added = {index: {"content": token, "special": True, **flags} for index, token in enumerate(SPECIAL)}
    names = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    options = {"add_bos_token": True, "added_tokens_decoder": added, "tokenizer_class": "GemmaTokenizer", **names}
    (copied / "tokenizer_config.json").write_text(json.dumps(options))
    edit("config.json", transformers_version="4.42.0.dev0")(copied)
    old = open_text_encoder(copied, PREFIX, tokens=TOKENS)
    for prompt in PROMPTS:
        assert torch.equal(old.encode([prompt]), encoder.encode([prompt]))


def test_weights_in_several_files_are_the_same(encoder: TextEncoder, build_once: BuildOnce):
    directory = build_once("sharded-text-encoder", lambda path: write_tiny_text_encoder(path, shard_bytes=10_000))
    assert len(list(directory.glob("*.safetensors"))) > 1
    sharded = open_text_encoder(directory, PREFIX, tokens=TOKENS)
    assert torch.equal(sharded.encode(["red"]), encoder.encode(["red"]))


def test_weights_in_bfloat16_are_mapped_into_memory(tiny_text_encoder: Path):
    opened = open_text_encoder(tiny_text_encoder, tokens=TOKENS)
    parameters = list(opened._model.parameters())  # type: ignore[attr-defined]
    maps = Path("/proc/self/maps").read_text().splitlines()
    addresses = [line.split()[0].split("-") for line in maps if str(tiny_text_encoder) in line]
    ranges = [(int(start, 16), int(end, 16)) for start, end in addresses]
    assert all(any(start <= p.data_ptr() < end for start, end in ranges) for p in parameters)


def test_nothing_is_read_from_the_network(tiny_text_encoder: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise AssertionError("a socket was used")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert open_text_encoder(tiny_text_encoder, PREFIX, tokens=TOKENS).encode(["red"]).isfinite().all()


def test_code_in_the_directory_is_not_executed(copied: Path):
    executed = copied / "executed"
    (copied / "code.py").write_text(f"open({str(executed)!r}, 'w')\n")
    edit("config.json", auto_map={"AutoConfig": "code.Config", "AutoModel": "code.Model"})(copied)
    edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"]})(copied)
    assert open_text_encoder(copied, tokens=TOKENS).encode(["red"]).isfinite().all()
    assert not executed.exists()


def test_pickled_weights_are_not_loaded(copied: Path):
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"has no file model\.safetensors"):
        open_text_encoder(copied)


def edit(name: str, **fields: object) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        content = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps({**content, **fields}))

    return change


def write(name: str, content: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_text(content) and None


def remove(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def drop_a_tensor(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (remove("config.json"), ConfigError, "has no file config.json"),
        (remove("tokenizer.json"), ConfigError, "has no file tokenizer.json"),
        (remove("model.safetensors"), ConfigError, "has no file model.safetensors"),
        (write("config.json", "{"), ConfigError, "config.json is not valid JSON"),
        (write("config.json", "[]"), ConfigError, "config.json is not a JSON object"),
        (edit("config.json", model_type="llama"), ConfigError, "is a model of type 'llama'"),
        (edit("config.json", quantization_config={}), ConfigError, "has quantised weights"),
        (edit("config.json", num_hidden_layers="many"), ConfigError, "The config in"),
        (edit("config.json", intermediate_size=64), CheckpointError, "cannot be loaded"),
        (edit("config.json", num_hidden_layers=4, layer_types=None), CheckpointError, "are missing, such as layers.3"),
        (edit("config.json", max_position_embeddings=20), ConfigError, "is more than the 20 tokens"),
        (write("adapter_config.json", "{}"), ConfigError, "has an adapter"),
        (write("tokenizer.json", "{}"), ConfigError, "The tokenizer in"),
        (edit("tokenizer.json", post_processor=None), ConfigError, "is not Gemma's"),
        (drop_a_tensor, CheckpointError, "1 tensors are missing, such as layers.1.mlp.up_proj"),
        (truncate, CheckpointError, "cannot be loaded"),
        (write("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"), CheckpointError, "Git LFS"),
    ],
)
def test_a_directory_that_is_not_a_gemma_is_rejected(
    copied: Path, change: Callable[[Path], None], error: type[Exception], message: str
):
    change(copied)
    with pytest.raises(error, match=message) as raised:
        open_text_encoder(copied, PREFIX, tokens=TOKENS)
    assert str(raised.value).endswith(".")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../other.safetensors"}}, "is not an index"),
        ({}, "is not an index"),
        ({"weight_map": {"a": "model-1.safetensors"}}, "has no file model-1.safetensors"),
    ],
)
def test_an_index_names_files_of_the_directory(copied: Path, index: dict[str, object], message: str):
    remove("model.safetensors")(copied)
    write("model.safetensors.index.json", json.dumps(index))(copied)
    with pytest.raises(ConfigError, match=message):
        open_text_encoder(copied)


def test_a_path_that_is_not_a_directory_is_rejected(tmp_path: Path):
    with pytest.raises(ConfigError, match="is not a directory"):
        open_text_encoder(tmp_path / "nothing")


def test_without_transformers_the_extra_is_named(tiny_text_encoder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[captions\]'"):
        open_text_encoder(tiny_text_encoder)


def test_an_unavailable_device_is_an_error(tiny_text_encoder: Path):
    with pytest.raises(ConfigError, match="'gpu' is not a device"):
        open_text_encoder(tiny_text_encoder, device="gpu")


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), DeviceMemoryError, "does not fit"),
        (RuntimeError("CUDA error: an illegal memory access"), DeviceLostError, "must be restarted"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), MemoryError, "host"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), DecodeError, "failed on this prompt"),
    ],
)
def test_errors_of_the_device_are_translated(
    tiny_text_encoder: Path, raised: Exception, expected: type[Exception], message: str
):
    opened = open_text_encoder(tiny_text_encoder, tokens=TOKENS)

    def fail(*_: object, **__: object) -> None:
        raise raised

    opened._model.forward = fail  # type: ignore[attr-defined]
    with pytest.raises(expected, match=message):
        opened.encode(["red"])


def test_weights_that_do_not_fit_are_an_error(tiny_text_encoder: Path, monkeypatch: pytest.MonkeyPatch):
    from transformers import Gemma2Model

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Gemma2Model, "from_pretrained", fail)
    with pytest.raises(DeviceMemoryError, match="use the CPU"):
        open_text_encoder(tiny_text_encoder)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_embeddings_that_are_not_finite_are_an_error(copied: Path, value: float):
    tensors = load_file(copied / "model.safetensors")
    tensors["model.norm.weight"].fill_(value)
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(DecodeError, match="NaN or infinity"):
        open_text_encoder(copied, tokens=TOKENS).encode(["red"])


def test_the_longest_prompt_is_encoded(encoder: TextEncoder):
    assert encoder.encode(["🙂" * 20_000]).shape == (1, TOKENS, 16)
