"""The bundles of the settings: names, slots, and links that move."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from engines.bundle import write_bundle
from engines.errors import BundleError, ConfigError
from server.bundles import Bundles
from server.settings import Settings
from tests.engines.test_bundle import FILES
from tests.tiny import manifest


def write(path: Path, **changes: object) -> Path:
    return write_bundle(path, manifest(**changes), FILES).path


def point(link: Path, target: Path) -> None:
    """Point a symbolic link to `target` atomically, as deployments do."""
    link.with_suffix(".new").symlink_to(target)
    link.with_suffix(".new").rename(link)


@pytest.fixture
def link(tmp_path: Path) -> Path:
    """A link to the first of two bundles."""
    path = tmp_path / "current"
    point(path, write(tmp_path / "first", decoder="first"))
    write(tmp_path / "second", decoder="second")
    return path


def test_a_bundle_without_a_name_has_that_of_its_model(link: Path):
    (name,) = Bundles(Settings(bundle=link)).find_all()
    assert name == "first"
    assert list(Bundles(Settings(bundle=f"flux={link},sdxl={link}")).find_all()) == ["flux", "sdxl"]


def test_a_model_that_cannot_be_a_name_needs_one(tmp_path: Path):
    path = write(tmp_path / "bundle", decoder="my model/2")
    with pytest.raises(ConfigError, match="choose one with --bundle NAME="):
        Bundles(Settings(bundle=path)).find_all()
    assert list(Bundles(Settings(bundle=f"mine={path}")).find_all()) == ["mine"]


def test_a_link_that_is_pointed_elsewhere_is_noticed_once(link: Path):
    bundles = Bundles(Settings(bundle=f"flux={link}"))
    first = bundles.find_all()["flux"]
    assert not bundles.is_moved("flux")
    point(link, link.with_name("second"))
    assert bundles.is_moved("flux")
    second = bundles.find("flux")
    assert not bundles.is_moved("flux")
    assert (second.bundle.manifest.decoder, str(second)) == ("second", str(link.with_name("second")))
    assert second.identity != first.identity


def test_a_link_to_something_unusable_is_an_error_only_once(link: Path):
    bundles = Bundles(Settings(bundle=f"flux={link}"))
    bundles.find_all()
    point(link, link.with_name("nothing"))
    assert bundles.is_moved("flux")
    with pytest.raises(BundleError, match="There is no bundle"):
        bundles.find("flux")
    assert not bundles.is_moved("flux")


def test_what_was_found_does_not_follow_the_link(link: Path):
    found = Bundles(Settings(bundle=f"flux={link}")).find_all()["flux"]
    point(link, link.with_name("second"))
    (runtime,) = found.open().values()
    assert runtime.info.decoder == "first"


def test_bundles_with_the_same_content_are_the_same(link: Path, tmp_path: Path):
    bundles = Bundles(Settings(bundle=f"flux={link}"))
    first = bundles.find_all()["flux"]
    point(link, shutil.copytree(tmp_path / "first", tmp_path / "copy"))
    assert bundles.find("flux").identity == first.identity


def test_a_bundle_that_was_replaced_in_its_directory_differs(tmp_path: Path):
    path = write(tmp_path / "bundle", decoder="first")
    bundles = Bundles(Settings(bundle=f"flux={path}"))
    first = bundles.find_all()["flux"]
    write_bundle(path, manifest(decoder="second"), FILES, replace=True)
    assert bundles.find("flux").identity != first.identity


@pytest.mark.parametrize(
    ("settings", "slots"), [({}, 5), ({"max_batch": 2}, 3), ({"device_slots": 7}, 7)], ids=["default", "batch", "slots"]
)
def test_all_decoders_have_the_slots_of_the_largest_batch(tmp_path: Path, settings: dict[str, int], slots: int):
    small, large = write(tmp_path / "small", max_batch=1), write(tmp_path / "large", max_batch=4)
    bundles = Bundles(Settings(bundle=f"small={small},large={large}", **settings))
    found = bundles.find_all()
    assert [each.open()["cpu"].info.slots for each in found.values()] == [slots, slots]
    assert bundles.find("small").open()["cpu"].info.slots == slots


def test_a_later_bundle_has_no_larger_batches_than_slots(link: Path, tmp_path: Path):
    bundles = Bundles(Settings(bundle=f"flux={link}", device_slots=2))
    bundles.find_all()
    point(link, write(tmp_path / "large", max_batch=4))
    info = bundles.find("flux").open()["cpu"].info
    assert (info.max_batch, info.slots) == (2, 2)
