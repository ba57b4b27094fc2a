"""The pretraining recipe: hyperparameters other than the architecture, for each preset."""

import dataclasses
import math
from typing import Literal

from common.errors import UsageError
from ssl_core.planning.step_plan import Plan
from ssl_core.wav2vec2.config import ModelConfig
from ssl_core.wav2vec2.masking import minimum_frames


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Pretraining hyperparameters; the defaults are the original base recipe (fairseq)."""

    learning_rate: float = 5e-4
    """Peak learning rate. The paper's "6 x 10^4" is read as 6e-4; the original used 5e-4."""
    warmup: float = 0.08
    """Fraction of all updates with linear warm-up (32 of 400 thousand)."""
    beta1: float = 0.9
    beta2: float = 0.98
    epsilon: float = 1e-6
    weight_decay: float = 0.01
    """Decoupled weight decay, as in AdamW."""
    clip_norm: float = 0.0
    """Largest gradient norm; 0 does not clip, as in the original."""
    gumbel_start: float = 2.0
    gumbel_end: float = 0.5
    gumbel_decay: float = 0.999995
    """The Gumbel temperature is max(end, start * decay ** global update)."""
    feature_grad_scale: float = 0.1
    """Multiplies the gradient that reaches the feature extractor (`feature_grad_mult`)."""
    feature_penalty_weight: float = 10.0
    """Weight of the mean square of the extractor's output, times the masked frames."""
    diversity_end: float = 1.0
    """Weight of the diversity loss at the last update, as a fraction of its weight at the first; it
    changes linearly, and 1 keeps it constant, as in the original. A large weight early on keeps a
    small codebook from collapsing once the first codes can be predicted; a smaller one later lets
    codes become predictable."""
    code_entropy_weight: float = 0.0
    """Weight of the entropy of a masked frame's code distribution, in nats; 0 in the original. The
    diversity loss depends on the mean over all frames, which is uniform even if every frame's code
    is random; small models converge to that. A weight above zero keeps codes sharp."""
    negative_pool: Literal["utterance", "batch"] = "utterance"
    """Source of negatives: masked frames of the same crop, or of all crops in the batch."""

    def validate(self) -> None:
        """Check ranges.

        Raises:
            UsageError: a value is out of range.
        """
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"{field.name.replace('_', '-')} must be finite, not {value}")
        if self.learning_rate <= 0:
            raise UsageError(f"learning-rate must be above zero, not {self.learning_rate}")
        if not 0 <= self.warmup < 1:
            raise UsageError(f"warmup is a fraction of all updates in [0, 1), not {self.warmup}")
        if not 0 <= self.diversity_end <= 1:
            raise UsageError(f"diversity-end is a fraction in [0, 1], not {self.diversity_end}")
        if not (0 < self.gumbel_end <= self.gumbel_start and 0 < self.gumbel_decay <= 1):
            raise UsageError("the Gumbel temperature must fall: 0 < end <= start, 0 < decay <= 1")
        for name in (
            "weight_decay", "clip_norm", "feature_penalty_weight", "code_entropy_weight"
        ):  # fmt: skip
            if getattr(self, name) < 0:
                raise UsageError(f"{name.replace('_', '-')} must not be below zero")

    def validate_plan(self, architecture: ModelConfig, plan: Plan) -> None:
        """Check a plan against the architecture and this recipe.

        Args:
            architecture: of the model.
            plan: how a step is taken.

        Raises:
            UsageError: what is wrong and what to do.
        """
        plan.validate()
        if architecture.frames(plan.samples) < minimum_frames(architecture):
            least = minimum_frames(architecture) * 0.02 + 0.01
            raise UsageError(
                f"a length of {plan.length:g}s is too short to mask: "
                f"the model needs at least {least:.2f}s"
            )
        if self.negative_pool == "batch" and plan.is_split:
            raise UsageError(
                "recipe.negative-pool batch needs the whole batch in memory: leave micro-batch at 0"
            )
        plan.validate_clipping(self.clip_norm)


RECIPES: dict[str, Recipe] = {
    "base": Recipe(),
    "tiny": Recipe(
        learning_rate=1e-3,
        feature_penalty_weight=1.0,
        diversity_end=0.2,
        code_entropy_weight=0.2,
    ),
}
"""Recipes by preset: the original for `base`; for `tiny`, one that learns within minutes."""
