"""Applies a round's mean update (Reddi et al., "Adaptive Federated Optimization", 2021)."""

from collections.abc import Iterable

import torch
from torch import Tensor

from fl_client.updates import Floats

USUAL_RATES = {"fedavg": 1.0, "fedavgm": 1.0, "fedadam": 1e-3}


class ServerOptimizer:
    """`fedavg` adds the mean update, `fedavgm` its momentum, `fedadam` takes a step of Adam."""

    BETA2 = 0.99
    TAU = 1e-3
    """Degree of adaptivity, added to the square root of the second moment."""

    def __init__(self, kind: str, rate: float, momentum: float) -> None:
        """Start without state.

        Args:
            kind: `fedavg`, `fedavgm` or `fedadam`.
            rate: the server's learning rate; 0 is the usual one of `kind`.
            momentum: decay of the first moment.
        """
        self.kind, self.momentum = kind, momentum
        self.rate = rate or USUAL_RATES[kind]
        self.state: dict[str, Tensor] = {}
        """Moments by `kind/parameter name`, for checkpoints."""

    def apply(
        self,
        weights: dict[str, Tensor],
        mean: Iterable[tuple[str, Floats]],
        before: dict[str, Tensor] | None = None,
    ) -> None:
        """Change the global weights in place.

        Args:
            weights: by parameter name, each `[...]`.
            mean: the mean update, shaped as the weights.
            before: gets a copy of each weight `[...]`, one at a time as `mean` frees its memory;
                the moments are then replaced, not changed. None copies nothing.
        """
        for name, value in mean:
            delta = torch.from_numpy(value)
            if before is not None:
                before[name] = weights[name].clone()
                for key in (f"first/{name}", f"second/{name}"):
                    if key in self.state:
                        self.state[key] = self.state[key].clone()
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
        if key not in self.state:
            self.state[key] = torch.zeros_like(like)
        return self.state[key]
