"""Predictions of a model on clips, without dropout, and their scores.

Slots are scored by the character error rate of transcripts with slots as tags.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from common.errors import DataError
from ssl_core.downstream import metrics
from ssl_core.downstream.clip_loader import ClipLoader
from ssl_core.downstream.clips import Clip, Trial
from ssl_core.downstream.decoding import Decoder, greedy
from ssl_core.downstream.task_model import Stage
from ssl_core.downstream.task_step import TaskStep
from ssl_core.wav2vec2.precision import autocast


class NoUsableClips(DataError):
    """No clip is usable."""


@dataclasses.dataclass(frozen=True)
class Scored:
    """Predictions for some clips."""

    clips: tuple[Clip, ...]
    expected: tuple[str, ...]
    predicted: tuple[str, ...]
    loss: float
    """Mean over clips, in nats; nats per symbol for CTC."""
    embeddings: Tensor | None
    """`[clip, embedding]`, or None for heads without embedding."""

    def score(self, metric: str) -> float:
        """`accuracy`, `wer` or `cer`; accuracy for `eer`, since single clips are not trials."""
        if metric == "wer":
            return metrics.word_error_rate(self.expected, self.predicted)
        if metric == "cer":
            return metrics.character_error_rate(self.expected, self.predicted)
        return metrics.accuracy(self.expected, self.predicted)


def score_clips(
    step: TaskStep,
    loader: ClipLoader,
    clips: Sequence[Clip],
    size: int,
    decode: Decoder | None = None,
) -> Scored:
    """Run a step's model on clips, without dropout.

    Args:
        step: has the model, plan and device.
        loader: makes batches of the clips.
        clips: to score; unusable ones are skipped.
        size: clips per batch.
        decode: from logits to texts; None decodes greedily.

    Raises:
        NoUsableClips: no clip is usable.
    """
    model, recipe = step.model, step.model.recipe
    decode = decode or greedy(loader.labels)
    order = sorted(clips, key=lambda clip: (clip.piece.samples, clip.name))
    used: list[Clip] = []
    predicted: list[str] = []
    loss, embeddings = 0.0, []
    model.eval()
    try:
        for first in range(0, len(order), size):
            made = loader.batch(order[first : first + size])
            if made is None:
                continue
            batch, chosen = made
            lengths = model.head_lengths(batch.samples, batch.stage)
            with torch.no_grad(), autocast(step.device, step.plan.precision):
                stage: Stage = "mean" if batch.stage == "mean" else "frames"
                x = model.advance(batch.on(step.device), batch.samples, batch.stage, stage)
                # As in training, a head on a frozen backbone computes in fp32.
                with autocast(step.device, step.plan.precision if step.unfrozen else "fp32"):
                    prediction = model.predict(x, batch.samples, stage)
            losses = model.head.losses(prediction, lengths, batch.targets.to(step.device))
            loss += float(losses.sum())
            if recipe.transcribes:
                predicted += decode(prediction.logits, lengths)
            else:
                best = prediction.logits.argmax(1).tolist()
                predicted += [loader.labels[place] for place in best]
            if prediction.embedding is not None:
                embeddings.append(prediction.embedding.float().cpu())
            used += chosen
    finally:
        model.train()
    if not used:
        raise NoUsableClips(f"none of the clips can be used, such as: {loader.examples[0]}")
    expected = tuple(clip.text if recipe.transcribes else clip.label for clip in used)
    return Scored(
        tuple(used),
        expected,
        tuple(predicted),
        loss / len(used),
        torch.cat(embeddings) if embeddings else None,
    )


def verify(scored: Scored, trials: Sequence[Trial]) -> tuple[float, float, list[float]]:
    """Equal error rate of trials, its threshold, and the cosine of each trial.

    Raises:
        DataError: a trial's clip was skipped.
    """
    assert scored.embeddings is not None
    unit = torch.nn.functional.normalize(scored.embeddings, dim=1)
    places = {clip.piece.path: row for row, clip in enumerate(scored.clips)}
    lost = sorted({path for t in trials for path in (t.first, t.second)} - places.keys())
    if lost:
        raise DataError(f"{len(lost)} files of the trials cannot be used, such as {lost[0]}")
    rows = [(places[trial.first], places[trial.second]) for trial in trials]
    firsts, seconds = (list(column) for column in zip(*rows, strict=True))
    cosines = (unit[firsts] * unit[seconds]).sum(1).tolist()
    rate, threshold = metrics.equal_error_rate(cosines, [trial.same for trial in trials])
    return rate, threshold, cosines
