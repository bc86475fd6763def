"""A directory with a tiny Gemma-2 with random weights and a tokenizer, in the format of Hugging Face.

The tokenizer has Gemma's structure: words are merged from characters, and other characters fall back to their bytes.
"""

from __future__ import annotations

import string
from pathlib import Path

import torch

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>")  # numbered from 0
_WORDS = ("photo", "cat", "red", "the", "in", "▁a", "▁of", "▁the", "▁cat", "▁red")


def write_tiny_text_encoder(directory: Path, width: int = 16, seed: int = 0, shard_bytes: int = 10**9) -> None:
    """Write config, tokenizer and weights in bfloat16; with a small `shard_bytes`, in several files with an index."""
    from transformers import Gemma2Config, Gemma2ForCausalLM
    from transformers.models.gemma import GemmaTokenizer

    vocabulary, merges = _vocabulary()
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    tokenizer.save_pretrained(directory)
    config = Gemma2Config(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=4096,
        initializer_range=0.5,  # so that attention is far from uniform
    )
    torch.manual_seed(seed)
    Gemma2ForCausalLM(config).bfloat16().save_pretrained(directory, max_shard_size=shard_bytes)


def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the numbers of the tokens, and the pairs that are merged."""
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "\n"]
    tokens += string.ascii_letters + string.digits + string.punctuation
    merges = []
    for word in _WORDS:
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                tokens.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    return {token: index for index, token in enumerate(tokens)}, merges
