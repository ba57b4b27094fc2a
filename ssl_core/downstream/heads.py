"""Heads of the downstream tasks, on `[clip, frame, feature]` with the frames of each clip.

Padded frames never reach a result: a clip gets in a batch what it gets alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_core.downstream.task_recipe import TaskRecipe
from ssl_core.wav2vec2.context import take_frames
from ssl_core.wav2vec2.dropout import Dropout
from ssl_core.wav2vec2.packing import frame_mask

BLANK = 0
"""Index of CTC's blank; symbols follow it."""

_DROPOUT_SITE = 100
"""Above the backbone's."""


class Prediction(NamedTuple):
    """What a head makes of a batch."""

    logits: Tensor
    """`[clip, class]`; of a head that transcribes `[clip, frame, symbol]`."""
    embedding: Tensor | None
    """`[clip, embedding]` of heads that have one, else None."""


class TaskHead(nn.Module):
    """What every head has."""

    pools = False
    """Whether the head looks at nothing but the mean over a clip's frames."""

    def forward(self, x: Tensor, lengths: Sequence[int], seeds: Tensor | None = None) -> Prediction:
        """What a head makes of frames.

        Args:
            x: `[clip, frame, feature]`, or their means as `[clip, 1, feature]` for one that pools.
            lengths: frames of each clip.
            seeds: `[clip]`, for dropout; None drops nothing.
        """
        raise NotImplementedError

    def losses(self, prediction: Prediction, lengths: Sequence[int], targets: Tensor) -> Tensor:
        """`[clip]`: nats of each clip; `targets` as `Batch.targets`."""
        return F.cross_entropy(prediction.logits.float(), targets, reduction="none")


def mean_over_frames(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """`[clip, frame, feature]` to `[clip, feature]`, of frames that are not padding."""
    counts = torch.tensor(lengths, dtype=x.dtype, device=x.device)[:, None]
    return (x * frame_mask(lengths, x)).sum(1) / counts


class MeanLinear(TaskHead):
    """The mean over frames and a linear layer (keywords, emotion)."""

    pools = True

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, classes)

    def forward(self, x: Tensor, lengths: Sequence[int], seeds: Tensor | None = None) -> Prediction:
        """See `TaskHead.forward`."""
        return Prediction(self.linear(mean_over_frames(x, lengths)), None)


class _Transcriber(TaskHead):
    def losses(self, prediction: Prediction, lengths: Sequence[int], targets: Tensor) -> Tensor:
        """CTC, a symbol's share of it: the loss of a clip divided by its symbols.

        `targets`: `[clip, symbol]`, padded with the blank. A text that does not fit into its clip's
        frames has no loss and teaches nothing.
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
        self.linear = nn.Linear(features, symbols)

    def forward(self, x: Tensor, lengths: Sequence[int], seeds: Tensor | None = None) -> Prediction:
        """See `TaskHead.forward`."""
        return Prediction(self.linear(x), None)


class LstmCTC(_Transcriber):
    """A bidirectional LSTM and a linear layer on every frame (slots, speech recognition).

    Both directions are plain LSTMs on padded batches, the second on every clip turned round within
    its own frames: on a CPU that is four times as fast as torch's bidirectional LSTM on a packed
    sequence, with the same result.
    """

    def __init__(
        self, features: int, symbols: int, layers: int, units: int, dropout: float
    ) -> None:
        super().__init__()
        widths = [features, *(2 * units for _ in range(layers - 1))]
        self.forwards = nn.ModuleList(nn.LSTM(width, units, batch_first=True) for width in widths)
        self.backwards = nn.ModuleList(nn.LSTM(width, units, batch_first=True) for width in widths)
        self.dropouts = [Dropout(dropout, _DROPOUT_SITE + layer) for layer in range(layers)]
        self.linear = nn.Linear(2 * units, symbols)

    def forward(self, x: Tensor, lengths: Sequence[int], seeds: Tensor | None = None) -> Prediction:
        """See `TaskHead.forward`."""
        turned = _turned(lengths, x)
        # On a CPU, torch's LSTM fails under autocast.
        halves = torch.is_autocast_enabled(x.device.type) and x.device.type != "cpu"
        with torch.autocast(x.device.type, enabled=halves):
            for ahead, back, dropout in zip(
                self.forwards, self.backwards, self.dropouts, strict=True
            ):
                reverse = take_frames(back(take_frames(x, turned))[0], turned)
                x = dropout(torch.cat([ahead(x)[0], reverse], 2), seeds)
        return Prediction(self.linear(x), None)


def _turned(lengths: Sequence[int], x: Tensor) -> Tensor:
    """`[clip, frame]`: where each frame stands when every clip is turned round; padding stays."""
    ends = torch.tensor(lengths, device=x.device)[:, None]
    places = torch.arange(x.shape[1], device=x.device)
    return torch.where(places < ends, ends - 1 - places, places)


class XVector(TaskHead):
    """Five time-delay layers, mean and deviation over time, an embedding (Snyder et al., 2018).

    Widths, taps and dilations are the original's. Each frame is normalised over its channels rather
    than over the batch: what a clip gives then depends neither on the clips beside it nor on how a
    batch is split, and federated clients share no statistics of their audio.
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
        self.embedding = nn.Linear(2 * self.CHANNELS[-1], self.EMBEDDING)
        self.norm = nn.LayerNorm(self.EMBEDDING)
        self.linear = nn.Linear(self.EMBEDDING, classes)

    def forward(self, x: Tensor, lengths: Sequence[int], seeds: Tensor | None = None) -> Prediction:
        """See `TaskHead.forward`."""
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
    """A task's head with initial weights from torch's global generator.

    Args:
        recipe: of the task.
        features: width of a frame.
        labels: classes, or symbols without the blank.
    """
    if recipe.head == "mean-linear":
        return MeanLinear(features, labels)
    if recipe.head == "x-vector":
        return XVector(features, labels)
    if recipe.head == "linear-ctc":
        return LinearCTC(features, labels + 1)
    return LstmCTC(features, labels + 1, recipe.lstm_layers, recipe.lstm_units, recipe.dropout)
