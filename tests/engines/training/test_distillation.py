"""Teacher and student: each term of the training moves the network in the right direction."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from engines.bundled import dct
from engines.pid import PidDecoder
from engines.training import detail_gain, flow, metrics, student
from engines.training.detail_gain import DetailGain
from engines.training.initialise import decode_mean
from engines.training.learner import Learner
from engines.training.linear_velocity import RESIDUAL_RMS
from engines.training.luma import luma
from engines.training.matching import DistributionMatching, fake_score
from engines.training.student import Student
from engines.training.teacher import Teacher, follow, sample
from tests.engines.training.conftest import ConstantEstimate


def test_a_teacher_learns_one_image(decoder: PidDecoder, image: torch.Tensor) -> None:
    teacher, smooth = Teacher(decoder), F.interpolate(image[..., :8, :8], scale_factor=8, mode="bicubic")
    losses = []
    for i in range(24):
        torch.manual_seed(i % 3)  # the same noise again
        losses += teacher.step(smooth, 1.0).values()
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


@torch.no_grad()
def test_an_initial_teacher_samples_its_mean(decoder: PidDecoder) -> None:
    latent, noise = torch.randn(1, dct.CHANNELS, 4, 4), torch.randn(1, 3, 64, 64)
    decoded = sample(decoder, latent, noise)
    assert (decoded - decode_mean(decoder, latent, torch.zeros(1))).std() < 2 * RESIDUAL_RMS


@pytest.mark.parametrize("t", [1.0, 0.634, 0.342])
def test_a_straight_trajectory_ends_at_the_estimate(decoder: PidDecoder, image: torch.Tensor, t: float) -> None:
    latent = dct.encode(dct.downscale(image))
    x = flow.diffuse(image, torch.full((2,), t), torch.randn_like(image))
    conditioning = flow.condition(decoder, latent)
    for result in follow(ConstantEstimate(image, decoder), x, t, conditioning, torch.zeros(2)):
        torch.testing.assert_close(result, image, atol=1e-5, rtol=0)


class TestDistributionMatching:
    def test_there_is_no_gradient_while_the_fake_score_equals_the_teacher(
        self, decoder: PidDecoder, image: torch.Tensor
    ) -> None:
        latent, sigma = flow.noise_random_share(dct.encode(dct.downscale(image)))
        matching = DistributionMatching(decoder, Learner(fake_score(decoder), 5e-5))
        conditioning = flow.condition(decoder, latent)
        gradient, _ = matching.step(image, conditioning, sigma, flow.pixel_residual(latent, sigma))
        assert gradient.abs().max() < 1e-5

    def test_images_are_pulled_from_the_fake_estimate_to_the_teachers(
        self, decoder: PidDecoder, image: torch.Tensor
    ) -> None:
        """If the fake score expects grey and the teacher an image, grey has to move towards that image."""
        latent, sigma, grey = dct.encode(dct.downscale(image)), torch.zeros(2), torch.zeros_like(image)

        class FixedFake:
            network = ConstantEstimate(grey, decoder)

            def update(self, loss: torch.Tensor, rate_factor: float) -> None:
                pass

        matching = DistributionMatching(ConstantEstimate(image, decoder), FixedFake())
        conditioning = flow.condition(decoder, latent)
        gradient, _ = matching.step(grey, conditioning, sigma, flow.pixel_residual(latent, sigma))
        assert (gradient * (image - grey)).mean() < 0  # gradient descent moves grey to the image
        torch.testing.assert_close(gradient.abs().mean(), torch.tensor(1.0), atol=0.01, rtol=0)


class TestDetailGain:
    @torch.no_grad()
    def test_the_gain_settles_at_the_target_sharpness(self, image: torch.Tensor) -> None:
        gain = DetailGain(torch.device("cpu"), rate=0.05)
        half = torch.cat((image, 0.05 * image))  # with the most texture possible, and with little
        latent, sigma = dct.encode(dct.downscale(half)), torch.zeros(4)
        residual = flow.pixel_residual(latent, sigma)
        estimate = F.interpolate(dct.downscale(half), scale_factor=4, mode="bilinear")
        detail = torch.cat((0.5 * (half - estimate)[:2], 5 * (half - estimate)[2:]))  # too little, and too much
        for _ in range(300):
            decoded = estimate + gain.at(latent, residual) * detail
            gain.update(decoded, half, residual, sigma)
        low, high = detail_gain.SHARPNESS
        assert metrics.sharpness(decoded[:2], half[:2]) == pytest.approx(high, rel=0.15)
        assert low < metrics.sharpness(decoded[2:], half[2:]) < high
        assert gain.gain.max() <= detail_gain.MAX_GAIN
        noisy = flow.pixel_residual(latent, sigma + 0.4)
        assert (gain.at(latent, noisy) < gain.at(latent, residual)).all()

    def test_noised_latents_do_not_change_the_gain(self, image: torch.Tensor) -> None:
        gain = DetailGain(torch.device("cpu"))
        before = gain.gain.clone()
        gain.update(0 * image, image, torch.full((2, 1, 64, 64), 0.1), torch.full((2,), 0.4))
        assert torch.equal(gain.gain, before)
        assert gain.energy.sum() == 0


def test_a_student_step_trains_student_and_fake_score_but_not_the_teacher(
    decoder: PidDecoder, image: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    trainer = Student(decoder)
    teacher = copy.deepcopy(decoder.state_dict())
    before = copy.deepcopy(trainer.state_dict())
    losses: dict[str, float] = {}
    for last in (1.0, 0.0):
        monkeypatch.setattr(student, "LAST_STEP_PROBABILITY", last)
        for _ in range(2):
            losses |= trainer.step(image, 1.0)
    assert losses.keys() == {"last step", "earlier steps", "fake score", "sharpness", "gain in texture"}
    for part in ("learner", "fake"):
        old, new = before[part]["network"], trainer.state_dict()[part]["network"]
        assert any(not torch.equal(old[name], new[name]) for name in old), part
    changed = {name for name, old in before["fake"]["network"].items() if not torch.equal(old, new[name])}
    assert not any("latent_proj" in name or "head" in name for name in changed)  # it reads the teacher's encoding
    assert all(torch.equal(teacher[name], tensor) for name, tensor in trainer.teacher.state_dict().items())


def test_the_end_of_the_training_adds_no_detail(
    decoder: PidDecoder, image: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(student, "LAST_STEP_PROBABILITY", 1.0)
    trainer = Student(decoder)
    fake = copy.deepcopy(trainer.state_dict()["fake"]["network"])
    assert trainer.step(image, 0.99 * student.DETAIL_RATE).keys() == {"last step"}
    assert all(torch.equal(old, trainer.state_dict()["fake"]["network"][name]) for name, old in fake.items())
    assert trainer.step(image, student.DETAIL_RATE).keys() > {"last step", "fake score"}


class TestStudentIgnoresColour:
    """The teacher's detail and its pull reach the luma of the student's images only."""

    @pytest.fixture
    def trainer(self, decoder: PidDecoder, monkeypatch: pytest.MonkeyPatch) -> Student:
        monkeypatch.setattr(student, "LAST_STEP_PROBABILITY", 1.0)
        return Student(decoder)

    @staticmethod
    def noise() -> dict[str, torch.Tensor]:
        """Return noise [2, 3, 64, 64]: in all colours, with the same luma in grey, and without luma."""
        colours = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        grey = luma(colours).expand_as(colours)
        return {"colours": colours, "grey": grey, "chroma": colours - grey, "nothing": torch.zeros_like(colours)}

    def test_detail_is_added_to_luma(
        self, trainer: Student, image: torch.Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The error from the target shows which detail the target has."""

        def loss(detail: torch.Tensor) -> float:
            monkeypatch.setattr(student, "follow", lambda *_: (image, image + detail))
            torch.manual_seed(0)
            return copy.deepcopy(trainer).step(image, 1.0)["last step"]

        losses = {name: loss(detail) for name, detail in self.noise().items()}
        assert losses["colours"] == pytest.approx(losses["grey"], rel=1e-6)
        assert losses["chroma"] == pytest.approx(losses["nothing"], rel=1e-6)
        assert losses["grey"] > 1.01 * losses["nothing"]

    def test_distribution_matching_pulls_luma(
        self, trainer: Student, image: torch.Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def gradient(pull: torch.Tensor) -> torch.Tensor:
            """Return the gradient on the last layer of a student that is pulled."""
            each = copy.deepcopy(trainer)
            monkeypatch.setattr(each.matching, "step", lambda *_: (1000 * pull, 0.0))
            torch.manual_seed(0)
            each.step(image, 1.0)
            weight = each.learner.network.final_layer.linear.weight
            assert weight.grad is not None
            return weight.grad

        gradients = {name: gradient(pull) for name, pull in self.noise().items()}
        scale = gradients["nothing"].norm()
        assert (gradients["colours"] - gradients["grey"]).norm() < 1e-4 * scale
        assert (gradients["chroma"] - gradients["nothing"]).norm() < 1e-4 * scale
        assert (gradients["grey"] - gradients["nothing"]).norm() > 1e-2 * scale


def test_wide_layers_learn_more_slowly() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(192, 4), torch.nn.Conv2d(64, 4, 3))
    before = copy.deepcopy(network)
    learner = Learner(network, 1e-3)
    learner.update(sum(parameter.sum() for parameter in network.parameters()), 1.0)
    moved = [
        (old - new).abs().mean().item() for old, new in zip(before.parameters(), network.parameters(), strict=True)
    ]
    assert moved == pytest.approx([1e-3, 1e-3, 1e-3 / 3, 1e-3], rel=0.01)


def test_the_average_follows_the_trained_weights() -> None:
    network = torch.nn.Linear(1, 1)
    learner = Learner(network, 1e-3)
    path = []
    for _ in range(40):
        learner.update(network.weight.sum(), 1.0)
        path.append(network.weight.item())
    assert path[-1] < learner.average.weight.item() < path[0]
