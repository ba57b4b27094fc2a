"""How a training step is taken: length, batch, what is kept, precision and device."""

import dataclasses
from typing import Literal, get_args

from common.errors import UsageError
from partitions.sampling import SAMPLE_RATE
from ssl_core.training.pretraining_recipe import Recipe
from ssl_core.wav2vec2.config import ModelConfig
from ssl_core.wav2vec2.masking import minimum_frames

Precision = Literal["fp32", "bf16", "fp16"]
OptimizerState = Literal["fp32", "bf16", "int8"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A way to take a step. `precision` and `optimizer_state` round; nothing else changes a result.

    Exact means: the same gradient to the rounding of fp32, the same masks, negatives and dropout.
    """

    length: float = 5.0
    """Seconds in every crop."""
    batch: int = 8
    """Crops over which one loss is taken (its diversity term is a statistic of them)."""
    micro_batch: int = 0
    """Crops that are in memory at a time, at most `batch`; 0 is the whole batch. Exact."""
    accumulation: int = 1
    """Batches in an update."""
    precision: Precision = "fp32"
    """Of matrix products and of the activations between them; weights are in fp32. `bf16` and
    `fp16`, with a scaled loss, for GPUs, are not exact."""
    recompute_features: bool = False
    """Run the convolutions again in the backward pass instead of keeping what they made. Exact.
    A batch in several micro-batches always does."""
    recompute_layers: bool = False
    """Keep only the input of each transformer layer, and run it again. Exact."""
    keep_attention: bool = False
    """Keep the attention weights, frames x frames for every head. Exact; needs the most memory."""
    optimizer_state: OptimizerState = "fp32"
    """Of Adam's two moments: 8, 4 or 2 bytes a parameter. `bf16` and `int8` are not exact."""
    apply_in_backward: bool = False
    """Apply and drop each gradient as soon as it is made, so that they are never all in memory.
    Exact; for one batch an update, whole. A gradient that is not finite stops the rest of the
    update only."""
    compile: bool = False
    """Compile the transformer layers with torch.compile (needs a C++ compiler, takes minutes)."""
    keep_freed_memory: bool = True
    """Keep freed memory for the next tensors rather than give it back: faster on Linux."""
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

    @property
    def inexact(self) -> tuple[str, ...]:
        """The settings that round a result, as people write them."""
        names = ("precision", "optimizer_state")
        return tuple(
            f"{name.replace('_', '-')} {getattr(self, name)}"
            for name in names
            if getattr(self, name) != "fp32"
        )

    def validate(self) -> None:
        """Check ranges and that the settings fit together.

        Raises:
            UsageError: what is wrong and what would do.
        """
        for name in ("batch", "accumulation"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.micro_batch < 0 or self.threads < 0:
            raise UsageError("micro-batch and threads must not be below zero")
        for name, known in (("precision", Precision), ("optimizer_state", OptimizerState)):
            if getattr(self, name) not in get_args(known):
                raise UsageError(
                    f"{name.replace('_', '-')} '{getattr(self, name)}' is not one of "
                    f"{', '.join(get_args(known))}"
                )
        if self.apply_in_backward and (self.accumulation > 1 or self.chunk < self.batch):
            raise UsageError(
                "apply-in-backward is for updates of one batch, taken whole: set accumulation to 1 "
                "and micro-batch to 0"
            )

    def validate_for(self, config: ModelConfig, recipe: Recipe) -> None:
        """Check the plan against a model and a recipe.

        Raises:
            UsageError: what is wrong and what would do.
        """
        self.validate()
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
        if self.apply_in_backward and recipe.clip_norm:
            raise UsageError(
                "apply-in-backward cannot clip: the norm is known when all gradients are; "
                "set recipe.clip-norm to 0"
            )
