"""How the server applies a round's mean update (Adaptive Federated Optimization, Reddi 2021)."""

from collections.abc import Iterable

import torch
from torch import Tensor

from fl_client.updates import Floats

USUAL_RATES = {"fedavg": 1.0, "fedavgm": 1.0, "fedadam": 1e-3}


class ServerOptimizer:
    """`fedavg` adds the mean; `fedavgm` adds its momentum; `fedadam` scales it by its variance."""

    BETA2 = 0.99
    TAU = 1e-3
    """Degree of adaptivity, added to the root of the second moment."""

    def __init__(self, kind: str, rate: float, momentum: float) -> None:
        """Begin without moments; a rate of 0 is the usual one of its kind."""
        self.kind, self.momentum = kind, momentum
        self.rate = rate or USUAL_RATES[kind]
        self.moments: dict[str, Tensor] = {}

    def apply(self, weights: dict[str, Tensor], mean: Iterable[tuple[str, Floats]]) -> None:
        """Change the global weights in place."""
        for name, value in mean:
            delta = torch.from_numpy(value)
            if self.kind == "fedavg":
                weights[name].add_(delta, alpha=self.rate)
                continue
            first = self._moment("first", name, delta)
            if self.kind == "fedavgm":
                first.mul_(self.momentum).add_(delta)
                weights[name].add_(first, alpha=self.rate)
                continue
            first.lerp_(delta, 1 - self.momentum)
            second = self._moment("second", name, delta)
            second.mul_(self.BETA2).addcmul_(delta, delta, value=1 - self.BETA2)
            weights[name].addcdiv_(first, second.sqrt().add_(self.TAU), value=self.rate)

    def _moment(self, kind: str, name: str, like: Tensor) -> Tensor:
        key = f"{kind}/{name}"
        if key not in self.moments:
            self.moments[key] = torch.zeros_like(like)
        return self.moments[key]
