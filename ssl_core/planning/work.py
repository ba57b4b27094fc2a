"""What a model is trained for, as the planner sees it: pretraining or a downstream task."""

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch import nn

from ssl_core.planning.step_plan import Plan
from ssl_core.wav2vec2.config import ModelConfig

Waveforms = npt.NDArray[np.float32]
Batches = Callable[[int], Iterable[Waveforms]]
"""The batches of an update, `[batch, sample]` each, by the update's number."""


class Rung(NamedTuple):
    """A plan, and its time relative to the fastest plan for the same update."""

    slowdown: float
    plan: Plan


class Started(NamedTuple):
    """A training that is ready for its first update."""

    model: nn.Module
    update: Callable[[int], bool]
    """Takes the update of a number; whether it was applied."""


class Work(Protocol):
    """A frozen dataclass that says what is trained; it decides which plans there are."""

    def __hash__(self) -> int:
        """Of all fields."""

    @property
    def architecture(self) -> ModelConfig:
        """Of the model or backbone."""

    @property
    def unit(self) -> str:
        """What a batch is made of: "crops" or "clips"."""

    @property
    def clip_norm(self) -> float:
        """Largest gradient norm; 0 does not clip."""

    @property
    def convolves(self) -> bool:
        """Whether convolutions are in the backward pass."""

    @property
    def recurs(self) -> bool:
        """Whether an LSTM is trained, before which freed memory is returned."""

    def validate(self, plan: Plan) -> None:
        """Check a plan; raises `UsageError`."""

    def rungs(self, whole: Plan) -> list[Rung]:
        """Exact plans for the same update, from the fastest to the leanest.

        Args:
            whole: the update with nothing recomputed, split or kept.
        """

    def trained_parameters(self) -> int:
        """Numbers that a federation's messages hold."""

    def options(self, plan: Plan) -> str:
        """Command-line options that ask for a plan."""

    def start(
        self,
        plan: Plan,
        *,
        label: Callable[[str], None] = lambda _: None,
        fake: bool = False,
        batches: Batches | None = None,
    ) -> Started:
        """Build model and step.

        Args:
            plan: how a step is taken.
            label: is told what is built from here on: "optimizer state", "computing features",
                "activations".
            fake: tensors have no contents (torch's FakeTensorMode); of a split batch two
                micro-batches are enough, since all that follow are like the second.
            batches: speech for pretraining; None is noise.
        """
