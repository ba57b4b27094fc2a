"""A backbone, or log-mel frames as a floor, with a task's head on it."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from common.errors import DataError
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
"""Names given in place of a checkpoint: a backbone as it is initialised, and no backbone."""

EXTRACTOR = "wav2vec2.feature_extractor."
"""How the names of the convolutions' parameters begin."""

Stage = Literal["waveform", "extracted", "frames", "mean"]
"""How far a clip has come: its waveform, the extractor's output, the last hidden states, their mean
over frames."""


Inputs = Sequence[Tensor] | Tensor
"""A batch: waveforms, `[sample]` each; the extractor's output, `[clip, frame, channel]` or packed
(`packing`); frames or their means, `[clip, frame, feature]`, padded."""


class LogMel(nn.Module):
    """80 log-mel filters every 20 ms, about as spread out as hidden states: a floor for features.

    They are shifted and scaled by constants: of frames with the mean of their clip taken away, a
    head that pools would see nothing.
    """

    WIDTH, WINDOW, HOP = 80, 400, 320

    def __init__(self) -> None:
        super().__init__()
        import torchaudio  # takes memory and time that nothing else here asks for

        self.filters = torchaudio.transforms.MelSpectrogram(
            SAMPLE_RATE, n_fft=self.WINDOW, hop_length=self.HOP, n_mels=self.WIDTH, center=False
        )
        # Mean and deviation of LibriSpeech and Speech Commands, rounded.
        self.register_buffer("usual", torch.tensor([-5.0, 4.0]))

    def frames(self, samples: int) -> int:
        """Frames of a clip."""
        return max(0, (samples - self.WINDOW) // self.HOP + 1)

    def forward(self, waveforms: Tensor) -> Tensor:
        """`[clip, sample]` to `[clip, frame, filter]`; no frame reaches beyond its clip."""
        logs = (self.filters(waveforms) + 1e-6).log().transpose(1, 2)
        mean, deviation = self.get_buffer("usual")
        return (logs - mean) / deviation


class Upstream(NamedTuple):
    """What turns waveforms into frames, and where it comes from."""

    network: Backbone | LogMel
    name: str
    """As the user gave it."""
    normalise: bool
    """Whether waveforms are brought to mean 0 and variance 1, as the checkpoint was trained."""

    @property
    def width(self) -> int:
        """Numbers in a frame."""
        network = self.network
        return network.config.hidden_size if isinstance(network, Backbone) else network.WIDTH

    def frames(self, samples: int) -> int:
        """Frames of a clip of so many samples."""
        network = self.network
        return (network.config if isinstance(network, Backbone) else network).frames(samples)

    def digest(self, stage: Stage) -> str:
        """Of everything that decides what a waveform gives at a stage."""
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
    """A backbone by its checkpoint directory, or a floor.

    Args:
        checkpoint: a directory of this project or of any wav2vec 2.0 of transformers; `random`, a
            backbone as it is initialised; `logmel`, no backbone.
        model: the preset of `random`.
        seed: of its weights.

    Raises:
        DataError: no checkpoint there, or one of another model.
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
    load_backbone(backbone, hf.load_weights(path), checkpoint)
    return Upstream(backbone, checkpoint, _normalises(path))


def load_backbone(backbone: Backbone, weights: dict[str, Tensor], where: str) -> None:
    """Copy a backbone's weights by name out of those of any model that has one.

    Heads and the quantiser are left aside. The mask's embedding, which fine-tuning does without,
    may be missing.

    Raises:
        DataError: a missing, unexpected or wrongly shaped tensor; `where` names the source.
    """
    prefix = "wav2vec2."
    if any(name.startswith(prefix) for name in weights):
        weights = {n.removeprefix(prefix): v for n, v in weights.items() if n.startswith(prefix)}
    own = backbone.state_dict()
    if "masked_spec_embed" not in weights:
        weights["masked_spec_embed"] = torch.zeros_like(own["masked_spec_embed"])
    hf.load_into(backbone, weights, where)


def _normalises(path: Path) -> bool:
    file = path / "preprocessor_config.json"
    try:
        return bool(json.loads(file.read_text(encoding="utf-8")).get("do_normalize", False))
    except FileNotFoundError:
        return False
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{file} cannot be read: {error}") from None


class TaskModel(nn.Module):
    """Upstream and head; parameter names begin with `wav2vec2.` and `head.`."""

    def __init__(self, upstream: Upstream, head: TaskHead, recipe: TaskRecipe) -> None:
        """`recipe` says whether an unfrozen backbone's convolutions are trained."""
        super().__init__()
        self.upstream, self.recipe, self.head = upstream, recipe, head
        network = upstream.network
        self.wav2vec2 = network if isinstance(network, Backbone) else None
        self.logmel = network if isinstance(network, LogMel) else None

    @classmethod
    def new(cls, upstream: Upstream, recipe: TaskRecipe, labels: int, seed: int) -> "TaskModel":
        """A model whose head has initial weights by the seed."""
        with randomness.torch_seed(torch.device("cpu"), seed, "head"):
            return cls(upstream, make_head(recipe, upstream.width, labels), recipe)

    def trainable(self, unfrozen: bool) -> frozenset[str]:
        """Names of the parameters that are trained: the head's, and an unfrozen backbone's.

        The mask's embedding is never, the convolutions only if the recipe says so.
        """
        left_out = ["wav2vec2.masked_spec_embed"]
        if not unfrozen:
            left_out.append("wav2vec2.")
        elif not self.recipe.train_extractor:
            left_out.append(EXTRACTOR)
        names = [name for name, _ in self.named_parameters()]
        return frozenset(name for name in names if not name.startswith(tuple(left_out)))

    def width(self, stage: Stage) -> int:
        """Numbers in a frame at a stage."""
        if stage == "extracted" and self.wav2vec2 is not None:
            return self.wav2vec2.config.conv_dim[-1]
        return self.upstream.width

    def extract(self, waveforms: Iterable[Tensor]) -> Tensor:
        """The extractor's output for clips of `[sample]`: `[clip, frame, channel]` or packed."""
        assert self.wav2vec2 is not None
        return self.wav2vec2.extract(waveforms)

    def contextualise(
        self,
        extracted: Tensor,
        samples: Sequence[int],
        seeds: Tensor | None = None,
        keep: Sequence[bool] | None = None,
    ) -> Tensor:
        """The extractor's output to the last hidden states, `[clip, frame, feature]`, padded."""
        assert self.wav2vec2 is not None
        lengths = self.head_lengths(samples, "frames")
        packed = packing.packed_lengths(lengths)
        return packing.pad(self.wav2vec2.contextualise(extracted, packed, seeds, keep), lengths)

    def advance(self, x: Inputs, samples: Sequence[int], start: Stage, end: Stage) -> Tensor:
        """Take a batch from one stage to a later one, without dropout.

        Args:
            x: of stage `start`, see `Inputs`.
            samples: of each clip's waveform.
            start: where it is.
            end: where it is to be.
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
        """The clips of a batch that has come to a stage, `[frame, ...]` each."""
        lengths = self.head_lengths(samples, stage)
        if stage == "extracted":
            return list(packing.split(x, lengths))
        return [clip[:own] for clip, own in zip(x, lengths, strict=True)]

    def predict(self, x: Inputs, samples: Sequence[int], start: Stage) -> Prediction:
        """What the head makes of a batch at any stage, without dropout."""
        x = self.advance(x, samples, start, "frames" if start != "mean" else "mean")
        return self.head(at_least_fp32(x), self.head_lengths(samples, start))

    def head_lengths(self, samples: Sequence[int], stage: Stage) -> list[int]:
        """Frames of each clip as the head sees them."""
        return [1 if stage == "mean" else self.upstream.frames(own) for own in samples]
