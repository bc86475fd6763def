"""Everything worth knowing of a GPU that decodes, in under eight minutes.

python -m engines.benchmark.gpu_check --out DIR

Checks that it computes what it should, then measures: precisions, sizes, batches, memory, attention kernels, the
published way, the floor, TensorRT where it is installed, and where a step's time goes. Needs a checkout, and nothing
beyond torch, numpy, safetensors and pydantic; no network. Writes gpu_check.json and gpu_check.md, anew after each part.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch

from engines.benchmark.gpu_check import checks, report, speed
from engines.benchmark.gpu_check import kernels as profile
from engines.benchmark.gpu_check.report import Result
from engines.benchmark.gpu_check.setting import Part, Row, Setting
from engines.errors import ConfigError, PidError

PARTS = (
    Part("machine", "The machine", 20, speed.machine),
    Part("contract", "The runtimes' contract, on a toy network", 20, checks.contract),
    Part("parity", "Against the published network, relative errors", 20, checks.published),
    Part("attention", "Attention kernels, bf16", 20, speed.attention, only_on_cuda=True),
    Part("bf16", "Decoding in bf16, CUDA graphs, without torch.compile", 75, speed.decode_bf16),
    Part("fp8", "Decoding in FP8, CUDA graphs, without torch.compile", 75, speed.decode_fp8),
    Part("profile", "The slowest kernels of a step", 30, profile.kernels),
    Part("published", "Against the published way, both without torch.compile", 40, speed.published_way),
    Part("tensorrt", "TensorRT", 30, speed.tensorrt),
    Part("compiled", "Decoding with torch.compile", 80, speed.compiled, only_on_cuda=True),
    Part(
        "published-compiled", "The published way, with torch.compile", 45, speed.published_compiled, only_on_cuda=True
    ),
)
BUDGET = sum(part.share for part in PARTS)  # seconds


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        setting = _setting(arguments)
        if arguments.child:
            name, found = arguments.child
            return _child(name, Path(found), setting)
        return check(arguments, setting)
    except PidError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"gpu_check: interrupted; what was found before is in {arguments.out}", file=sys.stderr)
        return 130


def check(arguments: argparse.Namespace, setting: Setting) -> int:
    """Run the parts one after the other and write what they found. 1 if something failed, else 0."""
    out: Path = arguments.out
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be made: {error.strerror}.") from error
    began = time.monotonic()
    header = {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "network": f"{setting.description.name}, random weights",
    }
    if setting.small:
        header["toy"] = f"network and sizes are toys, on {setting.device}: this shows that all of it runs, nothing else"
    results: dict[str, Result] = {}
    allowed = 0.0
    parts = [part for part in PARTS if not arguments.parts or part.name in arguments.parts]
    for part in parts:
        allowed += part.share * arguments.seconds / BUDGET
        seconds = allowed - (time.monotonic() - began)
        _say(f"{part.title} …")
        run = _in_process if arguments.in_process else _isolated
        result = run(part, setting, seconds, arguments) if seconds > 0 else Result("out of time", 0)
        results[part.name] = result
        _say(f"  {report.summary(result)}")
        header["seconds"] = f"{time.monotonic() - began:.0f}"
        _write(out, header, results, parts)
    print(out / "gpu_check.md")
    return int(any(result.status == "failed" for result in results.values()))


def _isolated(part: Part, setting: Setting, seconds: float, arguments: argparse.Namespace) -> Result:
    """In a process of its own: what breaks the device, or never ends, costs the other parts nothing."""
    log = arguments.out / f"{part.name}.log"
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, log.open("w") as output:
        found = Path(folder) / "rows"
        found.touch()
        command = [sys.executable, "-m", "engines.benchmark.gpu_check", "--out", str(arguments.out)]
        command += ["--child", part.name, str(found), "--device", str(setting.device), "--seconds", str(seconds)]
        command += ["--small"] if setting.small else []
        command += ["--bundle", str(setting.bundle)] if setting.bundle else []
        # With what it starts itself, such as the compiler's workers, in a group that can be ended together.
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)  # noqa: S603
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        rows: list[Row] = [json.loads(line) for line in found.read_text().splitlines() if line.endswith("}")]
    taken = time.monotonic() - began
    if code is None:
        return Result("out of time", taken, rows)
    if code:
        rows.append({"failed": f"its process ended with {code}, see {log.name}"})
    result = Result.of(rows, taken)
    if result.status != "failed":
        log.unlink()
    return result


def _in_process(part: Part, setting: Setting, seconds: float, arguments: argparse.Namespace) -> Result:
    began = time.monotonic()
    rows: list[Row] = []
    _run(part, Setting(setting.device, setting.small, setting.bundle, seconds), rows.append)
    return Result.of(rows, time.monotonic() - began)


def _child(name: str, found: Path, setting: Setting) -> int:
    part = next(part for part in PARTS if part.name == name)
    with found.open("a", buffering=1) as file:  # a line at a time: what is written stays, whatever happens
        _run(part, setting, lambda row: print(json.dumps(row), file=file))
    return 0


def _run(part: Part, setting: Setting, write: Callable[[Row], object]) -> None:
    if part.only_on_cuda and setting.device.type != "cuda":
        write({"skipped": f"{part.title} is measured on CUDA only"})
        return
    try:
        for row in part.run(setting):
            write(row)
    except PidError as error:
        cause = f" ({str(error.__cause__).splitlines()[0]})" if str(error.__cause__ or "") else ""
        write({"failed": f"{error}{cause}"})
    except Exception as error:  # whatever it is, it is a finding
        traceback.print_exc()
        write({"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"})


def _setting(arguments: argparse.Namespace) -> Setting:
    device = torch.device(arguments.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", 0)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("PyTorch sees no CUDA device here; --device cpu --small runs everything at toy size.")
    if device.type != "cuda" and not arguments.small:
        raise ConfigError(f"Full-size networks take hours on {device}; say --small for toys.")
    torch.manual_seed(0)
    return Setting(device, arguments.small, arguments.bundle, arguments.seconds)


def _write(out: Path, header: dict[str, str], results: dict[str, Result], parts: Sequence[Part]) -> None:
    whole = {**header, "parts": {name: asdict(result) for name, result in results.items()}}
    (out / "gpu_check.json").write_text(json.dumps(whole, indent=2) + "\n")
    (out / "gpu_check.md").write_text(report.render(header, parts, results))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m engines.benchmark.gpu_check", description=(__doc__ or "").split("\n")[0]
    )
    add, names = parser.add_argument, [part.name for part in PARTS]
    add("--out", type=Path, required=True, metavar="DIR", help="folder for gpu_check.json and gpu_check.md")
    add("--device", default="cuda", help="default cuda, the first; cpu for toys")
    add("--small", action="store_true", help="toy network and sizes, to see that everything runs")
    add("--bundle", type=Path, metavar="DIR", help="a bundle of TensorRT engines for this GPU, to be timed too")
    add("--parts", nargs="+", metavar="PART", choices=names, help=f"these alone, of {', '.join(names)}")
    add("--seconds", type=float, default=BUDGET, help=f"for all parts (default {BUDGET:.0f}); the rest is left out")
    add("--in-process", action="store_true", help="without a process for each part, and so without a limit on its time")
    add("--child", nargs=2, help=argparse.SUPPRESS)
    return parser


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
