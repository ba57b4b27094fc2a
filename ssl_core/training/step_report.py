"""The report of a pretraining update, and the sums from which it is made."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ssl_core.wav2vec2.chance import Draws
from ssl_core.wav2vec2.model import LossParts
from ssl_core.wav2vec2.quantizer import diversity_loss, perplexity


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepReport:
    """Results of an update. Losses are means over masked frames, in nats."""

    update: int
    loss: float
    """Contrastive loss plus weighted diversity loss, penalty and code entropy."""
    contrastive: float
    diversity: float
    """Unused fraction of the codebook."""
    penalty: float
    """Mean square of the extractor's output."""
    accuracy: float
    """Fraction of masked frames whose code was identified among the negatives."""
    perplexity: float
    """Effective number of codebook entries in use, over all groups."""
    code_entropy: float
    """Entropy of a frame's code distribution in nats, mean over frames and groups."""
    masked_fraction: float
    distinct_negatives: float
    """Mean number of distinct frames among a frame's negatives."""
    gradient_norm: float
    learning_rate: float
    temperature: float
    applied: bool
    """False if the gradient was not finite and the update was skipped."""
    loss_scale: float
    """By which the loss was multiplied for its gradient; 1 except in fp16."""
    crops: int
    seconds: float
    """Seconds of audio in the update."""

    def metrics(self) -> dict[str, float]:
        """All fields as numbers."""
        return {key: float(value) for key, value in dataclasses.asdict(self).items()}


TOTALS = (
    "contrastive", "penalty", "entropy", "correct", "diversity", "perplexity", "distinct",
    "gradient_norm", "applied", "loss_scale",
)  # fmt: skip
"""What an update adds up on its device, in this order; the last three are set at its end."""


def totals(parts: Sequence[LossParts], draws: Draws) -> Tensor:
    """Sums of a batch: `[7]` fp64 on its device, the first of `TOTALS`.

    Diversity and perplexity are those of the batch; distinct negatives are summed over crops.

    Args:
        parts: of each micro-batch.
        draws: of the batch.
    """
    with torch.no_grad():
        added = [
            torch.stack([getattr(part, name).double() for part in parts]).sum()
            for name in ("contrastive", "penalty", "entropy", "correct")
        ]
        summed = torch.stack([part.probabilities for part in parts]).sum(0)
        mean = summed / draws.masked.numel()
        distinct = (draws.multiplicity > 0).sum(-1).double().mean() * len(draws.masked)
        other = [diversity_loss(mean).double(), perplexity(mean).double(), distinct]
        return torch.stack([*added, *other])


class Counts(NamedTuple):
    """What the host knows of an update."""

    update: int
    batches: int
    crops: int
    masked: int
    """Masked frames of all crops."""
    frames: int
    """Frames of all crops."""
    seconds: float
    """Of audio."""
    rate: float
    """Learning rate."""
    diversity: float
    """Weight of the diversity loss."""
    penalty: float
    """Weight of the feature penalty."""
    entropy: float
    """Weight of the code entropy."""
    temperature: float
    """Of the Gumbel softmax."""


def make_report(counts: Counts, values: Sequence[float]) -> StepReport:
    """The report of an update from its totals, in the order of `TOTALS`."""
    found = dict(zip(TOTALS, values, strict=True))
    contrastive, penalty, entropy = (
        found[name] / counts.masked for name in ("contrastive", "penalty", "entropy")
    )
    diversity = found["diversity"] / counts.batches
    return StepReport(
        update=counts.update,
        loss=contrastive
        + counts.diversity * diversity
        + counts.penalty * penalty
        + counts.entropy * entropy,
        contrastive=contrastive,
        diversity=diversity,
        penalty=penalty,
        accuracy=found["correct"] / counts.masked,
        perplexity=found["perplexity"] / counts.batches,
        code_entropy=entropy,
        masked_fraction=counts.masked / counts.frames,
        distinct_negatives=found["distinct"] / counts.crops,
        gradient_norm=found["gradient_norm"],
        learning_rate=counts.rate,
        temperature=counts.temperature,
        applied=bool(found["applied"]),
        loss_scale=found["loss_scale"],
        crops=counts.crops,
        seconds=counts.seconds,
    )
