"""What a client does in every round, whatever it trains: state, exchange, retries and metrics."""

import collections
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from flwr.app import ArrayRecord

from fl_client import protocol
from fl_client.client_state import ClientState
from fl_client.exchange import Weights, exchange_of
from fl_client.federation_settings import RunSettings
from fl_client.identity import default_folder
from fl_client.limits import Limits
from fl_client.round_plan import Budget, RoundPlan
from ssl_core.planning.allocator import is_out_of_memory
from ssl_core.planning.process_memory import peak_bytes
from ssl_core.training.planned_step import PlannedStep

T = TypeVar("T")


class RoundResult(NamedTuple):
    """What a client sends back."""

    update: ArrayRecord
    metrics: dict[str, float]


class Report(Protocol):
    """What an update did."""

    @property
    def applied(self) -> bool:
        """Whether the gradient was finite."""


@dataclasses.dataclass
class ClientRound:
    """One round of one client."""

    settings: RunSettings
    instructions: Mapping[str, Any]
    """See `protocol.instructions`."""
    key: int
    """The client's number."""
    round_plan: RoundPlan
    budget: Budget
    limits: Limits
    folder: Path | None
    """Where clients keep their state; None is `default_folder()`."""
    started: float
    """When the round began, by `time.monotonic()`."""

    def __post_init__(self) -> None:
        """Open the client's state.

        Raises:
            StateLost: the run's name is not valid.
        """
        self.number = int(self.instructions["round"])
        self.folded = int(self.instructions["folded_round"])
        run = str(self.instructions["run"])
        self.state = ClientState(self.folder or default_folder(), run, self.key)
        self._paused = 0.0

    def receive(self, model: Weights, weights: ArrayRecord) -> None:
        """Decode the message's weights into the model.

        Args:
            model: the model, or its shared part.
            weights: the message's weights, emptied as they are used.

        Raises:
            ProtocolError: the weights do not fit the model.
            StateLost: the weights are a difference to weights that this client no longer has.
        """
        self.exchange = exchange_of(
            model, weights, self.instructions, self.state, self.settings.encoding
        )

    def run(self, train: Callable[[], T]) -> T:
        """Train from the received weights; each time memory runs out, again with a leaner plan."""
        while True:
            self.exchange.load()
            self._paused = 0.0
            try:
                return train()
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or not self.round_plan.step_down("out of memory"):
                    raise

    def before_update(self, step: PlannedStep) -> None:
        """Wait for the owner's limits, and take a leaner plan if memory has shrunk."""
        self._paused += self.limits.wait()
        if self.round_plan.watch():
            step.change_plan(self.round_plan.plan)

    def result(
        self,
        update: ArrayRecord,
        metrics: Mapping[str, float],
        skips: collections.Counter[str],
    ) -> RoundResult:
        """The update and all metrics that the protocol asks for.

        Args:
            update: what the server folds.
            metrics: those that only this kind of training knows.
            skips: crops or clips skipped, by reason.
        """
        plan, task = self.round_plan.plan, self.settings.task
        common = {
            "round": self.number,
            "train_seconds": time.monotonic() - self.started,
            "paused_seconds": self._paused,
            "peak_bytes": _peak_bytes(plan.device),
            "predicted_bytes": self.round_plan.predicted,
            "memory_bytes": self.budget.memory,
            "batch": plan.batch,
            "micro_batch": plan.effective_micro_batch,
            "fallbacks": self.round_plan.fallbacks,
        }
        skipped = {protocol.skip_metric(r): skips[r] for r in protocol.skip_reasons_of(task)}
        found = {**metrics, **common, **skipped}
        return RoundResult(update, {name: found[name] for name in protocol.metrics_of(task)})


def means(reports: Sequence[Report], names: Sequence[str]) -> dict[str, float]:
    """Means over the applied updates; the numbers of updates taken and applied.

    Args:
        reports: one for each update taken.
        names: fields to average; 0 if no update was applied.
    """
    applied = [report for report in reports if report.applied]
    values = {
        name: float(np.mean([getattr(report, name) for report in applied])) if applied else 0.0
        for name in names
    }
    return values | {"updates": len(reports), "applied": len(applied)}


def _peak_bytes(device: str) -> int:
    """Peak memory so far: allocated on a GPU, resident on a CPU."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
    return peak_bytes()
