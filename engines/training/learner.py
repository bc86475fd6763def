"""A network in training: its optimizer and the moving average of its weights."""

from __future__ import annotations

from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

EMA_DECAY = 0.998
BASE_FAN_IN = 192

Network = TypeVar("Network", bound=nn.Module)


def _follow(averages: Any, current: Any, count: Tensor | int) -> None:
    """Exponential averages over the last quarter or so of all steps, until that is what EMA_DECAY holds."""
    decay = min(EMA_DECAY, (1 + int(count)) / (5 + int(count)))
    torch._foreach_lerp_(averages, current, 1 - decay)


class Learner(Generic[Network]):
    """`average` is what is kept in the end; `network` is what is being trained.

    `rate` is the learning rate of layers with up to BASE_FAN_IN inputs. Wider ones learn in proportion slower, so that
    a step changes what comes out of every layer about alike.
    """

    def __init__(self, network: Network, rate: float, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        self.network, self.rate = network, rate
        self.ema = AveragedModel(network, multi_avg_fn=_follow)
        groups: dict[float, list[Tensor]] = {}
        for parameter in network.parameters():
            inputs = parameter[0].numel() if parameter.ndim > 1 else 1
            groups.setdefault(min(1.0, BASE_FAN_IN / inputs), []).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [{"params": parameters, "share": share} for share, parameters in groups.items()],
            betas=betas,
            weight_decay=0.0,
        )

    @property
    def average(self) -> Network:
        return cast(Network, self.ema.module)

    def descend(self, loss: Tensor, factor: float) -> None:
        """One update at `factor` times the learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * factor * group["share"]
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.ema.update_parameters(self.network)

    def state_dict(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
