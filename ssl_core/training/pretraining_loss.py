"""The parts of the pretraining loss, weighed and added up."""

from typing import NamedTuple

from torch import Tensor

from ssl_core.wav2vec2.model import LossParts
from ssl_core.wav2vec2.quantizer import diversity_loss


class Weights(NamedTuple):
    """Weights of the loss parts and the Gumbel temperature at an update.

    What changes from update to update is `[]` on the device if the step is resident.
    """

    diversity: float | Tensor
    penalty: float
    temperature: float | Tensor
    entropy: float = 0.0


def combine(parts: LossParts, weights: Weights, masked: int) -> Tensor:
    """Combine the loss parts of a whole batch, as in fairseq.

    Args:
        parts: sums over the masked frames of the batch.
        weights: of the parts.
        masked: number of masked frames.

    Returns:
        The loss summed over masked frames, `[]`.
    """
    diversity = diversity_loss(parts.probabilities / masked) * masked
    return (
        parts.contrastive
        + weights.diversity * diversity
        + weights.penalty * parts.penalty
        + weights.entropy * parts.entropy
    )
