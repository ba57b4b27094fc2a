"""The planner's interface to what is trained: pretraining or a downstream task."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from ssl_core.planning.step_plan import Plan
from ssl_core.wav2vec2.config import ModelConfig

Waveforms = npt.NDArray[np.float32]
Batches = Callable[[int], Iterable[Waveforms]]
"""Maps the number of an update to its batches, each `[batch, sample]`."""


class Rung(NamedTuple):
    """A plan, and its time relative to the fastest exact plan for the same update."""

    slowdown: float
    plan: Plan


class Started(NamedTuple):
    """A training that is set up for its first update."""

    model: nn.Module
    update: Callable[[int], bool]
    """Takes the update of the given number; returns whether it was applied."""
    copies: Sequence[Tensor] = ()
    """Copies of weights in 16 bits, `[...]` each, that products use in their place."""


class Work(Protocol):
    """A frozen dataclass that says what is trained and which plans exist for it."""

    def __hash__(self) -> int:
        """Hash of all fields."""

    @property
    def architecture(self) -> ModelConfig:
        """Architecture of the model or backbone."""

    @property
    def unit(self) -> str:
        """Name of the items in a batch: "crops" or "clips"."""

    @property
    def clip_norm(self) -> float:
        """Largest gradient norm; 0 does not clip."""

    @property
    def convolves(self) -> bool:
        """Whether the backward pass includes convolutions."""

    @property
    def recurs(self) -> bool:
        """Whether an LSTM is trained; freed memory is returned to the kernel before it runs."""

    @property
    def graphed(self) -> bool:
        """Whether a GPU replays updates from CUDA graphs, if the plan says so."""

    def validate(self, plan: Plan) -> None:
        """Check a plan; raises `UsageError`."""

    def rungs(self, whole: Plan) -> list[Rung]:
        """List the exact plans for an update, from the fastest to the leanest.

        Args:
            whole: plan of the update with nothing recomputed, split or kept.
        """

    def trained_parameters(self) -> int:
        """Number of trained parameters, which a federation's messages hold."""

    def options(self, plan: Plan) -> str:
        """Command-line options that select a plan."""

    def start(
        self,
        plan: Plan,
        *,
        label: Callable[[str], None] = lambda _: None,
        fake: bool = False,
        batches: Batches | None = None,
    ) -> Started:
        """Build the model and its step.

        Args:
            plan: how a step is taken.
            label: called with the name of the part that is built next: "optimizer state",
                "computing features", "activations".
            fake: tensors have no data (`planning.shape_tensors`); a split batch then needs only two
                micro-batches, since all that follow are like the second.
            batches: speech for pretraining; None for noise.
        """
