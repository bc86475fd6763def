"""A network in training, its optimiser and the moving average of its weights."""

from __future__ import annotations

from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

EMA_DECAY = 0.998
BASE_FAN_IN = 192

Network = TypeVar("Network", bound=nn.Module)


def ema_decay(count: int) -> float:
    """Return the decay of a moving average of `count` values: it covers their last quarter, later that of EMA_DECAY."""
    return min(EMA_DECAY, (1 + count) / (5 + count))


def _update_average(averages: Any, current: Any, count: Tensor | int) -> None:
    torch._foreach_lerp_(averages, current, 1 - ema_decay(int(count)))


class Learner(Generic[Network]):
    """A network trained with AdamW, with an exponential moving average (EMA) of its weights.

    `network` holds the weights that are trained, `average` the EMA weights that are exported.

    `rate` is the learning rate of layers with a fan-in of up to BASE_FAN_IN. Wider layers have a rate in inverse
    proportion to their fan-in, so that one update changes the output of every layer by about the same amount.
    """

    def __init__(self, network: Network, rate: float, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        self.network, self.rate = network, rate
        self.ema = AveragedModel(network, multi_avg_fn=_update_average)
        groups: dict[float, list[Tensor]] = {}
        for parameter in network.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            groups.setdefault(min(1.0, BASE_FAN_IN / fan_in), []).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [{"params": parameters, "share": share} for share, parameters in groups.items()],
            betas=betas,
            weight_decay=0.0,
        )

    @property
    def average(self) -> Network:
        """The network with the EMA weights."""
        return cast(Network, self.ema.module)

    def update(self, loss: Tensor, rate_factor: float) -> None:
        """Take one optimiser step on `loss`, at `rate_factor` times the learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * rate_factor * group["share"]
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.ema.update_parameters(self.network)

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to resume."""
        return {
            "network": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a `state_dict`."""
        self.network.load_state_dict(state["network"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
