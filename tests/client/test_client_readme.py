"""The client's README: its examples run, and its tables match the code."""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path

import pid_client
from pid_client import Options, PidError, ResponseError, frames
from tests.server.conftest import Running

README = (Path(__file__).parents[2] / "client/README.md").read_text()
EXAMPLES = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))


def run_examples(url: str, folder: Path) -> str:
    """Run all examples of the README in turn in a folder; return what they print."""
    code = EXAMPLES
    for old, new in {"http://127.0.0.1:8000": url, "16, 16, 16": "16, 8, 8"}.items():
        assert old in code
        code = code.replace(old, new)
    output, before = io.StringIO(), Path.cwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(output):
            exec(compile(code, "client/README.md", "exec"), {})  # noqa: S102
    finally:
        os.chdir(before)
    return output.getvalue()


def test_examples_run(flux: Running, tmp_path: Path):
    output = run_examples(flux.url, tmp_path)
    assert "[0, 1, 2, 3]" in output
    assert "Error" not in output
    assert {path.name for path in tmp_path.iterdir()} == {"image.png", *(f"image-{index}.png" for index in range(3))}


def test_every_error_is_listed():
    listed = re.findall(r"^\| `(\w+Error)` \|", README, re.MULTILINE)
    raised = {name for name in vars(pid_client) if name.endswith("Error")} - {"PidError", "ResponseError"}
    assert set(listed) == raised
    assert all(issubclass(getattr(pid_client, name), PidError) for name in listed)
    assert [issubclass(getattr(pid_client, name), ResponseError) for name in listed] == [True] * 5 + [False] * 2


def test_every_option_is_named():
    assert {name for name in Options.__annotations__ if f"`{name}`" not in README} == set()


def test_every_conversion_is_listed():
    listed = re.search(r"^\| function \|.*?\n\n", README, re.DOTALL | re.MULTILINE)
    assert listed is not None
    functions = {name for name, value in vars(frames).items() if getattr(value, "__module__", "") == frames.__name__}
    public = {name for name in functions if not name.startswith("_") and name[0].islower()}
    assert set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`[^|]*) \|", listed[0], re.MULTILINE)))) == public
