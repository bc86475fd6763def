"""Measure how long the text encoder needs for a prompt, and how much memory, with random weights at its real size.

python -m engines.benchmark.text_encoder --json text-encoder-cpu.json

The weights, 5.2 GB, are written to a temporary directory first. A new process then opens them as the server does.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from engines.captions.encoder import DTYPE, import_transformers, open_text_encoder
from engines.cli import ArgumentParser
from engines.errors import ConfigError, PidError

TOKENS = 300  # of the released decoders
BYTE_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256)))
_MARGIN = 2**30  # bytes that must remain free on the disk


@dataclass(frozen=True)
class Architecture:
    """Dimensions of a Gemma-2; by default those of Gemma-2-2B."""

    vocabulary: int = 256_000
    width: int = 2304
    mlp_width: int = 9216
    layers: int = 26
    heads: int = 8
    key_heads: int = 4
    head_width: int = 256

    def layer(self, index: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors of a layer."""
        queries, keys = self.heads * self.head_width, self.key_heads * self.head_width
        shapes: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj": (queries, self.width),
            "self_attn.k_proj": (keys, self.width),
            "self_attn.v_proj": (keys, self.width),
            "self_attn.o_proj": (self.width, queries),
            "mlp.gate_proj": (self.mlp_width, self.width),
            "mlp.up_proj": (self.mlp_width, self.width),
            "mlp.down_proj": (self.width, self.mlp_width),
        }
        for place in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            shapes[f"{place}_layernorm"] = (self.width,)
        return {f"model.layers.{index}.{name}.weight": shape for name, shape in shapes.items()}

    def files(self) -> list[dict[str, tuple[int, ...]]]:
        """Return the shapes of all tensors, one mapping for each file: embeddings and layers."""
        first = {"model.embed_tokens.weight": (self.vocabulary, self.width), "model.norm.weight": (self.width,)}
        return [first, *(self.layer(index) for index in range(self.layers))]

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(torch.Size(shape).numel() for file in self.files() for shape in file.values())

    def config(self) -> dict[str, Any]:
        """Return the content of config.json."""
        return {
            "model_type": "gemma2",
            "vocab_size": self.vocabulary,
            "hidden_size": self.width,
            "intermediate_size": self.mlp_width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "head_dim": self.head_width,
            "query_pre_attn_scalar": self.head_width,
        }


SMALL = Architecture(vocabulary=512, width=32, mlp_width=64, layers=2, heads=2, key_heads=1, head_width=16)


@dataclass(frozen=True)
class Measurement:
    """Times and memory of an encoder, measured in a separate process.

    `peak_bytes` is the peak of the resident memory (VmHWM). It includes `file_bytes` of mapped files, which the kernel
    can drop and read again; `own_bytes` is the memory of the process itself. These two were read after the encodings.
    """

    prefix_tokens: int
    text_tokens: int  # of each text, prefix and padding included
    open_seconds: float  # import of transformers, hash of all files, mapping of the weights
    first_seconds: float  # of the first prompt, which reads the mapped weights
    seconds: Sequence[float]  # of each further prompt
    peak_bytes: int
    file_bytes: int
    own_bytes: int

    @property
    def median_seconds(self) -> float:
        """Median over the prompts after the first."""
        return statistics.median(self.seconds)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    arguments = _parser().parse_args(argv)
    architecture = SMALL if arguments.small else Architecture()
    try:
        report = run(architecture, arguments.directory, arguments.prefix_tokens, arguments.prompts, arguments.threads)
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    except PidError as error:
        print(f"text_encoder: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"text_encoder: {error.filename or ''}: {error.strerror}.", file=sys.stderr)
        return 2
    print(table(report))
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m engines.benchmark.text_encoder", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add(
        "--directory",
        type=Path,
        default=Path(tempfile.gettempdir()),
        metavar="DIR",
        help="where to write the weights, which are deleted at the end (default: %(default)s)",
    )
    add(
        "--prefix-tokens",
        type=int,
        default=250,
        metavar="COUNT",
        help="tokens of the instruction text (default: %(default)s)",
    )
    add("--prompts", type=int, default=3, metavar="COUNT", help="prompts after the first (default: %(default)s)")
    add("--threads", type=int, metavar="COUNT", help="threads of PyTorch (default: one per core)")
    add("--small", action="store_true", help="use a tiny network instead, to test this program")
    add("--json", type=Path, metavar="FILE", help="also write the result to this file")
    return parser


def run(
    architecture: Architecture, directory: Path, prefix_tokens: int, prompts: int, threads: int | None
) -> dict[str, Any]:
    """Write the weights, measure the encoder on the CPU, delete the weights, and return the report.

    Raises:
        ConfigError: The disk has too little space, or transformers is not installed.
    """
    size = architecture.parameters * DTYPE.itemsize
    free = shutil.disk_usage(directory).free
    if free < size + _MARGIN:
        needed = (size + _MARGIN) / 1e9
        raise ConfigError(f"{directory} has {free / 1e9:.1f} GB of free space; {needed:.1f} are needed.")
    transformers = import_transformers()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="gemma-2-random-", dir=directory) as folder:
        print(f"writing {size / 1e9:.1f} GB to {folder}", file=sys.stderr, flush=True)
        write_random(architecture, Path(folder))
        print("measuring", file=sys.stderr, flush=True)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            threads = pool.submit(_use_threads, threads).result()
            measured = pool.submit(measure, Path(folder), "x" * (prefix_tokens - 1), prompts).result()
    return {
        "machine": _machine(threads) | {"transformers": transformers.__version__},
        "load average": {"before": round(load, 2), "after": round(os.getloadavg()[0], 2)},
        "parameters": architecture.parameters,
        "weights, bytes": size,
        **asdict(measured),
        "median_seconds": measured.median_seconds,
    }


def write_random(architecture: Architecture, directory: Path) -> None:
    """Write a model with random weights in bfloat16, one layer at a time, and a tokenizer that encodes each byte."""
    from transformers.models.gemma import GemmaTokenizer

    GemmaTokenizer(
        vocab={token: index for index, token in enumerate(BYTE_TOKENS)}, merges=[], add_bos_token=True
    ).save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(architecture.config()))
    generator, places = torch.Generator().manual_seed(0), {}
    files = architecture.files()
    for number, shapes in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        tensors = {key: _random(shape, generator) for key, shape in shapes.items()}
        save_file(tensors, directory / name, {"format": "pt"})
        places.update(dict.fromkeys(shapes, name))
    index = {"metadata": {}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.empty(shape, dtype=DTYPE).normal_(std=0.02, generator=generator)


def measure(directory: Path, prefix: str, prompts: int) -> Measurement:
    """Open the encoder in `directory` on the CPU and encode a prompt several times."""
    encoder, open_seconds = _timed(lambda: open_text_encoder(directory, prefix, "cpu", TOKENS))
    prompt = "a photo of a red cat on a chair"
    seconds = [_timed(lambda: encoder.encode([prompt]))[1] for _ in range(1 + prompts)]
    memory = _memory()
    return Measurement(
        prefix_tokens=encoder.info.prefix_tokens,
        text_tokens=encoder.info.prefix_tokens + TOKENS - 2,
        open_seconds=open_seconds,
        first_seconds=seconds[0],
        seconds=seconds[1:],
        peak_bytes=memory["VmHWM"],
        file_bytes=memory["RssFile"],
        own_bytes=memory["RssAnon"],
    )


def _use_threads(count: int | None) -> int:
    if count is not None:
        torch.set_num_threads(count)
    return torch.get_num_threads()


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def _memory() -> dict[str, int]:
    """Return the memory of this process in bytes, by the names of proc(5)."""
    lines = (line.partition(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(value.split()[0]) * 1024 for name, _, value in lines if value.endswith(" kB")}


def _machine(threads: int) -> dict[str, str | int]:
    return {
        "processor": platform.processor() or platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bfloat16 arithmetic": torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        "threads": threads,
        "torch": torch.__version__,
    }


def table(report: Mapping[str, Any]) -> str:
    """Return the report as a plain-text table."""
    rows = {
        "weights": f"{report['weights, bytes'] / 1e9:.2f} GB",
        "tokens per text, of which prefix": f"{report['text_tokens']}, {report['prefix_tokens']}",
        "opening": f"{report['open_seconds']:.1f} s",
        "first prompt": f"{report['first_seconds']:.1f} s",
        "further prompts, median": f"{report['median_seconds']:.1f} s",
        "peak resident memory": f"{report['peak_bytes'] / 2**30:.2f} GiB",
        "  of mapped files, afterwards": f"{report['file_bytes'] / 2**30:.2f} GiB",
        "  of the process itself, afterwards": f"{report['own_bytes'] / 2**30:.2f} GiB",
        "load average before, after": f"{report['load average']['before']}, {report['load average']['after']}",
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())


if __name__ == "__main__":
    sys.exit(main())
