"""A task's head on a backbone, or on log-mel frames as a baseline."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from partitions.sampling import SAMPLE_RATE
from ssl_core.downstream.heads import Prediction, TaskHead, make_head, mean_over_frames
from ssl_core.downstream.task_recipe import TaskRecipe
from ssl_core.training import hf_checkpoint as hf
from ssl_core.training import randomness
from ssl_core.wav2vec2 import packing
from ssl_core.wav2vec2.config import preset
from ssl_core.wav2vec2.model import Backbone, PretrainingModel, Undrawn
from ssl_core.wav2vec2.precision import at_least_fp32

RANDOM, LOGMEL = "random", "logmel"
"""Instead of a checkpoint: a backbone with initial weights, and log-mel frames."""

EXTRACTOR = "wav2vec2.feature_extractor."
"""Prefix of the convolutions' parameter names."""

Stage = Literal["waveform", "extracted", "frames", "mean"]
"""How far a clip has been processed: waveform, extractor output, last hidden states, or their mean
over frames."""

Inputs = Sequence[Tensor] | Tensor
"""A batch: waveforms `[sample]`; extractor output `[clip, frame, channel]`, packed (see
`packing`) where lengths differ; or padded frames or means, `[clip, frame, feature]`."""


class LogMel(nn.Module):
    """80 log-mel filters every 20 ms, as a baseline for features of a backbone.

    Constants scale them to about the spread of hidden states. Normalising each clip instead would
    leave nothing for a head that pools.
    """

    WIDTH, WINDOW, HOP = 80, 400, 320

    def __init__(self) -> None:
        super().__init__()
        import torchaudio  # imported late: takes memory and time, and is only needed here

        self.filters = torchaudio.transforms.MelSpectrogram(
            SAMPLE_RATE, n_fft=self.WINDOW, hop_length=self.HOP, n_mels=self.WIDTH, center=False
        )
        # Rounded mean and standard deviation over LibriSpeech and Speech Commands.
        self.register_buffer("usual", torch.tensor([-5.0, 4.0]))

    def frames(self, samples: int) -> int:
        """Frames in a clip of `samples` samples."""
        return max(0, (samples - self.WINDOW) // self.HOP + 1)

    def forward(self, waveforms: Tensor) -> Tensor:
        """`[clip, sample]` to `[clip, frame, filter]`, without padding at the ends."""
        logs = (self.filters(waveforms) + 1e-6).log().transpose(1, 2)
        mean, deviation = self.get_buffer("usual")
        return (logs - mean) / deviation


class Upstream(NamedTuple):
    """A network from waveforms to frames, and its source."""

    network: Backbone | LogMel
    name: str
    """Checkpoint as given by the user."""
    normalise: bool
    """Whether waveforms are normalised to mean 0 and variance 1, as in pretraining."""
    unused: tuple[str, ...] = ()
    """Names of the checkpoint's other parts, such as the quantizer or the head of a task."""

    @property
    def note(self) -> str:
        """What of the checkpoint is not used, in one line; may be empty."""
        if not self.unused:
            return ""
        return (
            f"{self.name}: its backbone is used, not its {', '.join(self.unused)}; the head of the "
            "task is trained anew, with the labels of the corpus"
        )

    @property
    def width(self) -> int:
        """Features per frame."""
        network = self.network
        return network.config.hidden_size if isinstance(network, Backbone) else network.WIDTH

    def frames(self, samples: int) -> int:
        """Frames in a clip of `samples` samples."""
        network = self.network
        return (network.config if isinstance(network, Backbone) else network).frames(samples)

    def digest(self, stage: Stage) -> str:
        """Digest of the weights and settings that determine the output at a stage."""
        digest = hashlib.sha256(json.dumps([self.normalise, type(self.network).__name__]).encode())
        if isinstance(self.network, Backbone):
            digest.update(json.dumps(self.network.config.to_hf(), sort_keys=True).encode())
        part = EXTRACTOR.removeprefix("wav2vec2.") if stage == "extracted" else ""
        for name, value in sorted(self.network.state_dict().items()):
            if not name.startswith(part):
                continue
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


def load_upstream(checkpoint: str, model: str, seed: int) -> Upstream:
    """Load a backbone from a checkpoint, or make a baseline.

    Args:
        checkpoint: a directory of this project, or of a wav2vec 2.0 of transformers; `random` for
            a backbone with initial weights; `logmel` for log-mel frames.
        model: preset for `random`.
        seed: of the weights for `random`.

    Raises:
        DataError: missing, or a checkpoint of another model.
        UsageError: no such preset.
    """
    if checkpoint == LOGMEL:
        return Upstream(LogMel(), LOGMEL, False)
    if checkpoint == RANDOM:
        with randomness.torch_seed(torch.device("cpu"), seed, "weights"):
            return Upstream(PretrainingModel(preset(model)).wav2vec2, RANDOM, False)
    path = Path(checkpoint)
    config = hf.load_config(path)
    with Undrawn():
        backbone = Backbone(config)
    unused = load_backbone(backbone, hf.load_weights(path), checkpoint)
    return Upstream(backbone, checkpoint, config.do_normalize, unused)


def load_backbone(backbone: Backbone, weights: dict[str, Tensor], where: str) -> tuple[str, ...]:
    """Load a backbone's weights from those of any model that contains it.

    Heads and quantiser are ignored. The mask embedding may be missing; fine-tuning does not use it.

    Args:
        backbone: to load into.
        weights: by parameter name, `[*parameter shape]` each.
        where: source of the weights, for errors.

    Returns:
        Names of the other parts that `weights` have.

    Raises:
        DataError: a missing, unexpected or wrongly shaped tensor.
    """
    prefix, unused = "wav2vec2.", tuple[str, ...]()
    if any(name.startswith(prefix) for name in weights):
        weights, unused = hf.take_parts(weights, ("wav2vec2",))
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    own = backbone.state_dict()
    if "masked_spec_embed" not in weights:
        weights["masked_spec_embed"] = torch.zeros_like(own["masked_spec_embed"])
    hf.load_into(backbone, weights, where)
    return unused


class TaskModel(nn.Module):
    """Upstream and head; parameter names begin with `wav2vec2.` and `head.`."""

    def __init__(self, upstream: Upstream, head: TaskHead, recipe: TaskRecipe) -> None:
        """Join upstream and head.

        Args:
            upstream: backbone or log-mel frames.
            head: of the task.
            recipe: says whether to train the convolutions of an unfrozen backbone.
        """
        super().__init__()
        self.upstream, self.recipe, self.head = upstream, recipe, head
        network = upstream.network
        self.wav2vec2 = network if isinstance(network, Backbone) else None
        self.logmel = network if isinstance(network, LogMel) else None

    @classmethod
    def new(cls, upstream: Upstream, recipe: TaskRecipe, labels: int, seed: int) -> "TaskModel":
        """Make a model whose head has initial weights.

        Args:
            upstream: backbone or log-mel frames.
            recipe: says which head.
            labels: number of classes, or of symbols without the blank.
            seed: of the head's weights.
        """
        with randomness.torch_seed(torch.device("cpu"), seed, "head"):
            return cls(upstream, make_head(recipe, upstream.width, labels), recipe)

    def trainable(self, unfrozen: bool) -> frozenset[str]:
        """Names of the trained parameters: the head's, and an unfrozen backbone's.

        Convolutions are trained only if the recipe says so, the mask embedding never.
        """
        still = ["wav2vec2.masked_spec_embed"]
        if not unfrozen:
            still.append("wav2vec2.")
        elif not self.recipe.train_extractor:
            still.append(EXTRACTOR)
        names = [name for name, _ in self.named_parameters()]
        return frozenset(name for name in names if not name.startswith(tuple(still)))

    def width(self, stage: Stage) -> int:
        """Features per frame at a stage."""
        if stage == "extracted" and self.wav2vec2 is not None:
            return self.wav2vec2.config.conv_dim[-1]
        return self.upstream.width

    def extract(self, waveforms: Iterable[Tensor]) -> Tensor:
        """Extractor output of waveforms `[sample]`: `[clip, frame, channel]`, maybe packed."""
        assert self.wav2vec2 is not None
        return self.wav2vec2.extract(waveforms)

    def contextualise(
        self,
        extracted: Tensor,
        samples: Sequence[int],
        seeds: Tensor | None = None,
        keep: Sequence[bool] | None = None,
    ) -> Tensor:
        """From extractor output to the last hidden states, `[clip, frame, feature]`, padded.

        Args:
            extracted: `[clip, frame, channel]`, or packed if lengths differ.
            samples: of each clip's waveform.
            seeds: `[clip]`, for dropout; None for no dropout.
            keep: whether to run each layer (layer drop); None runs all.
        """
        assert self.wav2vec2 is not None
        lengths = self.head_lengths(samples, "frames")
        packed = packing.packed_lengths(lengths)
        return packing.pad(self.wav2vec2.contextualise(extracted, packed, seeds, keep), lengths)

    def advance(self, x: Inputs, samples: Sequence[int], start: Stage, end: Stage) -> Tensor:
        """Take a batch from one stage to a later one, without dropout.

        Args:
            x: batch at stage `start`, `[clip, frame, feature]`, or as in `Inputs`.
            samples: of each clip's waveform.
            start: current stage.
            end: wanted stage, not before `start`.

        Returns:
            The batch at stage `end`, `[clip, frame, feature]`, or as in `Inputs`.
        """
        if start != "waveform":
            assert isinstance(x, Tensor)
        elif self.logmel is not None:
            frames = [self.logmel(clip[None])[0] for clip in x]
            x, start = torch.nn.utils.rnn.pad_sequence(frames, batch_first=True), "frames"
        else:
            x, start = self.extract(x), "extracted"
        if start == "extracted" and end in ("frames", "mean"):
            x, start = self.contextualise(x, samples), "frames"
        if start == "frames" and end == "mean":
            lengths = self.head_lengths(samples, "frames")
            x = mean_over_frames(at_least_fp32(x), lengths)[:, None]
        return x

    def separate(self, x: Tensor, samples: Sequence[int], stage: Stage) -> list[Tensor]:
        """Split a batch into its clips, without padding.

        Args:
            x: batch after `waveform`, see `Inputs` for shapes.
            samples: of each clip's waveform.
            stage: of the batch.

        Returns:
            `[frame, feature]` for each clip.
        """
        lengths = self.head_lengths(samples, stage)
        if stage == "extracted":
            return list(packing.split(x, lengths))
        return [clip[:own] for clip, own in zip(x, lengths, strict=True)]

    def predict(self, x: Inputs, samples: Sequence[int], start: Stage) -> Prediction:
        """Output of the head for a batch, without dropout.

        Args:
            x: batch at stage `start`, see `Inputs` for shapes.
            samples: of each clip's waveform.
            start: stage of the batch.
        """
        x = self.advance(x, samples, start, "frames" if start != "mean" else "mean")
        return self.head(at_least_fp32(x), self.head_lengths(samples, start))

    def head_lengths(self, samples: Sequence[int], stage: Stage) -> list[int]:
        """Frames per clip in the head's input."""
        return [1 if stage == "mean" else self.upstream.frames(own) for own in samples]
