"""The frozen part of a task's model, as a function from waveforms to features."""

import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from ssl_core.downstream.task_model import Stage
from ssl_core.downstream.task_step import TaskStep
from ssl_core.wav2vec2.features import normalised
from ssl_core.wav2vec2.precision import autocast

_KEYS = 2
"""Raise it when clips are keyed, read or passed through a model in another way. Cached files of
another number are not used, and are deleted when room is needed."""


class FrozenPart:
    """Takes waveforms to the stage from which a step trains."""

    def __init__(self, step: TaskStep) -> None:
        """Share the model of a step."""
        self._step, self._upstream = step, step.model.upstream
        self.stage: Stage = step.stage
        """Stage of the output; "waveform" if nothing is frozen."""
        self.width = step.model.width(self.stage)
        """Features per frame at this stage."""
        self._lock = threading.Lock()
        """The decoding thread and the evaluating thread share the model."""

    @property
    def makes_features(self) -> bool:
        """Whether anything is frozen, so that there are features to compute."""
        return self.stage != "waveform"

    def identity(self) -> str:
        """Name of everything that determines the features: weights, stage and precision."""
        digest = self._upstream.digest(self.stage) if self.makes_features else ""
        return f"{_KEYS}-{digest[:24]}-{self.stage}-{self._step.plan.precision}"

    def frames(self, samples: int) -> int:
        """Frames in a clip of `samples` samples."""
        return self._upstream.frames(samples)

    def normalised(self, audio: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Samples `[sample]` at mean 0 and variance 1 if the model wants that, else unchanged."""
        if not self._upstream.normalise:
            return audio
        return normalised(torch.from_numpy(audio)).numpy()

    def __call__(self, waveforms: Sequence[npt.NDArray[np.float32]]) -> list[torch.Tensor]:
        """Compute features `[frame, feature]` of waveforms `[sample]` in one batch."""
        step, samples = self._step, [len(audio) for audio in waveforms]
        inputs = [torch.from_numpy(audio).to(step.device) for audio in waveforms]
        with self._lock, torch.no_grad(), autocast(step.device, step.plan.precision):
            made = step.model.advance(inputs, samples, "waveform", self.stage)
        separate = step.model.separate(made.float().cpu(), samples, self.stage)
        return [frames.clone() for frames in separate]
