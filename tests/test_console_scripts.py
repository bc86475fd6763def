"""The console scripts that `pip install .` provides."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


def run(script: str, *arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run a script as the file does that pip writes for it, with some code before its call."""
    module, _, function = SCRIPTS[script].partition(":")
    lines = ["import sys", f"from {module} import {function}", f"sys.argv[0] = '/usr/bin/{script}'"]
    code = "\n".join([*lines, before, f"sys.exit({function}())"])
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=60
    )


def test_there_is_one_for_each_program():
    assert SCRIPTS.keys() == {"pid-server", "pid-build-engines", "pid-loadtest"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_its_messages_have_its_name(script: str):
    shown = run(script, "--help")
    assert (shown.returncode, shown.stdout.split()[:2]) == (0, ["usage:", script])
    wrong = run(script, "--unknown-option")
    assert (wrong.returncode, wrong.stderr.splitlines()[-1].startswith(f"{script}: ")) == (2, True)


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["-m", "server"], "python -m server"),
        (["build_engines.py"], "build_engines.py"),
        (["-m", "loadtest"], "python -m loadtest"),
    ],
)
def test_the_other_commands_keep_their_names(command: list[str], name: str):
    shown = subprocess.run([sys.executable, *command, "--help"], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert shown.stdout.startswith(f"usage: {name} ")


def test_threads_of_pytorch_sleep_while_they_wait_in_a_server_started_by_its_script():
    """PyTorch reads the variable when it is imported."""
    before = (
        "import os\n"
        "from server import __main__\n"
        "__main__.main = lambda _: print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules, flush=True) or 3"
    )
    done = run("pid-server", before=before)
    assert (done.returncode, done.stdout.split()) == (3, ["PASSIVE", "False"])
