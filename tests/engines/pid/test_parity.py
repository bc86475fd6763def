"""The network against outputs of the published implementation; see `engines.benchmark.gpu_check.parity`."""

from pathlib import Path

import pytest

from engines.accuracy import largest
from engines.benchmark.gpu_check.parity import TOLERANCE, Case, read_case, relative_errors
from engines.pid import fold

FILES = sorted((Path(__file__).parents[2] / "parity").glob("*.npz"))


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.stem)
def case(request: pytest.FixtureRequest) -> Case:
    return read_case(request.param)


def test_every_latent_family_and_generation_has_a_vector():
    assert len(FILES) == 7


@pytest.mark.parametrize("budget", [2**40, 1], ids=["whole", "chunked"])
@pytest.mark.parametrize("folded", [False, True], ids=["live", "folded"])
def test_velocity_and_image_match_the_published_network(case: Case, folded: bool, budget: int):
    decoder = fold(case.decoder, case.expected["t_list"][:-1].tolist()) if folded else case.decoder
    decoder.pixel_memory_budget = budget
    assert largest(relative_errors(case, decoder).values()) < TOLERANCE
