"""Alarms for a pretraining run that has collapsed or does not learn, with what to do."""

import math

from ssl_core.wav2vec2.config import ModelConfig


class CollapseAlarm:
    """Watches training metrics and names each kind of collapse once."""

    def __init__(self, config: ModelConfig, patience: int = 500) -> None:
        """`patience`: updates after which a loss at chance is no longer a beginning."""
        self.groups = config.num_codevector_groups
        self.chance_loss = math.log(config.num_negatives + 1)
        self.patience = patience
        self.named: set[str] = set()

    def check(
        self, update: int, *, contrastive: float, accuracy: float, perplexity: float
    ) -> str | None:
        """A warning when something is wrong for the first time, else None.

        Args:
            update: global update number.
            contrastive: nats a masked frame.
            accuracy: share of masked frames found.
            perplexity: code perplexity, all groups together.
        """
        found = self._kind(update, contrastive, accuracy, perplexity)
        if found is None or found[0] in self.named:
            return None
        self.named.add(found[0])
        return f"warning: update {update}: {found[1]}"

    def _kind(
        self, update: int, contrastive: float, accuracy: float, perplexity: float
    ) -> tuple[str, str] | None:
        if not math.isfinite(contrastive):
            return "diverged", "the loss is not finite: lower the learning rate or use fp32"
        if perplexity < 2 * self.groups:
            return "codebook", (
                f"the codebook has collapsed (perplexity {perplexity:.1f}, least {self.groups}): "
                "lower the learning rate, lengthen the warm-up or raise diversity_loss_weight"
            )
        if accuracy > 0.99:
            return "trivial", (
                "accuracy is near 1, so the task has become trivial, which a collapsed codebook or "
                "constant features cause: raise feature_penalty_weight or lower the learning rate"
            )
        if update >= self.patience and abs(contrastive - self.chance_loss) < 0.02:
            return "chance", (
                f"after {update} updates the contrastive loss is still log(negatives + 1) = "
                f"{self.chance_loss:.3f}, so nothing is learnt: check the audio, raise the "
                "learning rate or lengthen the warm-up"
            )
        return None
