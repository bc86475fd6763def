"""Init containers of the Helm chart, which write bundles before a server starts: their commands are run."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path

import pytest

import build_engines
from docker import fetch_bundle
from engines.bundle import open_bundle
from engines.compile.planning.paths import SUFFIX
from server.command_line import read_settings
from tests.operations.helm_values import SOURCES, values
from tests.operations.kubernetes_objects import Object, environment, manifest, server_pod, template

pytestmark = pytest.mark.operate

GPUS = ("rtx5090", "h200", "gb200")


def builder(gpu: str) -> Object:
    """Return the init container that builds the bundle in a manifest."""
    (container,) = server_pod(manifest(gpu))["initContainers"]
    return container


class Machine:
    """A stand-in for the container: python prints its arguments, or the version of a package."""

    def __init__(self, folder: Path, container: Object) -> None:
        self.bundle = folder / "a/b"
        (checkpoints,) = [mount for mount in container["volumeMounts"] if mount.get("readOnly")]
        arguments = [argument.replace(checkpoints["mountPath"], str(folder)) for argument in container["args"]]
        self.command = [*container["command"], *arguments]
        inputs = [value for value in (a.partition("=")[2] for a in arguments[2:]) if value.startswith("/")]
        assert len(inputs) == 2  # checkpoint and empty caption
        for path in inputs:
            Path(path).touch()
        (folder / "python").write_text(
            '#!/bin/sh\n[ "$1" = -c ] && exec echo "$FOUND"\nprintf "%s\\n" "$@"\n'
            f'[ -z "$HOLD" ] || while [ ! -e {folder}/go ]; do sleep 0.05; done; [ -z "$HOLD" ] || touch "$HOLD"\n'
        )
        (folder / "python").chmod(0o755)
        self.variables = {"BUNDLE": str(self.bundle), "PATH": f"{folder}:{os.environ['PATH']}", "HOLD": ""}

    def start(self, found: str, hold: str = "") -> subprocess.Popen[str]:
        variables = {**self.variables, "FOUND": found, "HOLD": hold}
        return subprocess.Popen(self.command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def run(self, found: str) -> list[str]:
        process = self.start(found)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        return output.split()


@pytest.mark.parametrize("gpu", GPUS)
class TestBuild:
    def expected(self, gpu: str) -> tuple[str, str]:
        """Return the TensorRT package and version in the path of the bundle."""
        (path,) = read_settings([], environment(manifest(gpu))).bundle.values()
        package, number, _ = path.name.rsplit("-", 2)
        return package, number

    def test_it_builds_then_resumes_then_does_nothing(
        self, gpu: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ):
        machine = Machine(tmp_path, builder(gpu))
        _, found = self.expected(gpu)
        script, *flags = machine.run(found)
        assert script == "build_engines.py"
        assert build_engines.main([*flags, "--dry-run"]) == 0
        plan = capsys.readouterr().out
        assert str(machine.bundle) in plan
        assert gpu in plan.lower().replace(" ", "")
        unfinished = machine.bundle.with_name("b" + SUFFIX)
        unfinished.mkdir(exist_ok=True)
        (unfinished / "build.json").touch()
        assert machine.run(found) == ["build_engines.py", "--resume", str(unfinished)]
        machine.bundle.mkdir()
        (machine.bundle / "manifest.json").touch()
        assert machine.run(found) == [str(machine.bundle), "already", "exists."]

    def test_one_pod_builds_while_others_wait(self, gpu: str, tmp_path: Path):
        machine = Machine(tmp_path, builder(gpu))
        _, found = self.expected(gpu)
        manifest_file = machine.bundle / "manifest.json"
        first = machine.start(found, hold=str(manifest_file))
        assert first.stdout
        assert first.stdout.readline() == "build_engines.py\n"  # it holds the lock
        machine.bundle.mkdir()
        second = machine.start(found)
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(0.5)
        (tmp_path / "go").touch()
        assert first.wait(60) == 0
        assert second.communicate(timeout=60)[0] == f"{machine.bundle} already exists.\n"
        first.communicate()

    def test_another_tensorrt_version_is_rejected_before_anything_else(self, gpu: str, tmp_path: Path):
        machine = Machine(tmp_path, builder(gpu))
        package, expected = self.expected(gpu)
        process = machine.start("0.1")
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 2
        assert f"contains {package} 0.1, but the chart expects {expected}" in errors
        assert not machine.bundle.parent.exists()

    def test_the_version_is_that_of_the_installed_package(self, gpu: str):
        code = next(line for line in builder(gpu)["args"][0].splitlines() if line.startswith("found="))
        package, _ = self.expected(gpu)
        command = f"{code.replace(package, 'numpy').replace('$(python', f'$({sys.executable}')}; echo $found"
        completed = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)  # noqa: S607
        assert completed.stdout.strip() == version("numpy")

    def test_it_runs_on_the_gpu_of_the_server_and_needs_no_other_one(self, gpu: str):
        (server,) = server_pod(manifest(gpu))["containers"]
        for container in (builder(gpu), server):
            assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert {x["kind"] for x in manifest(gpu)}.isdisjoint({"Job", "Pod"})


class TestBundlePath:
    @pytest.mark.parametrize(("gpu", "beginning"), [("none", "cpu-"), ("cuda", "cuda-")])
    def test_bundles_without_engines_need_no_tensorrt(self, gpu: str, beginning: str):
        (build,) = server_pod(template(values("build", {"gpu": {"type": gpu}})))["initContainers"]
        (variable,) = build["env"]
        assert Path(variable["value"]).name.startswith(beginning)
        assert f"--target={beginning[:-1]}" in build["args"]
        assert "tensorrt" not in build["args"][0]

    def test_another_source_has_another_path(self):
        changes: list[Object] = [
            {},
            {"decoder": "sdxl-2kto4k"},
            {"claim": "other"},
            {"checkpoint": "b"},
            {"emptyCaption": "c"},
            {"options": ["--precision=fp8"]},
        ]
        parts = [{"bundles": {"flux": {"build": change}}} for change in changes]
        paths = [environment(template(values("build", part)))["PID_BUNDLE"] for part in (*parts, {"replicas": 3})]
        assert len(set(paths)) == len(changes)
        assert paths[-1] == paths[0]

    def test_several_builds_share_a_claim(self):
        build = {"decoder": "sdxl-2kto4k", "claim": "shared", "checkpoint": "b"}
        objects = template(values("build", {"bundles": {"sdxl": {"build": build}}}))
        builds = server_pod(objects)["initContainers"]
        outputs = [Path(variable["value"]) for container in builds for variable in container["env"]]
        assert sorted(outputs) == sorted(read_settings([], environment(objects)).bundle.values())


class TestRepetition:
    """Init containers can run again, for example after the node restarts."""

    def test_the_demo_is_built_again(self, tmp_path: Path):
        (container,) = server_pod(template(values("demo")))["initContainers"]
        arguments = [argument.replace("/bundles", str(tmp_path)) for argument in container["command"][2:]]
        for _ in range(2):
            assert build_engines.main(arguments) == 0
            open_bundle(tmp_path / "flux")

    def test_an_archive_is_not_fetched_again(self, tmp_path: Path):
        bundle = tmp_path / "flux"
        assert build_engines.main(["--decoder", "dct-demo", "--target", "cpu", "--output", str(bundle)]) == 0
        with tarfile.open(tmp_path / "flux.tar", "w") as archive:
            archive.add(bundle, "flux")
        digest = hashlib.sha256((tmp_path / "flux.tar").read_bytes()).hexdigest()
        part = {"bundles": {"flux": {"http": {"sha256": digest}}}}
        (container,) = server_pod(template(values("http", part)))["initContainers"]
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        local = {SOURCES["http"]["http"]["url"]: f"http://127.0.0.1:{server.server_port}/flux.tar"}
        arguments = [local.get(a, a).replace("/bundles", str(tmp_path / "pod")) for a in container["command"][2:]]
        (tmp_path / "pod").mkdir()
        try:
            assert fetch_bundle.main(arguments) == 0
        finally:
            server.shutdown()
            server.server_close()
        assert fetch_bundle.main(arguments) == 0  # without the server
        open_bundle(tmp_path / "pod/flux")
