"""Compile the fake CUDA device: `python -m tests.fakecuda.build DIRECTORY`.

This must be the Python of a CUDA build of PyTorch, whose packages contain the headers.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

SOURCES = Path(__file__).parent / "src"
LIBRARY = "libfakecuda.so"
ALIASES = ("libcuda.so", "libcuda.so.1", "libnvidia-ml.so.1")  # names under which it is opened at run time

OPTIONS = ("-O1", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")

IMPORTERS = ("libc10_cuda.so", "libcaffe2_nvrtc.so", "libtorch_cuda.so", "libtorch_python.so")
FAKED = re.compile(r"(__cuda|cuda|cublas|cudnn|nvrtc|cu(?!File))[A-Z]\w*")
REAL = re.compile(r"\w+Get\w*Error(Name|String)|cublasGetStatus(Name|String)")  # texts, which need no device
MISSING = """\
// Generated: the CUDA functions that this PyTorch imports and the fake does not have.
namespace fakecuda {
[[noreturn]] void missing(const char* function);
}
#define MISSING(name) \\
  extern "C" __attribute__((visibility("default"))) void name() { fakecuda::missing(#name); }
"""


class BuildError(Exception):
    """The fake cannot be built with this Python."""


def packages() -> Path:
    """Return the site-packages of a CUDA build of PyTorch, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError(f"{sys.executable} has no PyTorch; set REHEARSE_PYTHON, see tests/fakecuda/README.md.")
    root = Path(spec.origin).parents[1]
    if not (root / "torch" / "lib" / "libtorch_cuda.so").exists():
        version = importlib.metadata.version("torch")
        raise BuildError(
            f"PyTorch {version} of {sys.executable} is not a CUDA build; "
            "set REHEARSE_PYTHON, see tests/fakecuda/README.md."
        )
    return root


def symbols(*files: Path, options: tuple[str, ...]) -> set[str]:
    """Return the names that nm lists for object files or libraries."""
    command = ["nm", "--format=just-symbols", *options, *map(str, files)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {line.partition("@")[0] for line in output.splitlines()}


def compile_objects(root: Path, sources: list[Path], directory: Path) -> list[Path]:
    """Compile `sources` with the headers in the packages of PyTorch; return the object files in `directory`."""
    include = [f"-I{path.resolve()}" for path in (SOURCES, *sorted((root / "nvidia").glob("*/include")))]
    # The wheels of NVIDIA lack crt/, which Triton's copy of the headers has.
    include += ["-idirafter", str(root / "triton" / "backends" / "nvidia" / "include")]
    run("g++", "-c", *OPTIONS, *include, *(str(source.resolve()) for source in sources), directory=directory)
    return [directory / f"{source.stem}.o" for source in sources]


def run(*command: str, directory: Path) -> None:
    """Run a command in `directory`. Raises BuildError if it fails."""
    if subprocess.run(command, cwd=directory, check=False).returncode != 0:
        raise BuildError(f"{command[0]} failed, see above.")


def build(directory: Path) -> Path:
    """Compile into `directory` and return the library. Raises BuildError."""
    root = packages()
    for tool in ("g++", "nm"):
        if shutil.which(tool) is None:
            raise BuildError(f"{tool} is not installed; the fake CUDA device needs g++ and binutils.")
    directory.mkdir(parents=True, exist_ok=True)
    objects = compile_objects(root, sorted(SOURCES.glob("*.cpp")), directory)
    importers = (root / "torch" / "lib" / name for name in IMPORTERS)
    imported = symbols(*importers, options=("--dynamic", "--undefined-only"))
    absent = {name for name in imported if FAKED.fullmatch(name) and not REAL.fullmatch(name)}
    absent -= symbols(*objects, options=("--extern-only", "--defined-only"))
    missing = directory / "missing.cpp"
    missing.write_text(MISSING + "\n".join(f"MISSING({name})" for name in sorted(absent)) + "\n")
    objects += compile_objects(root, [missing], directory)
    run("g++", "-shared", "-o", LIBRARY, *(path.name for path in objects), "-ldl", directory=directory)
    for alias in ALIASES:
        (directory / alias).unlink(missing_ok=True)
        (directory / alias).symlink_to(LIBRARY)
    return directory / LIBRARY


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        build(Path(sys.argv[1]))
    except BuildError as error:
        print(f"fakecuda: {error}", file=sys.stderr)
        sys.exit(2)
