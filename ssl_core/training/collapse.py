"""Warnings that a pretraining run has collapsed or does not learn, with advice."""

import math

from ssl_core.wav2vec2.config import ModelConfig

COLLAPSED = 2
"""Perplexity of each codebook, of all of whose entries so few are in use, that has collapsed."""


class CollapseAlarm:
    """Watches training metrics and reports each kind of collapse once."""

    def __init__(self, config: ModelConfig, patience: int = 500) -> None:
        """`patience`: updates after which a loss at chance level is reported."""
        self.groups = config.num_codevector_groups
        self.chance_loss = math.log(config.num_negatives + 1)
        self.patience = patience
        self.named: set[str] = set()

    def check(
        self, update: int, *, contrastive: float, accuracy: float, perplexity: float
    ) -> str | None:
        """Return a warning the first time a kind of collapse is seen, else None.

        Args:
            update: global update number.
            contrastive: contrastive loss in nats per masked frame.
            accuracy: fraction of masked frames whose code wins against the negatives.
            perplexity: code perplexity, summed over groups.
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
        if perplexity < COLLAPSED * self.groups:
            return "codebook", (
                f"the codebook has collapsed (perplexity {perplexity:.1f}, minimum {self.groups}): "
                "lower the learning rate, lengthen the warm-up or raise diversity_loss_weight"
            )
        if accuracy > 0.99:
            return "trivial", (
                "accuracy is near 1, so the contrastive loss has become trivial, through a "
                "collapsed codebook or constant features: raise feature_penalty_weight or lower "
                "the learning rate"
            )
        if update >= self.patience and abs(contrastive - self.chance_loss) < 0.02:
            return "chance", (
                f"after {update} updates the contrastive loss is still log(negatives + 1) = "
                f"{self.chance_loss:.3f} (chance), so nothing is learnt: check the audio, raise "
                "the learning rate or lengthen the warm-up"
            )
        return None
