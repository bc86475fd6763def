"""Everything that the documents name exists: files, anchors, modules, flags, variables, make targets and tests."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import runpy
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

from server.settings import Settings

ROOT = Path(__file__).parent.parent
PACKAGES = ("client", "docker", "docs", "engines", "integrations", "loadtest", "server", "tests")
FOREIGN_FLAGS = {"--target", "--profile", "--time", "--tmpfs", "--no-deps", "--compressed"}  # of docker, pip and curl
FORWARDS_FLAGS = {"loadtest.simulated_server": "server"}  # programs that pass unknown flags to another one


def markdown_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith(".") and path.name != "build":
            yield from markdown_files(path)
        elif path.suffix == ".md":
            yield path


DOCUMENTS = {str(path.relative_to(ROOT)): path.read_text() for path in markdown_files(ROOT)}
del DOCUMENTS["CHANGELOG.md"]  # names what was renamed or removed
MAKEFILE = (ROOT / "Makefile").read_text()
TESTS = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))

FENCE = re.compile(r"^( *)```.*?^\1```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"python (?:-m (?P<module>[\w.]+)|(?P<script>[\w/]+\.py))(?P<arguments>[^`\n#]*)")


def prose(text: str) -> str:
    """Return a document without its code blocks."""
    return FENCE.sub("", text)


def inline_code(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", prose(text))


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE):
        anchor = re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        again = sum(re.fullmatch(rf"{re.escape(anchor)}(-\d+)?", earlier) is not None for earlier in found)
        found.append(f"{anchor}-{again}" if again else anchor)
    return set(found)


def commands(text: str) -> Iterator[tuple[str, set[str]]]:
    """Yield each documented Python program, a module or a script, with the flags it is called with."""
    for match in COMMAND.finditer(re.sub(r"\\\n\s*", " ", text)):
        yield match["module"] or match["script"], set(re.findall(r"(?<!\S)\[?(--[a-z][a-z-]*)", match["arguments"]))


def source_file(program: str) -> Path | None:
    """Return the file of a program of this project, or None."""
    stem = ROOT / program.removesuffix(".py").replace(".", "/")
    return next((path for path in (stem.with_suffix(".py"), stem / "__main__.py") if path.exists()), None)


PROGRAMS = sorted(
    {
        program
        for text in DOCUMENTS.values()
        for program, flags in commands(text)
        if (source := source_file(program)) and (flags or "ArgumentParser" in source.read_text())
    }
)


def run(program: str) -> None:
    if program.endswith(".py"):
        runpy.run_path(str(ROOT / program), run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__")


@cache
def flags_of(program: str) -> frozenset[str]:
    """Return the flags that `program --help` lists, and those of the program that it forwards flags to."""
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the module may have been imported by another test
        patch.setattr(sys, "argv", [program, "--help"])
        with pytest.raises(SystemExit):
            run(program)
    flags = frozenset(re.findall(r"--[a-z][a-z-]*", output.getvalue()))
    return flags | flags_of(FORWARDS_FLAGS[program]) if program in FORWARDS_FLAGS else flags


@pytest.mark.parametrize("name", DOCUMENTS)
class TestDocument:
    def test_relative_links_and_anchors_resolve(self, name: str):
        for target in re.findall(r"\]\((?!https?:|mailto:)([^)]+)\)", prose(DOCUMENTS[name])):
            path, _, anchor = target.partition("#")
            linked = (ROOT / name).parent / path if path else ROOT / name
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked.read_text()), target

    def test_programs_exist(self, name: str):
        for program, _ in commands(DOCUMENTS[name]):
            exists = source_file(program) or importlib.util.find_spec(program.partition(".")[0])
            assert exists, program

    def test_files_exist(self, name: str):
        for code in inline_code(DOCUMENTS[name]):
            if code.partition("/")[0] in PACKAGES and re.fullmatch(r"[\w./-]+", code) and "/" in code:
                assert (ROOT / code).exists(), code

    def test_flags_exist(self, name: str):
        known = FOREIGN_FLAGS.union(*(flags_of(program) for program in PROGRAMS))
        named = {flag for code in inline_code(DOCUMENTS[name]) for flag in re.findall(r"^--[a-z][a-z-]*", code)}
        assert named <= known

    def test_variables_exist(self, name: str):
        files = [
            *(ROOT / "docker").rglob("*.yaml"),
            *(ROOT / "docker").glob("*.py"),
            *(ROOT / "integrations").rglob("*.py"),
        ]
        used = "\n".join(path.read_text() for path in files)
        for variable in re.findall(r"\bPID_[A-Z_]+\b", DOCUMENTS[name]):
            assert variable.removeprefix("PID_").lower() in Settings.model_fields or variable in used, variable

    def test_make_targets_exist(self, name: str):
        named = re.findall(r"(?:^|`)make ([a-z-]+)", DOCUMENTS[name], re.MULTILINE)
        assert set(named) <= set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))


@pytest.mark.parametrize("program", PROGRAMS)
def test_documented_commands_use_existing_flags(program: str):
    for name, text in DOCUMENTS.items():
        for documented, flags in commands(text):
            assert documented != program or flags <= flags_of(program), name


@pytest.mark.parametrize("name", ["docs/operations.md", "docs/security.md"])
def test_flags_in_documents_for_operators_are_settings_of_the_server(name: str):
    named = {flag for code in inline_code(DOCUMENTS[name]) for flag in re.findall(r"^--[a-z][a-z-]*", code)}
    assert named - FOREIGN_FLAGS <= flags_of("server")


def test_every_test_that_the_threat_table_names_exists():
    named = re.findall(r"`(test_\w+)`", DOCUMENTS["docs/security.md"])
    assert len(named) > 25
    assert not [name for name in named if f"def {name}(" not in TESTS]


def test_the_index_links_every_document():
    linked = re.findall(r"\]\(([\w-]+\.md)\)", DOCUMENTS["docs/README.md"])
    assert {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"} <= set(linked)


def test_the_index_of_decisions_links_every_record():
    linked = re.findall(r"\]\(([\w-]+\.md)\)", DOCUMENTS["docs/decisions/README.md"])
    assert sorted(path.name for path in (ROOT / "docs/decisions").glob("0*.md")) == linked


def test_each_decision_has_the_four_sections():
    for path in (ROOT / "docs/decisions").glob("0*.md"):
        sections = re.findall(r"^## (.+)$", path.read_text(), re.MULTILINE)
        assert sections == ["Context", "Decision", "What was measured", "Consequences"], path.name


@pytest.mark.parametrize("package", ["engines", "server"])
def test_the_architecture_lists_every_module_of_a_package(package: str):
    row = re.search(rf"^\| `{package}/` \| (.+) \|$", DOCUMENTS["docs/architecture.md"], re.MULTILINE)
    assert row
    modules = {path.stem for path in (ROOT / package).glob("*.py")} - {"__init__", "__main__", "gpu_check"}
    assert set(re.findall(r"`(\w+)`", row[1])) == modules


def test_pre_commit_runs_what_make_lint_runs():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    assert recipe is not None
    lint = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe[1].splitlines()]
    assert [hook["entry"] for hook in repository["hooks"]] == lint
