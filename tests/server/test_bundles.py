"""The bundles of the settings: names, slots, and links that move."""

from __future__ import annotations

import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engines.bundle import write_bundle
from engines.errors import BundleError, ConfigError, DecodeError, DeviceMemoryError
from engines.runtime.protocol import Sample
from engines.size import Size
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


def test_the_decoders_of_the_start_share_buffers_and_later_ones_do_not(tmp_path: Path):
    paths = [write(tmp_path / name, decoder=name) for name in ("first", "second")]
    bundles = Bundles(Settings(bundle=f"flux={paths[0]},sdxl={paths[1]}"))
    found = bundles.find_all()
    flux, sdxl = (each.open()["cpu"] for each in found.values())
    later, again = bundles.find("flux").open()["cpu"], found["flux"].alone().open()["cpu"]
    for runtime in (flux, sdxl, later, again):
        runtime.warm_up()
    sample = Sample(torch.zeros(16, 2, 3), Size(64, 96))
    slots = [runtime.start(sample) for runtime in (flux, sdxl, flux)]
    assert len(set(slots)) == 3
    with pytest.raises(DecodeError, match="All slots of the device"):
        sdxl.start(sample)
    for runtime in (later, again):
        assert runtime.start(sample) == 2


def test_bundles_keep_no_buffers_after_their_runtimes(tmp_path: Path):
    found = Bundles(Settings(bundle=write(tmp_path / "bundle"))).find_all()
    (runtime,) = found["tiny"].open().values()
    runtime.warm_up()
    assert found["tiny"].shared is not None
    buffers = weakref.ref(found["tiny"].shared.of("cpu"))
    runtime.close()
    del runtime
    assert buffers() is None


class TestMemory:
    """What the devices have free, here 10 GB, or as much as a test says."""

    def bundles(self, tmp_path: Path, free: int, **settings: object) -> Bundles:
        paths = [write(tmp_path / name, decoder=name) for name in ("first", "second")]
        chosen = Settings(bundle=f"flux={paths[0]},sdxl={paths[1]}", **settings)  # type: ignore[arg-type]
        return Bundles(chosen, lambda device: free)

    def test_the_plan_of_the_start_is_logged(self, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        with caplog.at_level("INFO", "server.bundles"):
            self.bundles(tmp_path, 10**10).find_all()
        (message,) = caplog.messages
        assert message.startswith(
            "memory planned on cpu: weights of flux 0.00 GB + weights of sdxl 0.00 GB + slots 0.00 GB"
        )

    def test_too_little_memory_is_an_error_before_anything_is_loaded(self, tmp_path: Path):
        (plan,) = self.bundles(tmp_path, 10**10).find_all()["flux"].shared.plans.values()  # type: ignore[union-attr]
        assert self.bundles(tmp_path / "same", plan.nbytes).find_all()
        bundles = self.bundles(tmp_path / "less", plan.nbytes - 1)
        with pytest.raises(ConfigError, match=r"of free memory.* weights of sdxl .*Use fewer decoders"):
            bundles.find_all()

    def test_only_weights_that_are_on_a_device_at_once_must_fit(self, tmp_path: Path):
        found = self.bundles(tmp_path, 10**10, resident=1).find_all()
        (plan,) = found["flux"].shared.plans.values()  # type: ignore[union-attr]
        weights = [item.nbytes for item in plan.items if item.part == "weights"]
        assert plan.nbytes == sum(item.nbytes for item in plan.items) - min(weights)
        assert self.bundles(tmp_path / "same", plan.nbytes, resident=1).find_all()
        assert [list(bundle.pools) for bundle in found.values()] == [["cpu"], ["cpu"]]
        assert not self.bundles(tmp_path / "both", 10**10, resident=2).find_all()["flux"].pools

    def test_what_is_freed_counts_before_anything_is_unloaded(self, tmp_path: Path):
        bundle = self.bundles(tmp_path, 10**10).find_all()["flux"]
        needed = bundle.alone().memory()["cpu"].nbytes
        bundle = replace(bundle, free_memory=lambda device: needed - 10)
        assert bundle.lack({"cpu": 10}) is None
        assert "weights of flux" in (bundle.lack({"cpu": 9}) or "")

    def test_a_later_bundle_must_fit_beside_the_others(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        free = {"cpu": 10**10}
        path = write(tmp_path / "bundle")
        bundles = Bundles(Settings(bundle=f"flux={path}"), lambda device: free[device])
        found = bundles.find_all()
        later = bundles.find("flux")
        free["cpu"] = later.memory()["cpu"].nbytes - 1
        monkeypatch.setattr("server.bundles.open_runtime", lambda *arguments: pytest.fail("it was loaded"))
        for candidate in (later, found["flux"].alone()):
            with pytest.raises(DeviceMemoryError, match=r"of free memory.* weights of flux"):
                candidate.open()

    def test_shared_buffers_have_no_decoder_and_those_of_a_later_bundle_do(self, tmp_path: Path):
        bundles = self.bundles(tmp_path, 10**10)
        found = bundles.find_all()
        parts = [(item.part, item.decoder) for item in found["flux"].memory()["cpu"].items]
        assert parts == [("weights", "flux"), ("slots", None), ("other", None)]
        assert [item.decoder for item in bundles.find("sdxl").memory()["cpu"].items] == ["sdxl"] * 3

    def test_the_plan_is_that_of_the_open_runtimes(self, tmp_path: Path):
        bundles = self.bundles(tmp_path, 10**10, max_batch=1, device_slots=2, max_pixels=128 * 96)
        found = bundles.find_all()
        shared, runtimes = found["flux"].shared, [each.open() for each in found.values()]
        assert shared is not None
        assert len(runtimes) == 2
        planned = {item.part: item.nbytes for item in shared.plans["cpu"].items if item.part != "weights"}
        assert shared.of("cpu").needs.device_bytes() == planned
        assert planned["tiles"] > 2 * 24 * 128 * 96
