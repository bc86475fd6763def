"""The bundled decoder's training: it starts right, goes on right, and each part of it pulls the way it should."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from engines.bundled import dct
from engines.bundled.decoder import CONFIG, PHOTO
from engines.pid import PidDecoder
from engines.training import flow, linear, measures, photos, student, train
from engines.training.flow import SIGMA_MAX, expected_error
from engines.training.learner import Learner
from engines.training.start import RESIDUAL, hold, regress, start_linear, wire, wired_gate, wired_scale
from engines.training.student import Student, follow
from engines.training.teacher import Teacher, sample


@pytest.fixture(scope="module")
def start() -> PidDecoder:
    torch.manual_seed(0)
    decoder = PidDecoder(CONFIG)
    wire(decoder)
    return decoder


@pytest.fixture
def wired(start: PidDecoder) -> PidDecoder:
    return copy.deepcopy(start)


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def expected(t: float) -> float:
    """Mean square error of the wired velocity where the linear decode misses RESIDUAL."""
    return expected_error(torch.tensor(t), torch.tensor(RESIDUAL**2)).item()


@pytest.mark.parametrize("t", [1.0, 0.999, 0.866, 0.634, 0.342, 0.1, 0.03])
@torch.no_grad()
def test_a_wired_network_weighs_noise_against_the_latent(wired: PidDecoder, image: torch.Tensor, t: float) -> None:
    latent, times = torch.randn(2, dct.CHANNELS, 4, 4), torch.full((2,), t)
    x = flow.diffuse(image, times, torch.randn_like(image))
    velocity = wired.velocity(x, times, flow.condition(wired, latent), 0.0)
    linear = regress(wired, latent, torch.zeros(2))
    wanted = x + wired_gate(times[0]) * ((1 + wired_scale(times[0])) * x - linear)
    assert (velocity - wanted).square().mean() < 0.05 * expected(t)


def test_what_patches_see_of_noise_is_what_the_latent_does_not_tell(wired: PidDecoder) -> None:
    seen = wired.s_embedder.proj.weight[-48:-16].detach()  # [32, 3·256]
    torch.testing.assert_close(seen @ seen.T, torch.eye(32), atol=1e-5, rtol=0)
    told = dct.encode(dct.downscale(seen.view(32, 3, 16, 16)))  # [32, 16, 1, 1]
    assert (torch.tensor(dct.SCALES) * told.flatten(1)).abs().max() < 0.1


@pytest.mark.parametrize("t", [1.0, 0.5, 0.1, 0.03])
def test_the_wired_velocity_is_the_best_linear_one(t: float) -> None:
    time, residual = torch.tensor(t), RESIDUAL * torch.randn(200_000)  # of x0 around the linear decode, here 0
    noise = torch.randn_like(residual)
    x = (1 - time) * residual + time * noise

    def error(gate: float, scale: float) -> float:
        return (x + gate * (1 + scale) * x - (noise - residual)).square().mean().item()

    gate, scale = wired_gate(time).item(), wired_scale(time).item()
    assert error(gate, scale) == pytest.approx(expected(t), rel=0.02)
    assert error(gate, scale) < min(error(gate, scale + 0.1), error(gate, scale - 0.1))


@pytest.fixture
def smooth(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Four pictures to fit a linear decoder to, from fewer crops than usual."""
    monkeypatch.setattr(linear, "BATCHES", 6)
    random = np.random.default_rng(0)
    coarse = [Image.fromarray(random.integers(0, 256, (20, 20, 3), np.uint8)) for _ in range(4)]
    return [np.asarray(image.resize((400, 400), Image.Resampling.BICUBIC)) for image in coarse]


@torch.no_grad()
def test_the_linear_start_is_no_worse_than_bicubic_and_knows_noise(wired: PidDecoder, smooth: list[np.ndarray]) -> None:
    random = np.random.default_rng(0)
    start_linear(wired, smooth, random)
    image = photos.random_crops(smooth, 2, (256, 256), random)
    latent = dct.encode(dct.downscale(image))
    decoded = regress(wired, latent, torch.zeros(2))
    assert measures.psnr(decoded, image) > measures.psnr(measures.bicubic(latent), image)
    noisy = 0.6 * latent + 0.4 * torch.randn_like(latent)
    right, wrong = (measures.psnr(regress(wired, noisy, torch.full((2,), told)), image) for told in (0.4, 0.0))
    assert right > wrong + 3


def test_the_linear_fit_is_the_least_of_its_objective(smooth: list[np.ndarray]) -> None:
    """Errors and, across the borders of patches, their differences: written down as pictures, not as equations."""
    fit = linear._Fit(smooth, np.random.default_rng(0))
    solution = fit.solve()

    def slope(point: torch.Tensor) -> float:
        point.requires_grad_()
        random, total = np.random.default_rng(0), torch.zeros(())
        for _ in range(linear.BATCHES):
            cells, patches = linear._examples(smooth, random)
            error = F.pixel_shuffle((patches - cells @ point).permute(2, 3, 0, 1), 16)
            framed = F.pad(error, (1, 1, 1, 1))  # beyond the picture there is no error
            steps = framed.diff(dim=2)[:, :, ::16], framed.diff(dim=3)[..., ::16]
            total = total + error.square().sum() + linear.BORDER_WEIGHT * sum(step.square().sum() for step in steps)
        return torch.autograd.grad(total, point)[0].norm().item()

    assert slope(solution) < 0.01 * slope(torch.zeros_like(solution))


def test_errors_across_patch_borders_count_more() -> None:
    def error(column: int) -> float:
        step = torch.zeros(1, 3, 64, 64)
        step[..., column:] = 1.0
        return flow.picture_error(step - step.mean()).item()

    assert error(32) > 1.2 * error(31)


def test_more_is_expected_to_be_missed_where_there_is_texture_or_noise(image: torch.Tensor) -> None:
    rough, flat, none = dct.encode(dct.downscale(image)), torch.zeros(2, dct.CHANNELS, 4, 4), torch.zeros(2)
    assert (flow.residual(rough, none) > 20 * flow.residual(flat, none)).all()
    assert (flow.residual(flat, none + 0.4) > flow.residual(rough, none)).all()
    half = torch.cat((rough[..., :2], flat[..., :2]), dim=3)
    steps = flow.pixel_residual(half, none).diff(dim=3).abs()
    assert steps.max() < 0.1 * flow.residual(half, none).max()  # no steps between cells


def test_errors_count_in_proportion_to_what_is_expected() -> None:
    """An error of the size that is expected costs the same in a sky and on a lawn, early and late."""
    losses = []
    for t, residual in ((0.1, 1e-3), (0.1, 1e-1), (0.9, 1e-3), (0.9, 1e-1)):
        time, left_open = torch.full((1,), t), torch.full((1, 1, 64, 64), residual)
        error = expected_error(time, left_open).sqrt() * torch.ones(1, 3, 64, 64)
        losses.append(flow.velocity_loss(error, time, left_open).item())
    assert losses == pytest.approx([1.0] * 4)


def test_noise_and_times_are_of_the_trained_range() -> None:
    torch.manual_seed(0)
    latent, sigma = flow.noised(torch.ones(1000, dct.CHANNELS, 2, 2))
    assert 0 < sigma.max() <= SIGMA_MAX
    assert 0.6 < (sigma == 0).float().mean() < 0.8
    assert torch.equal(latent[sigma == 0], torch.ones_like(latent[sigma == 0]))
    assert (latent[sigma > 0.7] - 1).std() > 0.5
    t = flow.random_times(1000, torch.device("cpu"))
    assert t.min() >= 0.02
    for used in (0.999, 0.866, 0.634, 0.342, 1.0):
        assert 0.03 < (t == used).float().mean() < 0.08


def test_a_teacher_learns_one_picture(wired: PidDecoder, image: torch.Tensor) -> None:
    teacher, smooth = Teacher(wired), F.interpolate(image[..., :8, :8], scale_factor=8, mode="bicubic")
    losses = []
    for i in range(12):
        torch.manual_seed(i % 3)  # the same noise again
        losses += teacher.step(smooth, 1.0).values()
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


@torch.no_grad()
def test_the_teacher_walks_from_noise_to_what_the_latent_tells(wired: PidDecoder) -> None:
    latent, noise = torch.randn(1, dct.CHANNELS, 4, 4), torch.randn(1, 3, 64, 64)
    decoded = sample(wired, latent, noise)
    assert (decoded - regress(wired, latent, torch.zeros(1))).std() < 2 * RESIDUAL


class Expecting:
    """A network that expects one picture, whatever it is shown: its trajectories are straight lines there."""

    def __init__(self, picture: torch.Tensor, other: PidDecoder) -> None:
        self.picture, self.other = picture, other

    def __getattr__(self, name: str) -> object:
        return getattr(self.other, name)

    def velocity(self, x: torch.Tensor, t: torch.Tensor | float, *_: object) -> torch.Tensor:
        return ((x - self.picture) / torch.as_tensor(t).view(-1, 1, 1, 1)).requires_grad_()


@torch.no_grad()
def test_distributions_match_once_the_fake_score_is_the_teacher(wired: PidDecoder, image: torch.Tensor) -> None:
    latent, sigma = flow.noised(dct.encode(dct.downscale(image)))
    with torch.enable_grad():
        gradient, _ = Student(wired)._match(image, latent, sigma, flow.pixel_residual(latent, sigma))
    assert gradient.abs().max() < 1e-5


def test_matching_pulls_towards_the_teachers_picture(wired: PidDecoder, image: torch.Tensor) -> None:
    """Where the fake score expects grey and the teacher a picture, grey has to move to that picture."""
    stage = Student(wired)
    latent, sigma = dct.encode(dct.downscale(image)), torch.zeros(2)
    grey = torch.zeros_like(image)
    stage.teacher, stage.fake.network = Expecting(image, wired), Expecting(grey, wired)  # type: ignore[assignment]
    stage.fake.descend = lambda *_: None  # type: ignore[method-assign, assignment]
    gradient, _ = stage._match(grey, latent, sigma, flow.pixel_residual(latent, sigma))
    assert (gradient * (image - grey)).mean() < 0  # descending it goes from grey to the image
    torch.testing.assert_close(gradient.abs().mean(), torch.tensor(1.0), atol=0.01, rtol=0)


@pytest.mark.parametrize("t", [1.0, 0.634, 0.342])
def test_following_a_straight_trajectory_ends_where_it_was_guessed(
    wired: PidDecoder, image: torch.Tensor, t: float
) -> None:
    latent = dct.encode(dct.downscale(image))
    x = flow.diffuse(image, torch.full((2,), t), torch.randn_like(image))
    for picture in follow(Expecting(image, wired), x, t, latent, torch.zeros(2)):  # type: ignore[arg-type]
        torch.testing.assert_close(picture, image, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_gain_of_detail_turns_until_pictures_are_as_sharp_as_asked_for(
    wired: PidDecoder, image: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(student, "GAIN_RATE", 0.05)
    stage = Student(wired)
    half = torch.cat((image, 0.05 * image))  # as much texture as can be, and little
    latent, sigma = dct.encode(dct.downscale(half)), torch.zeros(4)
    residual = flow.pixel_residual(latent, sigma)
    guess = F.interpolate(dct.downscale(half), scale_factor=4, mode="bilinear")
    detail = torch.cat((0.5 * (half - guess)[:2], 5 * (half - guess)[2:]))  # too little there, too much here
    for _ in range(300):
        decoded = guess + stage._gain(latent, residual) * detail
        stage._turn_gain(decoded, half, residual, sigma)
    assert measures.sharpness(decoded[:2], half[:2]) == pytest.approx(student.SHARPNESS[1], rel=0.15)
    assert student.SHARPNESS[0] < measures.sharpness(decoded[2:], half[2:]) < student.SHARPNESS[1]
    assert stage.gain.max() <= student.LARGEST_GAIN
    noisy = flow.pixel_residual(latent, sigma + 0.4)
    assert (stage._gain(latent, noisy) < stage._gain(latent, residual)).all()


@torch.no_grad()
def test_noised_latents_do_not_turn_the_gain(wired: PidDecoder, image: torch.Tensor) -> None:
    stage = Student(wired)
    before = stage.gain.clone()
    stage._turn_gain(0 * image, image, torch.full((2, 1, 64, 64), 0.1), torch.full((2,), 0.4))
    assert torch.equal(stage.gain, before)
    assert stage.energy.sum() == 0


def test_a_student_learns_from_its_teacher(
    wired: PidDecoder, image: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    stage = Student(wired)
    before = copy.deepcopy(stage.state_dict())
    losses: dict[str, float] = {}
    for last in (1.0, 1.0, 0.0, 0.0):
        monkeypatch.setattr(student, "LAST", last)
        losses |= stage.step(image, 1.0)
    assert losses.keys() == {"last step", "earlier steps", "fake score", "sharpness", "gain in texture"}
    for part in ("learner", "fake"):
        old, new = before[part]["network"], stage.state_dict()[part]["network"]
        assert any(not torch.equal(old[name], new[name]) for name in old), part
    assert all(torch.equal(a, b) for a, b in zip(stage.teacher.parameters(), wired.parameters(), strict=True))


def test_the_pictures_own_channels_hear_of_noise_only_what_the_time_lets_through(
    wired: PidDecoder, image: torch.Tensor
) -> None:
    hold(wired, modulation=True)
    learner = Learner(wired, 1e-3)
    latent, times = dct.encode(dct.downscale(image)), torch.full((2,), 0.1)
    for _ in range(3):
        noise = torch.randn_like(image)
        velocity = wired.velocity(flow.diffuse(image, times, noise), times, flow.condition(wired, latent), 0.0)
        learner.descend((velocity - noise + image).square().mean(), 1.0)
    rows = wired.s_embedder.proj.weight.abs().amax(dim=1)  # [D]
    assert rows[-48:-16].min() > 0
    assert rows[:-48].max() == rows[-16:].max() == 0
    modulation = wired.pixel_blocks[0].adaLN_modulation[0].weight.unflatten(0, (256, 6, CONFIG.pixel_channels))
    scale_and_gate = modulation[:, 4:, :3]  # [256, 2, 3, D]
    assert scale_and_gate[..., :-48].abs().max() == 0
    assert scale_and_gate[..., -48:-16].abs().max() > 0


def test_wide_layers_learn_slower() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(192, 4), torch.nn.Conv2d(64, 4, 3))
    before = copy.deepcopy(network)
    learner = Learner(network, 1e-3)
    learner.descend(sum(parameter.sum() for parameter in network.parameters()), 1.0)
    moved = [
        (old - new).abs().mean().item() for old, new in zip(before.parameters(), network.parameters(), strict=True)
    ]
    assert moved == pytest.approx([1e-3, 1e-3, 1e-3 / 3, 1e-3], rel=0.01)


@pytest.mark.parametrize("kind", [Teacher, Student])
def test_a_resumed_run_takes_the_same_step(
    kind: type[Teacher] | type[Student], wired: PidDecoder, image: torch.Tensor, tmp_path: Path
) -> None:
    run = train.Run(kind(copy.deepcopy(wired)), tmp_path)
    run.losses.append(run.stage.step(image, 1.0))
    run.save()
    resumed = train.Run(kind(copy.deepcopy(wired)), tmp_path)
    assert resumed.resume()
    assert resumed.losses == run.losses
    losses = []
    for each in (run, resumed):
        torch.manual_seed(1)
        losses.append(each.stage.step(image, 1.0))
    assert losses[0] == pytest.approx(losses[1])
    for one, other in zip(run.stage.average.parameters(), resumed.stage.average.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_run_leaves_weights_samples_and_curves(
    wired: PidDecoder, image: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "SIZES", ((64, 64),) * len(train.SIZES))
    monkeypatch.setattr(Teacher, "crops", 0)  # one crop all the same
    photo = np.random.default_rng(0).integers(0, 256, (80, 80, 3), np.uint8)
    run = train.Run(Teacher(wired), tmp_path)
    train.train(run, [photo], image, 2)
    assert run.steps == 2
    assert {file.name for file in tmp_path.iterdir()} == {
        "checkpoint.pt", "decoder.safetensors", "losses.png", "samples.png",
    }  # fmt: skip
    assert Image.open(tmp_path / "samples.png").size == (2 * 64, 4 * 64)
    assert load_file(tmp_path / "decoder.safetensors").keys() == wired.state_dict().keys()


def test_a_student_needs_a_teacher(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no teacher"):
        train.begin("student", [], tmp_path, torch.device("cpu"))


def test_the_learning_rate_rises_stays_and_falls() -> None:
    factors = [train.rate_factor(step, 1000) for step in range(1000)]
    assert factors[0] < 0.05
    assert factors[49:101] == [1.0] * 52
    assert factors[100:] == sorted(factors[100:], reverse=True)
    assert 0 < factors[-1] < 0.01


def test_crops_keep_to_the_photos_that_are_large_enough() -> None:
    small, large = np.zeros((80, 80, 3), np.uint8), np.full((96, 130, 3), 255, np.uint8)
    crops = photos.random_crops([small, large], 5, (64, 96), np.random.default_rng(0))
    assert crops.shape == (5, 3, 64, 96)
    assert crops.min() == 1


def test_the_most_detailed_of_several_crops_is_taken() -> None:
    flat = np.full((64, 64, 3), 128, np.uint8)
    noisy = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    detailed = [
        photos.random_crops([flat, noisy], 50, (64, 64), np.random.default_rng(1), choice).std(dim=(1, 2, 3)) > 0.1
        for choice in (1, 3)
    ]
    assert detailed[0].sum() < 35 < detailed[1].sum()


def test_held_out_photos_are_never_trained_on(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for value, name in enumerate(("astronaut.0", "astronaut.1", "rocket.0")):
        np.save(tmp_path / "photos" / f"{name}.npy", np.full((2, 2, 3), value, np.uint8))
    assert [int(photo.max()) for photo in photos.load(tmp_path, held_out=False)] == [2]
    assert [int(photo.max()) for photo in photos.load(tmp_path, held_out=True)] == [0, 1]


def test_every_held_out_photo_exists_and_one_ships() -> None:
    titles = {photos.title(name) for source in photos.SOURCES for name in source.names}
    assert set(photos.HELD_OUT) <= titles
    assert "Picture 0B" in PHOTO.with_suffix(".txt").read_text()
