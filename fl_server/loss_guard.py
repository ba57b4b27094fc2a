"""Undoes a round that has harmed the model, by its loss and perplexity on held-out speakers."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from common.errors import ShortwaveError
from fl_client.federation_settings import PretrainingFederation, RunSettings
from ssl_core.training.collapse import COLLAPSED

LEFT = 0.5
"""A codebook counts as collapsed by a round only if the round left less than this fraction of its
perplexity: one that is small from the start, or shrinks slowly, is the recipe's doing."""


class ModelHarmed(ShortwaveError):
    """Several rounds in a row had to be undone."""


@dataclasses.dataclass
class LossGuard:
    """Compares the held-out metrics of a round with those of the weights it began with."""

    margin: float
    """Fraction by which a round may raise the held-out loss; 0 undoes nothing."""
    most: int
    """Rounds undone in a row after which the run stops."""
    collapsed: float = 0.0
    """Perplexity below which a codebook has collapsed."""
    chance: float = 0.0
    """Loss of a model that tells no frame from its negatives."""
    kept: dict[str, float] = dataclasses.field(default_factory=dict)
    """Held-out metrics of the weights that the next round begins with."""
    trained: bool = False
    """Whether these are trained weights: the perplexity of random ones may fall to that of a
    collapsed codebook in the first round of an honest run, and rise again."""
    in_a_row: int = 0
    """Rounds undone since the last one that was kept."""

    @classmethod
    def of(cls, settings: RunSettings) -> "LossGuard":
        """The guard of a run. A task's server has no held-out clips: its guard undoes nothing."""
        if isinstance(settings, PretrainingFederation):
            collapsed = COLLAPSED * settings.architecture.num_codevector_groups
            trained = settings.checkpoint is not None
            chance = math.log(1 + settings.architecture.num_negatives)
            return cls(
                settings.loss_margin, settings.undone_rounds, collapsed, chance, trained=trained
            )
        return cls(0.0, 0)

    @property
    def watches(self) -> bool:
        """Whether a round may be undone."""
        return bool(self.margin and self.kept)

    def check(self, found: Mapping[str, float]) -> str:
        """Why the round with these held-out metrics must be undone; empty to keep it."""
        if not self.watches:
            return ""
        why = self._harm(found)
        self.in_a_row = self.in_a_row + 1 if why else 0
        if not why:
            self.kept, self.trained = dict(found), True
        return why

    def _harm(self, found: Mapping[str, float]) -> str:
        loss, before = found["held_out_loss"], self.kept["held_out_loss"]
        if not math.isfinite(loss):
            return "the held-out loss is not finite any more"
        codes, had = found["held_out_perplexity"], self.kept["held_out_perplexity"]
        # With few codes in use, negatives equal the target and the loss is small: where more codes
        # have come into use, a higher loss is no harm, as long as it is not above chance.
        most = max(before, self.chance) if codes > had * (1 + self.margin) else before
        if loss > most * (1 + self.margin):
            return f"the held-out loss rose from {before:.3f} to {loss:.3f}"
        if self.trained and codes < self.collapsed and codes < LEFT * had:
            return f"the held-out perplexity fell from {had:.1f} to {codes:.1f}"
        return ""

    def require_progress(self, where: object) -> None:
        """Stop a run whose last rounds were all undone.

        Args:
            where: the run directory.

        Raises:
            ModelHarmed: with what to try.
        """
        if self.in_a_row < self.most or not self.in_a_row:
            return
        raise ModelHarmed(
            f"the last {self.in_a_row} rounds were undone, as each harmed the model on held-out "
            f"speakers; {where} has the weights from before them. Resume it to try other cohorts; "
            "if that fails too, look for clients that the rounds have in common (`clients` in "
            "metrics.jsonl), resume with a larger loss-margin, or start again with a lower "
            "recipe.learning-rate or server-rate"
        )

    def state(self) -> dict[str, Any]:
        """Values for a checkpoint."""
        if not self.kept:
            return {}
        names = ("kept", "trained", "in_a_row")
        return {"loss_guard": {name: getattr(self, name) for name in names}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's state; a run that had stopped may undo as many rounds again."""
        values = state.get("loss_guard", {})
        self.kept = dict(values.get("kept", {}))
        self.trained = bool(values.get("trained", True))
        self.in_a_row = int(values.get("in_a_row", 0))
        if self.in_a_row >= self.most:
            self.in_a_row = 0
