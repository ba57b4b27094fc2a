"""Recipes of the downstream tasks, one YAML file per task in `recipes/`."""

import dataclasses
import math
from pathlib import Path
from typing import Literal

from common.command import nearest
from common.errors import UsageError
from common.settings import from_mapping, read_yaml

FOLDER = Path(__file__).parent / "recipes"
Head = Literal["mean-linear", "lstm-ctc", "linear-ctc", "x-vector"]
Metric = Literal["accuracy", "eer", "wer", "cer"]
Method = Literal["fedavg", "fedper", "fedrep", "local"]
"""Method of federated fine-tuning. `fedavg`: all trained parameters are shared; `fedper`: the head
is personal (Arivazhagan et al., 2019); `fedrep`: the head is personal and is trained before the
shared part (Collins et al., 2021); `local`: nothing is shared."""
Share = Literal["backbone", "layers", "lora", "none"]
"""Part of the backbone that is trained: all of it (convolutions only if the recipe says so), its
last layers, low-rank adapters of its attention, or nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskRecipe:
    """How a task is trained and scored; the defaults are SpeechBrain's (the paper, section 3.2).

    The optimizer is Adam with decoupled weight decay. SpeechBrain adds weight decay to the
    gradient, which at 2e-6 makes no visible difference.
    """

    head: Head
    """`mean-linear`: mean over frames, then a linear layer; `lstm-ctc`: a bidirectional LSTM and
    CTC; `linear-ctc`: a linear layer and CTC; `x-vector`: time-delay layers, statistics, embedding,
    linear layer."""
    metric: Metric
    """Chooses the best epoch and scores the task."""
    batch: int
    """Clips per update."""
    epochs: int
    head_rate: float
    """Learning rate of the head."""
    backbone_rate: float
    """Learning rate of an unfrozen backbone."""
    schedule: Literal["linear", "newbob"]
    """`linear`: from `head_rate` to `final_rate` over the epochs, the backbone's in proportion;
    `newbob`: multiplied by a factor whenever the validation metric improves too little."""
    final_rate: float = 1e-4
    anneal: float = 0.9
    """Newbob's factor for the head."""
    backbone_anneal: float = 0.9
    """Newbob's factor for the backbone."""
    improvement: float = 0.0025
    """Relative improvement below which newbob lowers the rates."""
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 5.0
    """Largest gradient norm (SpeechBrain's `max_grad_norm`); 0 for no clipping."""
    train_extractor: bool = False
    """Whether to train the convolutions of an unfrozen backbone too."""
    chunk: float = 0.0
    """Seconds of the chunks that training clips are cut into; 0 for whole clips."""
    lstm_layers: int = 2
    lstm_units: int = 1024
    """Per direction."""
    dropout: float = 0.0
    """Dropout rate after every LSTM layer."""
    length: float = 1.0
    """Mean seconds of a clip in the paper's corpus (Figure 1), for plans and estimates."""

    def validate(self) -> None:
        """Check ranges.

        Raises:
            UsageError: a value out of range.
        """
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"{field.name.replace('_', '-')} must be finite, not {value}")
        for name in ("batch", "epochs", "lstm_layers", "lstm_units"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name.replace('_', '-')} must be at least 1")
        for name in ("head_rate", "backbone_rate", "final_rate", "epsilon", "length"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name.replace('_', '-')} must be above zero")
        for name in ("weight_decay", "clip_norm", "chunk", "improvement"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name.replace('_', '-')} must not be below zero")
        for name in ("beta1", "beta2", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name} must be in [0, 1), not {getattr(self, name)}")
        for name in ("anneal", "backbone_anneal"):
            if not 0 < getattr(self, name) <= 1:
                raise UsageError(f"{name.replace('_', '-')} must be in (0, 1]")
        if (self.metric in ("wer", "cer")) != self.transcribes:
            raise UsageError(f"the head {self.head} cannot be scored by {self.metric}")

    @property
    def transcribes(self) -> bool:
        """Whether the head transcribes, rather than classifies."""
        return self.head.endswith("ctc")

    @property
    def higher_is_better(self) -> bool:
        """Whether a higher value of the metric is better."""
        return self.metric == "accuracy"


def tasks() -> tuple[str, ...]:
    """Sorted names of all tasks."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def recipe_of(task: str, path: Path | None = None) -> TaskRecipe:
    """Read the recipe of a task, from `path` if that is given.

    Raises:
        UsageError: no such task (the message names the nearest), or an invalid file.
    """
    if task not in tasks():
        raise UsageError(
            f"no task '{task}': choose from {', '.join(tasks())}{nearest(task, tasks())}"
        )
    file = path or FOLDER / f"{task}.yaml"
    return from_mapping(TaskRecipe, read_yaml(file), str(file))
