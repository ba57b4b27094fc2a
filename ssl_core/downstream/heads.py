"""Heads of downstream tasks.

Padding does not affect results: a clip in a batch gives what it gives alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_core.downstream.task_recipe import TaskRecipe
from ssl_core.wav2vec2.context import take_frames
from ssl_core.wav2vec2.cpu.products import Linear
from ssl_core.wav2vec2.dropout import Dropout
from ssl_core.wav2vec2.packing import frame_mask

BLANK = 0
"""Index of the CTC blank; symbols follow it."""

_DROPOUT_SITE = 100
"""First dropout site of heads, above the backbone's."""


class Prediction(NamedTuple):
    """Output of a head."""

    logits: Tensor
    """`[clip, class]`, or `[clip, frame, symbol]` for transcription."""
    embedding: Tensor | None
    """`[clip, embedding]`, or None for heads without embedding."""


class TaskHead(nn.Module):
    """Base class of heads."""

    pools = False
    """Whether the head only uses the mean over a clip's frames."""

    def forward(self, x: Tensor, lengths: Sequence[int], seeds: Tensor | None = None) -> Prediction:
        """Compute logits.

        Args:
            x: `[clip, frame, feature]`, or means `[clip, 1, feature]` if the head pools.
            lengths: frames of each clip.
            seeds: `[clip]`, for dropout; None for no dropout.
        """
        raise NotImplementedError

    def losses(self, prediction: Prediction, lengths: Sequence[int], targets: Tensor) -> Tensor:
        """Loss of each clip in nats, `[clip]`.

        Args:
            prediction: from `forward`.
            lengths: frames of each clip.
            targets: as `Batch.targets`: `[clip]`, or `[clip, symbol]` for transcription.
        """
        return F.cross_entropy(prediction.logits.float(), targets, reduction="none")


def mean_over_frames(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """Mean over frames without padding, `[clip, frame, feature]` to `[clip, feature]`."""
    counts = torch.tensor(lengths, dtype=x.dtype, device=x.device)[:, None]
    return (x * frame_mask(lengths, x)).sum(1) / counts


class MeanLinear(TaskHead):
    """Mean over frames and a linear layer (keywords, emotion)."""

    pools = True

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.linear = Linear(features, classes)

    def forward(self, x: Tensor, lengths: Sequence[int], seeds: Tensor | None = None) -> Prediction:
        """Compute logits `[clip, class]`.

        Args:
            x: `[clip, frame, feature]`, or means `[clip, 1, feature]`.
            lengths: frames of each clip.
            seeds: `[clip]`, for dropout; unused.
        """
        return Prediction(self.linear(mean_over_frames(x, lengths)), None)


class _Transcriber(TaskHead):
    def losses(self, prediction: Prediction, lengths: Sequence[int], targets: Tensor) -> Tensor:
        """CTC loss of each clip divided by its number of symbols, `[clip]`.

        `targets` are `[clip, symbol]`, padded with the blank. The loss is 0 if a text has more
        symbols than CTC can align to the clip's frames.
        """
        counts = (targets != BLANK).sum(1)
        losses = F.ctc_loss(
            prediction.logits.float().log_softmax(-1).transpose(0, 1),
            targets,
            torch.tensor(lengths),
            counts,
            blank=BLANK,
            reduction="none",
            zero_infinity=True,
        )
        return losses / counts.clamp_min(1).to(losses.device)


class LinearCTC(_Transcriber):
    """A linear layer on every frame, as in `Wav2Vec2ForCTC`."""

    def __init__(self, features: int, symbols: int) -> None:
        super().__init__()
        self.linear = Linear(features, symbols)

    def forward(self, x: Tensor, lengths: Sequence[int], seeds: Tensor | None = None) -> Prediction:
        """Compute logits `[clip, frame, symbol]`.

        Args:
            x: `[clip, frame, feature]`.
            lengths: frames of each clip.
            seeds: `[clip]`, for dropout; unused.
        """
        return Prediction(self.linear(x), None)


class LstmCTC(_Transcriber):
    """A bidirectional LSTM and a linear layer on every frame (slots, speech recognition).

    Both directions are plain LSTMs on padded batches, the second on clips reversed within their
    own frames. On a CPU this is four times as fast as torch's bidirectional LSTM on a packed
    sequence, with the same result.
    """

    def __init__(
        self, features: int, symbols: int, layers: int, units: int, dropout: float
    ) -> None:
        """Initialise from torch's global generator.

        Args:
            features: per frame.
            symbols: with the blank.
            layers: of the LSTM.
            units: per direction.
            dropout: rate after each LSTM layer.
        """
        super().__init__()
        widths = [features, *(2 * units for _ in range(layers - 1))]
        self.forwards = nn.ModuleList(nn.LSTM(width, units, batch_first=True) for width in widths)
        self.backwards = nn.ModuleList(nn.LSTM(width, units, batch_first=True) for width in widths)
        self.dropouts = [Dropout(dropout, _DROPOUT_SITE + layer) for layer in range(layers)]
        self.linear = Linear(2 * units, symbols)

    def forward(self, x: Tensor, lengths: Sequence[int], seeds: Tensor | None = None) -> Prediction:
        """Compute logits `[clip, frame, symbol]`.

        Args:
            x: `[clip, frame, feature]`.
            lengths: frames of each clip.
            seeds: `[clip]`, for dropout; None for no dropout.
        """
        reversal = _reversal(lengths, x)
        # On a CPU, torch's LSTM fails under autocast.
        enabled = torch.is_autocast_enabled(x.device.type) and x.device.type != "cpu"
        with torch.autocast(x.device.type, enabled=enabled):
            for ahead, back, dropout in zip(
                self.forwards, self.backwards, self.dropouts, strict=True
            ):
                reverse = take_frames(back(take_frames(x, reversal))[0], reversal)
                x = dropout(torch.cat([ahead(x)[0], reverse], 2), seeds)
        return Prediction(self.linear(x), None)


def _reversal(lengths: Sequence[int], x: Tensor) -> Tensor:
    """Frame indices `[clip, frame]` that reverse each clip and keep its padding in place."""
    ends = torch.tensor(lengths, device=x.device)[:, None]
    places = torch.arange(x.shape[1], device=x.device)
    return torch.where(places < ends, ends - 1 - places, places)


class XVector(TaskHead):
    """Five time-delay layers, mean and deviation over time, an embedding (Snyder et al., 2018).

    Widths, taps and dilations are the original's. Layer norm replaces batch norm: the result for a
    clip then depends neither on the rest of the batch nor on how the batch is split, and federated
    clients share no statistics of their audio.
    """

    CHANNELS = (512, 512, 512, 512, 1500)
    TAPS = (5, 3, 3, 1, 1)
    DILATIONS = (1, 2, 3, 1, 1)
    EMBEDDING = 512

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        widths = (features, *self.CHANNELS)
        self.layers = nn.ModuleList(
            nn.Conv1d(before, after, taps, dilation=dilation, padding=dilation * (taps // 2))
            for before, after, taps, dilation in zip(
                widths, self.CHANNELS, self.TAPS, self.DILATIONS, strict=False
            )
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in self.CHANNELS)
        self.embedding = Linear(2 * self.CHANNELS[-1], self.EMBEDDING)
        self.norm = nn.LayerNorm(self.EMBEDDING)
        self.linear = Linear(self.EMBEDDING, classes)

    def forward(self, x: Tensor, lengths: Sequence[int], seeds: Tensor | None = None) -> Prediction:
        """Compute logits `[clip, class]` and embeddings `[clip, embedding]`.

        Args:
            x: `[clip, frame, feature]`.
            lengths: frames of each clip.
            seeds: `[clip]`, for dropout; unused.
        """
        mask = frame_mask(lengths, x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = layer((x * mask).transpose(1, 2)).transpose(1, 2)
            x = norm(F.leaky_relu(x))
        x = x.float()
        mean = mean_over_frames(x, lengths)
        variance = mean_over_frames((x - mean[:, None]).square(), lengths)
        embedding = self.embedding(torch.cat([mean, (variance + 1e-5).sqrt()], 1))
        return Prediction(self.linear(self.norm(F.leaky_relu(embedding))), embedding)


def make_head(recipe: TaskRecipe, features: int, labels: int) -> TaskHead:
    """Make the head of a task, initialised from torch's global generator.

    Args:
        recipe: of the task.
        features: per frame.
        labels: classes, or symbols without the blank.
    """
    if recipe.head == "mean-linear":
        return MeanLinear(features, labels)
    if recipe.head == "x-vector":
        return XVector(features, labels)
    if recipe.head == "linear-ctc":
        return LinearCTC(features, labels + 1)
    return LstmCTC(features, labels + 1, recipe.lstm_layers, recipe.lstm_units, recipe.dropout)
