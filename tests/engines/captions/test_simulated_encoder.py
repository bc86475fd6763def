from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from engines.captions import simulated
from engines.captions.protocol import TextEncoder
from engines.captions.simulated import SimulatedTextEncoder


def test_embeddings_depend_on_the_prompt_alone() -> None:
    encoder: TextEncoder = SimulatedTextEncoder(tokens=5, width=8, max_batch=3)
    first, empty, again = encoder.encode(["a photo 🙂", "", "a photo 🙂"])
    assert first.shape == (5, 8)
    assert first.dtype == torch.bfloat16
    assert torch.equal(first, again)
    assert not torch.equal(first, empty)
    assert torch.equal(SimulatedTextEncoder(tokens=5, width=8).encode([""])[0], empty)


def test_each_batch_sleeps_once(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(simulated, "time", SimpleNamespace(sleep=slept.append))
    encoder = SimulatedTextEncoder(tokens=2, width=4, seconds=0.5, max_batch=4)
    encoder.encode(["a", "b", "c"])
    encoder.encode(["a"])
    assert slept == [0.5, 0.5]


@pytest.mark.parametrize("count", [0, 3])
def test_a_batch_of_the_wrong_size_is_an_error(count: int) -> None:
    with pytest.raises(ValueError, match="a batch has 1 to 2"):
        SimulatedTextEncoder(tokens=2, width=4, max_batch=2).encode([""] * count)


def test_encoders_of_different_shapes_have_different_identities() -> None:
    identities = {SimulatedTextEncoder(tokens, 8).info.identity for tokens in (5, 6)}
    assert len(identities) == 2
