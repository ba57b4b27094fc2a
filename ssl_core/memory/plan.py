"""How a training step is taken: length, batch, micro-batch, precision and device."""

import dataclasses
from typing import Literal

from partitions.errors import UsageError
from partitions.units import SAMPLE_RATE
from ssl_core.wav2vec2.config import ModelConfig, Recipe
from ssl_core.wav2vec2.masking import minimum_frames

Precision = Literal["fp32", "bf16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A way to take a step. All settings but `precision` leave the gradient as it is."""

    length: float = 5.0
    """Seconds in every crop."""
    batch: int = 8
    """Crops over which one loss is taken (its diversity term is a statistic of them)."""
    micro_batch: int = 0
    """Crops that are in memory at a time, at most `batch`; 0 is the whole batch. Exact."""
    accumulation: int = 1
    """Batches in an update."""
    precision: Precision = "fp32"
    """`bf16`: matrix products in bfloat16 under autocast, weights in fp32. Not exact."""
    device: str = "cpu"
    """A torch device: `cpu`, `cuda`, `cuda:1`."""
    threads: int = 0
    """CPU threads of a step; 0 leaves torch's choice. Results depend on it in the last bits."""

    @property
    def samples(self) -> int:
        """Samples in every crop."""
        return round(self.length * SAMPLE_RATE)

    @property
    def crops(self) -> int:
        """Crops in an update."""
        return self.batch * self.accumulation

    @property
    def chunk(self) -> int:
        """Crops in memory at a time."""
        return min(self.micro_batch or self.batch, self.batch)

    def validate(self, config: ModelConfig, recipe: Recipe) -> None:
        """Check the plan against a model and a recipe.

        Raises:
            UsageError: what is wrong and what would do.
        """
        for name in ("batch", "accumulation"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.micro_batch < 0 or self.threads < 0:
            raise UsageError("micro-batch and threads must not be below zero")
        if self.precision not in ("fp32", "bf16"):
            raise UsageError(f"precision '{self.precision}' is not one of fp32, bf16")
        if config.frames(self.samples) < minimum_frames(config):
            least = minimum_frames(config) * 0.02 + 0.01
            raise UsageError(
                f"a length of {self.length:g}s is too short to mask: "
                f"the model needs at least {least:.2f}s"
            )
        if recipe.negative_pool == "batch" and self.chunk < self.batch:
            raise UsageError(
                "recipe.negative-pool=batch needs the whole batch in memory: leave micro-batch at 0"
            )
