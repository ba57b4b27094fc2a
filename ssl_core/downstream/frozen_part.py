"""The part of a task's model that is not trained, as a function from waveforms to features."""

import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from ssl_core.downstream.task_model import Stage
from ssl_core.downstream.task_step import TaskStep
from ssl_core.wav2vec2.precision import autocast


class FrozenPart:
    """Takes clips from their waveform to the stage from which a step trains."""

    def __init__(self, step: TaskStep) -> None:
        """Use the model of a step, which stays its own."""
        self._step, self._upstream = step, step.model.upstream
        self.stage: Stage = step.stage
        """What it makes; at "waveform" nothing is frozen, and it makes nothing."""
        self.width = step.model.width(self.stage)
        """Numbers in a frame of it."""
        self._lock = threading.Lock()
        """The model runs in the thread that decodes and in the one that evaluates."""

    @property
    def makes_features(self) -> bool:
        """Whether anything is frozen."""
        return self.stage != "waveform"

    def identity(self) -> str:
        """Digest of all that decides what it makes of a waveform."""
        digest = self._upstream.digest(self.stage) if self.makes_features else ""
        return f"{digest[:24]}-{self.stage}-{self._step.plan.precision}"

    def frames(self, samples: int) -> int:
        """Frames of a clip of so many samples."""
        return self._upstream.frames(samples)

    def normalised(self, audio: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Samples `[sample]` as the model takes them: of mean 0 and variance 1, or unchanged."""
        if not self._upstream.normalise:
            return audio
        return (audio - audio.mean()) / np.sqrt(audio.var() + 1e-7)

    def __call__(self, waveforms: Sequence[npt.NDArray[np.float32]]) -> list[torch.Tensor]:
        """Features `[frame, feature]` of waveforms `[sample]`, computed together."""
        step, samples = self._step, [len(audio) for audio in waveforms]
        inputs = [torch.from_numpy(audio).to(step.device) for audio in waveforms]
        with self._lock, torch.no_grad(), autocast(step.device, step.plan.precision):
            made = step.model.advance(inputs, samples, "waveform", self.stage)
        separate = step.model.separate(made.float().cpu(), samples, self.stage)
        return [frames.clone() for frames in separate]
