"""Encode captions with a text encoder and save them: the empty one for the builder, or one per line of a file.

python -m engines.captions --text-encoder gemma-2-2b-it --prefix prefix.txt --text "" --output empty.safetensors
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import safetensors.torch
from torch import Tensor

from engines.bundle import CAPTION_KEY, writing
from engines.captions.encoder import open_text_encoder
from engines.captions.prefix import read_prefix
from engines.captions.prompts import prompt_fault
from engines.captions.protocol import TextEncoderInfo
from engines.cli import ArgumentParser
from engines.errors import ConfigError, PidError

TOKENS = 300  # of the released decoders


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        Exit status: 0 for success; 2 if an option is invalid or a caption could not be encoded or written, with one
        line on stderr; 130 if interrupted.
    """
    arguments = parser().parse_args(argv)
    try:
        _run(arguments)
    except PidError as error:
        print(f"captions: {error}", file=sys.stderr)
        return 2
    except MemoryError:
        print("captions: out of memory.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("captions: interrupted.", file=sys.stderr)
        return 130
    return 0


def parser() -> ArgumentParser:
    """Return the parser of the command line."""
    parser = ArgumentParser(
        prog="python -m engines.captions",
        usage="%(prog)s --text-encoder DIR [--prefix FILE] (--text TEXT | --lines FILE) --output PATH [options]",
        description=(__doc__ or "").split("\n")[0],
    )
    add = parser.add_argument_group("encoder").add_argument
    add(
        "--text-encoder",
        type=Path,
        required=True,
        metavar="DIR",
        help="directory of a Gemma-2 in the format of Hugging Face: config, tokenizer and safetensors (required)",
    )
    add(
        "--prefix",
        type=Path,
        metavar="FILE",
        help="instruction text in front of each caption, in UTF-8; every byte counts, also a newline at the end "
        "(default: none)",
    )
    add("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    add("--tokens", type=_count, default=TOKENS, metavar="COUNT", help="tokens per caption (default: %(default)s)")
    add = parser.add_argument_group("captions").add_argument
    add("--text", metavar="TEXT", help='the caption to encode; "" is the empty one')
    add("--lines", type=Path, metavar="FILE", help="file in UTF-8 with one caption per line")
    add(
        "--output",
        type=Path,
        required=True,
        metavar="PATH",
        help=f"safetensors file to write, with a tensor {CAPTION_KEY} [tokens, width] in bfloat16; with --lines a "
        "directory with such a file for each line, named by its number (required)",
    )
    add("--overwrite", action="store_true", help="replace existing files")
    return parser


def _run(arguments: argparse.Namespace) -> None:
    if (arguments.text is None) == (arguments.lines is None):
        raise ConfigError("Pass either --text TEXT or --lines FILE.")
    captions = [arguments.text] if arguments.lines is None else _read_lines(arguments.lines)
    for number, caption in enumerate(captions, 1):
        if fault := prompt_fault(caption):
            raise ConfigError(f"The caption {f'in line {number} ' * (arguments.lines is not None)}{fault}.")
    if arguments.lines is None:
        outputs = [arguments.output]
    else:
        digits = len(str(len(captions)))
        outputs = [arguments.output / f"{number:0{digits}}.safetensors" for number in range(1, len(captions) + 1)]
    _check_outputs(outputs, arguments.output, arguments.overwrite)
    prefix = "" if arguments.prefix is None else read_prefix(arguments.prefix)
    if not prefix:
        _report("no --prefix; the released decoders were trained with one")
    elif prefix.endswith("\n"):
        _report("the prefix ends with a newline, which is part of it")

    _report(f"opening {arguments.text_encoder}")
    encoder = open_text_encoder(arguments.text_encoder, prefix, arguments.device, arguments.tokens)
    _report(f"{encoder.info.name} on {encoder.info.device}, prefix of {encoder.info.prefix_tokens} tokens")
    if arguments.lines is not None:
        with writing(arguments.output):
            arguments.output.mkdir(parents=True, exist_ok=True)
    waiting, done = iter(zip(captions, outputs, strict=True)), 0
    while batch := list(islice(waiting, encoder.info.max_batch)):
        embeddings = encoder.encode([caption for caption, _ in batch])
        for (caption, path), embedding in zip(batch, embeddings, strict=True):
            _save(embedding, path, caption, encoder.info)
        done += len(batch)
        _report(f"{done} of {len(captions)} captions")


def _read_lines(path: Path) -> list[str]:
    """Return the lines of a file without their ends; an empty line is an empty caption."""
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: invalid byte at offset {error.start}.") from error
    lines = text.removesuffix("\n").split("\n")  # not splitlines(), which also splits at characters of a caption
    if not text:
        raise ConfigError(f"{path} has no lines.")
    return [line.removesuffix("\r") for line in lines]


def _check_outputs(outputs: Sequence[Path], output: Path, overwrite: bool) -> None:
    """Raise a ConfigError if the files cannot be written, before minutes of work."""
    if outputs != [output] and output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file; with --lines, --output is a directory.")
    for path in outputs:
        if path.is_dir():
            raise ConfigError(f"{path} is a directory; --output must be a file.")
        if path.exists() and not overwrite:
            raise ConfigError(f"{path} exists; replace it with --overwrite, or choose another --output.")
    if outputs == [output] and not output.parent.is_dir():
        raise ConfigError(f"The directory {output.parent} does not exist.")


def _save(embedding: Tensor, path: Path, caption: str, info: TextEncoderInfo) -> None:
    """Write a caption atomically, with the text and the encoder as metadata. Raises BundleError."""
    metadata = {"text": caption, "text_encoder": info.name, "text_encoder_sha256": info.identity}
    content = safetensors.torch.save({CAPTION_KEY: embedding.contiguous()}, metadata)
    partial = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}")
    try:
        with writing(path):
            with partial.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _report(text: str) -> None:
    with contextlib.suppress(OSError):  # the stream may be a closed pipe
        print(f"captions: {text}", file=sys.stderr, flush=True)


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 8192:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens from 1 to 8192")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
