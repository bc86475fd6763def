"""Gemma-2 as a text encoder, run by transformers (extra `captions`) on files of this machine.

An embedding is the output of the decoder stack after its final norm, for the prefix and the prompt as one text. The
text is padded or truncated on the right, and padding is masked inside the model only: the rows of the padding are part
of the embedding, because the decoders were trained with them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from engines.captions.model_files import ModelFiles, find_model_files
from engines.captions.protocol import TextEncoder, TextEncoderInfo
from engines.errors import CheckpointError, ConfigError, DecodeError, DeviceLostError, DeviceMemoryError
from engines.runtime.devices import find_device

DTYPE = torch.bfloat16  # of the weights and the embeddings, as in training
_MAX_BATCH = {"cpu": 1, "cuda": 8}  # a CPU gains nothing from batches


def open_text_encoder(directory: Path, prefix: str = "", device: str = "cpu", tokens: int = 300) -> TextEncoder:
    """Open a Gemma-2. Reads all of its files, and nothing from the network.

    On the CPU, weights in bfloat16 are mapped into memory: they must not be modified while the encoder is in use.

    Args:
        directory: Config, tokenizer and weights in the format of Hugging Face.
        prefix: Text in front of each prompt; empty for none.
        device: PyTorch name: cpu, cuda or cuda:N.
        tokens: Tokens of each embedding.

    Raises:
        ConfigError: transformers is not installed, the device is not available, the prefix is too long, or the
            directory is not a Gemma-2.
        CheckpointError: The weights are damaged or do not match the config.
        DeviceMemoryError: The weights do not fit into the memory of the device.
    """
    files = find_model_files(directory)
    target = find_device(device)
    transformers = import_transformers()
    config = _load_config(transformers, files)
    tokenizer = _PromptTokenizer(_load_tokenizer(transformers, files, config), prefix, tokens)
    limit = config.max_position_embeddings
    if tokenizer.length > limit:
        raise ConfigError(
            f"The prefix has {tokenizer.prefix_tokens:,} tokens. With the {tokens:,} of an embedding, that is more "
            f"than the {limit:,} tokens that {files.model_name} supports; shorten it."
        )
    model = _load_model(transformers, files, config, target)
    info = TextEncoderInfo(
        name=files.model_name,
        identity=files.identity(prefix=prefix, tokens=tokens, dtype=str(DTYPE)),
        tokens=tokens,
        width=config.hidden_size,
        prefix_tokens=tokenizer.prefix_tokens,
        device=str(target),
        max_batch=_MAX_BATCH[target.type],
    )
    return _GemmaTextEncoder(model, tokenizer, target, info)


class _PromptTokenizer:
    """Turns prompts into token numbers of equal length.

    Texts such as `<bos>` or `<end_of_turn>` become the special tokens of this name, as in the reference.

    Attributes:
        prefix_tokens: Tokens of the prefix, with the one that begins each text.
        length: Tokens of each text, padding included.
        kept: Positions whose outputs are the embedding.
    """

    def __init__(self, tokenizer: Any, prefix: str, tokens: int) -> None:
        self._tokenizer = tokenizer
        self._prefix = prefix
        self.prefix_tokens = len(tokenizer(prefix)["input_ids"])
        # As in training: an embedding has the first token, the last one of the prefix, and all of the prompt.
        self.length = self.prefix_tokens + tokens - 2 if prefix else tokens
        self.kept = [0, *range(self.length - tokens + 1, self.length)]

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return token numbers and the mask of those that are not padding, int64 [B, length]."""
        batch = self._tokenizer(
            [self._prefix + prompt for prompt in prompts],
            padding="max_length",
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        )
        return batch["input_ids"], batch["attention_mask"]


class _GemmaTextEncoder:
    """Implements `protocol.TextEncoder`."""

    def __init__(self, model: Any, tokenizer: _PromptTokenizer, device: torch.device, info: TextEncoderInfo) -> None:
        self.info = info
        self._model = model
        self._tokenizer = tokenizer
        self._device = device
        # Not the default stream, so that decodes on the same GPU are not delayed until an encoding has ended.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))  # which copies the weights

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Return the embeddings; see `TextEncoder`."""
        if not 1 <= len(prompts) <= self.info.max_batch:
            raise ValueError(f"{len(prompts)} prompts; a batch has 1 to {self.info.max_batch}")
        tokens, mask = self._tokenizer(prompts)
        stream = contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        try:
            with torch.no_grad(), stream:
                output = self._model(
                    input_ids=tokens.to(self._device), attention_mask=mask.to(self._device), use_cache=False
                )
                embeddings: Tensor = output.last_hidden_state[:, self._tokenizer.kept].to("cpu", DTYPE)
        except RuntimeError as error:
            raise _device_error(error) or DecodeError("The text encoder failed on this prompt.") from error
        if not embeddings.isfinite().all():
            raise DecodeError("The text encoder computed NaN or infinity for this prompt.")
        return embeddings


def import_transformers() -> ModuleType:
    """Import transformers, so that it does not use the network.

    Raises:
        ConfigError: It is not installed.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported; otherwise it may look for newer files
    try:
        import transformers
        from transformers.utils import logging
    except ImportError as error:
        raise ConfigError(
            "Encoding prompts needs the package transformers; install it with pip install -e '.[captions]'."
        ) from error
    logging.disable_progress_bar()
    return transformers


def _load_config(transformers: ModuleType, files: ModelFiles) -> Any:
    try:
        return transformers.Gemma2Config.from_pretrained(files.directory, local_files_only=True)
    except Exception as error:  # those of several libraries
        raise ConfigError(f"The config in {files.directory} is invalid: {_one_line(error)}.") from error


def _load_tokenizer(transformers: ModuleType, files: ModelFiles, config: Any) -> Any:
    """Load the tokenizer, for padding and truncation on the right.

    Raises:
        ConfigError: The tokenizer is damaged, or does not begin texts as Gemma's does.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            files.directory,
            config=config,
            padding_side="right",  # Gemma's default is the left, for chats
            truncation_side="right",
            local_files_only=True,
            trust_remote_code=False,
        )
        start = tokenizer("")["input_ids"]
    except Exception as error:  # those of several libraries
        raise ConfigError(f"The tokenizer in {files.directory} cannot be used: {_one_line(error)}.") from error
    if tokenizer.bos_token_id is None or start != [tokenizer.bos_token_id] or tokenizer.pad_token_id is None:
        raise ConfigError(
            f"The tokenizer in {files.directory} is not Gemma's: it must begin each text with one special token, and "
            "have one for padding."
        )
    return tokenizer


def _load_model(transformers: ModuleType, files: ModelFiles, config: Any, device: torch.device) -> Any:
    """Load the decoder stack, without the head that predicts tokens.

    Raises:
        CheckpointError: The weights are damaged or do not match the config.
        DeviceMemoryError: The weights do not fit into the memory of the device.
    """
    try:
        model, report = transformers.Gemma2Model.from_pretrained(
            files.directory,
            config=config,
            dtype=DTYPE,
            attn_implementation="eager",  # the others leave out the limit of the attention logits
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
        model = model.eval().requires_grad_(False).to(device)
    except Exception as error:  # those of several libraries
        raise _device_error(error) or CheckpointError(
            f"The weights in {files.directory} cannot be loaded: {_one_line(error)}. "
            "Download them again; a Git LFS pointer is not enough."
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"The weights in {files.directory} do not match its config: {len(missing)} tensors are missing, such as "
            f"{missing[0]}. Download them again."
        )
    return model


def _device_error(error: Exception) -> Exception | None:
    """Return the error to raise instead of `error` if the device caused it (see `TextEncoder`), otherwise None."""
    if isinstance(error, torch.OutOfMemoryError):
        return DeviceMemoryError("The text encoder does not fit into the free memory of the device; use the CPU.")
    if isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error):
        return DeviceLostError("Unrecoverable CUDA error; the process must be restarted.")
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return MemoryError("The host is out of memory.")
    return None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
