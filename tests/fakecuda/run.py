"""Run a program on the fake CUDA device: `python -m tests.fakecuda.run DIRECTORY PROGRAM [ARGUMENTS]`.

`DIRECTORY` is that of `tests.fakecuda.build`. Child processes of the program run on the fake device as well.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.fakecuda.build import LIBRARY

SITE = Path(__file__).parent / "site"  # contains sitecustomize.py


def environment(directory: Path) -> dict[str, str]:
    """Return the environment variables that put the fake device in front of CUDA."""
    library = directory.resolve() / LIBRARY
    if not library.exists():
        raise SystemExit(f"{library} does not exist; run `python -m tests.fakecuda.build {directory}` first.")
    variables = {"LD_PRELOAD": str(library), "TRITON_LIBCUDA_PATH": str(library.parent)}
    for name, first in (("LD_LIBRARY_PATH", library.parent), ("PYTHONPATH", SITE.resolve())):
        variables[name] = os.pathsep.join(filter(None, (str(first), os.environ.get(name))))
    return variables


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    program = sys.argv[2:]
    os.execvpe(program[0], program, {**os.environ, **environment(Path(sys.argv[1]))})  # noqa: S606
