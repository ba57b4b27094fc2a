"""What is asked of a step that fine-tunes a task, beside an architecture and a plan.

It stands where `Recipe` stands for pretraining: `estimate`, `ladder`, `choose` and `fitting` take
either. The functions here take the steps themselves, on tensors without contents or on noise.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from common.errors import UsageError
from common.units import format_length
from ssl_core.downstream.heads import make_head
from ssl_core.downstream.loading import TOGETHER
from ssl_core.downstream.sharing import divide
from ssl_core.downstream.task_model import RANDOM, TaskModel, Upstream
from ssl_core.downstream.task_recipe import Share, TaskRecipe, recipe_of
from ssl_core.downstream.task_step import BACKBONE, HEAD, Batch, TaskStep
from ssl_core.planning.step_plan import Plan
from ssl_core.training.pretraining_recipe import Recipe
from ssl_core.wav2vec2.config import ModelConfig
from ssl_core.wav2vec2.model import Backbone
from ssl_core.wav2vec2.precision import autocast

LABELS = {
    "kws12": 12,
    "kws35": 35,
    "slots": 40,
    "emotion": 4,
    "speaker": 1211,
    "verification": 1211,
    "asr": 28,
}
"""Classes or symbols of each task's corpus; of slots, about as many as its texts use."""
SYMBOLS_A_SECOND = 15
"""In the texts of tasks that transcribe: LibriSpeech has 14.5."""

Tensors = Callable[..., Tensor]
"""Makes a tensor of a shape, as `torch.zeros` does."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskWork:
    """A task's head on a backbone, and how much of the backbone is trained with it."""

    recipe: TaskRecipe
    labels: int
    """Classes, or symbols without the blank."""
    share: Share = "none"
    """What of the backbone is trained: `none` is frozen, `backbone` unfrozen."""
    shared_layers: int = 0
    """How many of the last layers, with `layers`."""
    lora_rank: int = 0
    """Of low-rank changes, with `lora`."""
    cached: bool = False
    """Whether what the frozen part makes of a clip is computed before and kept on disk."""

    @property
    def unfrozen(self) -> bool:
        """Whether anything of the backbone is trained."""
        return self.share != "none"

    @property
    def length(self) -> float:
        """Seconds of a training clip: of the pieces they are cut into, or their mean."""
        return self.recipe.chunk or self.recipe.length

    @property
    def trains_extractor(self) -> bool:
        """Whether the convolutions are trained."""
        return self.share == "backbone" and self.recipe.train_extractor

    @property
    def convolves(self) -> bool:
        """Whether there are convolutions in the backward pass."""
        return self.unfrozen or self.recipe.head == "x-vector"

    @property
    def recurs(self) -> bool:
        """Whether the head is an LSTM, before which freed memory is given back."""
        return self.recipe.head == "lstm-ctc"

    def validate_for(self, config: ModelConfig, plan: Plan) -> None:
        """Check a plan against the model and the task.

        Raises:
            UsageError: what is wrong and what would do.
        """
        plan.validate()
        if self.labels < 1:
            raise UsageError(f"a task needs at least 1 class or symbol, not {self.labels}")
        if config.frames(plan.samples) < 1:
            raise UsageError(f"a clip of {format_length(plan.length)} makes no frame: give longer")
        if plan.accumulation > 1:
            raise UsageError("fine-tuning takes one batch an update: leave accumulation at 1")
        if plan.apply_in_backward and self.recipe.clip_norm:
            raise UsageError(
                "apply-in-backward cannot clip: the norm is known when all gradients are; "
                "set the task's clip-norm to 0"
            )


Work = Recipe | TaskWork
"""What a model is trained for."""


def task_work(
    task: str, *, unfrozen: bool, cached: bool = False, recipe: TaskRecipe | None = None
) -> TaskWork:
    """A task as its recipe has it.

    Args:
        task: by name.
        unfrozen: whether the backbone is trained too.
        cached: whether what is frozen is computed once, before.
        recipe: in place of the task's own.

    Raises:
        UsageError: no such task; the nearest is named.
    """
    found = recipe_of(task)
    return TaskWork(
        recipe=recipe or found,
        labels=LABELS[task],
        share="backbone" if unfrozen else "none",
        cached=cached,
    )


def make_model(config: ModelConfig, work: TaskWork) -> TaskModel:
    """A backbone as it is initialised with the task's head."""
    upstream = Upstream(Backbone(config), RANDOM, False)
    return TaskModel(upstream, make_head(work.recipe, upstream.width, work.labels), work.recipe)


def make_step(model: TaskModel, work: TaskWork, plan: Plan) -> TaskStep:
    """A step that trains what the work says."""
    parts = divide(
        model, "fedavg", work.share, layers=work.shared_layers, rank=work.lora_rank, seed=0
    )
    return TaskStep(model, plan, unfrozen=work.unfrozen, seed=0, trained=parts.trained)


def compute_features(step: TaskStep, make: Tensors) -> None:
    """Take clips through the frozen part, as many as `ClipLoader` takes together."""
    plan = step.plan
    clips = max(1, TOGETHER // plan.samples)
    waveforms = [make(plan.samples).to(step.device) for _ in range(clips)]
    with torch.no_grad(), autocast(step.device, plan.precision):
        step.model.advance(waveforms, [plan.samples] * clips, "waveform", step.stage).float()


def make_batch(step: TaskStep, work: TaskWork, make: Tensors) -> Batch:
    """Clips of the plan's length, as an update gets them."""
    plan, model = step.plan, step.model
    samples = [plan.samples] * plan.batch
    stage = step.stage if work.cached else "waveform"
    if stage == "waveform":
        inputs = [make(plan.samples) for _ in samples]
    else:
        (frames,) = model.head_lengths(samples[:1], stage)
        inputs = [make(frames, model.width(stage)) for _ in samples]
    if work.recipe.transcribes:
        symbols = max(1, round(plan.length * SYMBOLS_A_SECOND))
        places = torch.arange(plan.batch * symbols).view(plan.batch, symbols)
        targets = places % work.labels + 1
    else:
        targets = torch.arange(plan.batch) % work.labels
    return Batch(inputs, stage, samples, targets)


def rates(work: TaskWork) -> dict[str, float]:
    """Learning rates of the first epoch, by group."""
    return {HEAD: work.recipe.head_rate, BACKBONE: work.recipe.backbone_rate}
