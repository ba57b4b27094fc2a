"""Evaluation on held-out speakers, with the same crops, masks and negatives every time."""

import dataclasses

import torch

from partitions.sampling import SAMPLE_RATE
from ssl_core.training import randomness
from ssl_core.training.crops import CropBatch
from ssl_core.wav2vec2.chance import draw
from ssl_core.wav2vec2.model import PretrainingModel
from ssl_core.wav2vec2.precision import autocast
from ssl_core.wav2vec2.quantizer import perplexity


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Means over all masked frames of the held-out crops."""

    loss: float
    """Contrastive loss in nats."""
    accuracy: float
    perplexity: float
    """Code perplexity over all crops at once, summed over groups."""
    crops: int
    seconds: float


def evaluate(
    model: PretrainingModel,
    crops: CropBatch,
    *,
    chunk: int,
    device: torch.device,
    seed: int = 0,
    precision: str = "fp32",
) -> Evaluation:
    """Compute contrastive loss and accuracy without dropout or Gumbel noise.

    Args:
        model: set to evaluation mode meanwhile.
        crops: from `Crops.fixed`; waveforms `[crop, sample]`.
        chunk: crops per forward pass; the result does not depend on it.
        device: that holds the model.
        seed: of masks and negatives.
        precision: `fp32`, or `bf16` for matrix products in bfloat16.
    """
    was_training = model.training
    model.eval()
    loss, correct, masked = 0.0, 0, 0
    total = None
    try:
        for first in range(0, len(crops.waveforms), chunk):
            waveforms = crops.waveforms[first : first + chunk]
            parts = [
                draw(
                    model.config,
                    1,
                    waveforms.shape[1],
                    randomness.generator(seed, "evaluation", first + row),
                    training=False,
                )
                for row in range(len(waveforms))
            ]
            draws = parts[0]._replace(
                masked=torch.cat([part.masked for part in parts]),
                multiplicity=torch.cat([part.multiplicity for part in parts]),
            )
            with torch.inference_mode(), autocast(device, precision):
                features = model.features(torch.from_numpy(waveforms).to(device))
                sums = model.loss_parts(features, draws.to(device), 1.0)
            loss += float(sums.contrastive)
            correct += int(sums.correct)
            masked += draws.masked.numel()
            total = sums.probabilities if total is None else total + sums.probabilities
    finally:
        model.train(was_training)
    assert total is not None
    samples = crops.waveforms.size
    return Evaluation(
        loss=loss / masked,
        accuracy=correct / masked,
        perplexity=float(perplexity(total / masked)),
        crops=len(crops.waveforms),
        seconds=samples / SAMPLE_RATE,
    )
