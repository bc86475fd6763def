"""Images that the project does not build are pinned by digest, so that a moved tag changes nothing."""

from __future__ import annotations

import re

import yaml

from tests.programs import ROOT

PINNED = re.compile(r"[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}")  # the tag is for readers


def test_every_base_image_of_the_dockerfile_is_pinned():
    text = (ROOT / "Dockerfile").read_text()
    defaults = dict(re.findall(r"^ARG (\w+)=(\S+)$", text, re.MULTILINE))
    stages = set(re.findall(r"^FROM \S+ AS (\S+)$", text, re.MULTILINE))
    used = re.findall(r"^FROM (?:--\S+ )*(\S+)", text, re.MULTILINE) + re.findall(r"--from=(\S+)", text)
    external = {re.sub(r"\$\{(\w+)\}", lambda match: defaults[match[1]], name) for name in used if name not in stages}
    assert external
    assert all(PINNED.fullmatch(image) for image in external), external


def test_every_image_of_compose_that_it_does_not_build_is_pinned():
    services = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"].values()
    built = {service["image"] for service in services if "build" in service}
    external = {service["image"] for service in services} - built
    assert len(external) == 2
    assert all(PINNED.fullmatch(image) for image in external), external
