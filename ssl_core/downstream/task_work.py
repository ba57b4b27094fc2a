"""Fine-tuning a downstream task as the planner sees it."""

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from common.errors import UsageError
from common.units import format_length
from ssl_core.downstream.clip_loader import TOGETHER
from ssl_core.downstream.heads import make_head
from ssl_core.downstream.sharing import divide
from ssl_core.downstream.task_model import RANDOM, TaskModel, Upstream
from ssl_core.downstream.task_recipe import Share, TaskRecipe, recipe_of
from ssl_core.downstream.task_step import BACKBONE, HEAD, Batch, TaskStep
from ssl_core.planning.ladder import (
    RECOMPUTED_ATTENTION,
    SPLIT,
    gpu_rungs,
    splits,
    with_layers_recomputed,
    with_memory_given_back,
)
from ssl_core.planning.shape_tensors import count_parameters
from ssl_core.planning.step_plan import Plan
from ssl_core.planning.work import Batches, Rung, Started
from ssl_core.training.pretraining_work import step_options
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
"""Classes or symbols in each task's corpus; approximate for slots."""
SYMBOLS_A_SECOND = 15
"""Symbols per second in transcripts; LibriSpeech has 14.5."""

Tensors = Callable[..., Tensor]
"""Makes a tensor of a given shape, such as `torch.zeros`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskWork:
    """A head on a backbone, and which part of the backbone is trained; see `planning.work.Work`."""

    architecture: ModelConfig
    """Of the backbone."""
    recipe: TaskRecipe
    labels: int
    """Number of classes, or of symbols without the blank."""
    task: str = ""
    share: Share = "none"
    """Trained part of the backbone: `none` if frozen, `backbone` if unfrozen."""
    shared_layers: int = 0
    """Number of last layers to train if `share` is `layers`."""
    lora_rank: int = 0
    """Rank of the adapters if `share` is `lora`."""
    cached: bool = False
    """Whether features of the frozen part are computed once, before training, and cached."""

    unit = "clips"
    graphed = False

    @property
    def clip_norm(self) -> float:
        """Largest gradient norm; 0 for no clipping."""
        return self.recipe.clip_norm

    @property
    def unfrozen(self) -> bool:
        """Whether any part of the backbone is trained."""
        return self.share != "none"

    @property
    def length(self) -> float:
        """Seconds of a training clip: the chunk length, or else the mean."""
        return self.recipe.chunk or self.recipe.length

    @property
    def trains_extractor(self) -> bool:
        """Whether the convolutions are trained."""
        return self.share == "backbone" and self.recipe.train_extractor

    @property
    def convolves(self) -> bool:
        """Whether the backward pass has convolutions."""
        return self.unfrozen or self.recipe.head == "x-vector"

    @property
    def recurs(self) -> bool:
        """Whether the head has an LSTM; freed memory is returned before it."""
        return self.recipe.head == "lstm-ctc"

    def validate(self, plan: Plan) -> None:
        """Check a plan against the backbone and the task.

        Raises:
            UsageError: what is wrong and what to do.
        """
        plan.validate()
        if self.labels < 1:
            raise UsageError(f"a task needs at least 1 class or symbol, not {self.labels}")
        if self.architecture.frames(plan.samples) < 1:
            raise UsageError(f"a clip of {format_length(plan.length)} makes no frame: give longer")
        if plan.accumulation > 1:
            raise UsageError("fine-tuning takes one batch an update: leave accumulation at 1")
        plan.validate_clipping(self.clip_norm)

    def rungs(self, whole: Plan) -> list[Rung]:
        """See `Work.rungs`. Clips are independent, so splitting a batch costs no recomputation."""
        if whole.on_gpu:
            features = self.unfrozen and self.trains_extractor
            return gpu_rungs(
                whole, features=features, layers=self.unfrozen, split=True, graph=False
            )
        if not self.unfrozen:
            rungs = [Rung(1.0, plan) for plan in (whole, *splits(whole))]
            return rungs + with_memory_given_back(rungs[-1:])
        rungs = [Rung(1.0, dataclasses.replace(whole, keep_attention=True))]
        rungs += [Rung(RECOMPUTED_ATTENTION, plan) for plan in (whole, *splits(whole))]
        small = rungs[-1:]
        if self.trains_extractor:
            small = [
                Rung(slowdown * SPLIT, dataclasses.replace(plan, recompute_features=True))
                for slowdown, plan in small
            ]
            rungs += small
        rungs += with_layers_recomputed(small)
        return rungs + with_memory_given_back(rungs[-2:])

    def trained_parameters(self) -> int:
        """Number of trained parameters."""
        return _trained_parameters(self)

    def options(self, plan: Plan) -> str:
        """Command-line options of `ssl_core.finetune` for a plan."""
        backbone = "unfrozen" if self.unfrozen else "frozen"
        words = [
            f"--task {self.task} --{backbone} --batch {plan.batch}",
            f"--precision {plan.precision}",
            *step_options(plan),
        ]
        return " ".join(words)

    def start(
        self,
        plan: Plan,
        *,
        label: Callable[[str], None] = lambda _: None,
        fake: bool = False,
        batches: Batches | None = None,
    ) -> Started:
        """See `Work.start`.

        Args:
            plan: how a step is taken.
            label: is called with the name of each phase.
            fake: make zeros instead of noise, and two micro-batches at most.
            batches: ignored; clips are always noise.
        """
        make = torch.zeros if fake else torch.randn
        model = make_model(self)
        label("optimizer state")
        step = make_step(model, self, plan)
        if self.cached:
            label("computing features")
            compute_features(step, make)
        label("activations")
        size = min(plan.batch, 2 * plan.effective_micro_batch) if fake else plan.batch

        def update(number: int) -> bool:
            batch = make_batch(step, self, make).rows(range(size))
            return step.update(batch, number, learning_rates(self)).applied

        return Started(model, update, step.copies)


def task_work(
    task: str,
    architecture: ModelConfig,
    *,
    unfrozen: bool,
    cached: bool = False,
    recipe: TaskRecipe | None = None,
) -> TaskWork:
    """The work of a task with its frozen or unfrozen backbone.

    Args:
        task: name of the task.
        architecture: of the backbone.
        unfrozen: whether the backbone is trained.
        cached: whether features of the frozen part are computed before training.
        recipe: None for the task's own.

    Raises:
        UsageError: no such task (the message names the nearest).
    """
    found = recipe_of(task)
    return TaskWork(
        architecture=architecture,
        recipe=recipe or found,
        labels=LABELS[task],
        task=task,
        share="backbone" if unfrozen else "none",
        cached=cached,
    )


@functools.lru_cache(maxsize=64)
def _trained_parameters(work: TaskWork) -> int:
    return count_parameters(lambda: make_step(make_model(work), work, Plan()).model, True)


def make_model(work: TaskWork) -> TaskModel:
    """The task's head on a backbone with initial weights."""
    upstream = Upstream(Backbone(work.architecture), RANDOM, False)
    return TaskModel(upstream, make_head(work.recipe, upstream.width, work.labels), work.recipe)


def make_step(model: TaskModel, work: TaskWork, plan: Plan) -> TaskStep:
    """A step that trains the parameters that `work` names.

    Args:
        model: backbone and head.
        work: the task and the trained part of the backbone.
        plan: how a step is taken.
    """
    parts = divide(
        model, "fedavg", work.share, layers=work.shared_layers, rank=work.lora_rank, seed=0
    )
    return TaskStep(model, plan, unfrozen=work.unfrozen, seed=0, trained=parts.trained)


def compute_features(step: TaskStep, make: Tensors) -> None:
    """Run the frozen part on one batch of clips, of the size that `ClipLoader` uses.

    `make` returns waveforms `[sample]`.
    """
    plan = step.plan
    clips = max(1, TOGETHER // plan.samples)
    waveforms = [make(plan.samples).to(step.device) for _ in range(clips)]
    with torch.no_grad(), autocast(step.device, plan.precision):
        step.model.advance(waveforms, [plan.samples] * clips, "waveform", step.stage).float()


def make_batch(step: TaskStep, work: TaskWork, make: Tensors) -> Batch:
    """A batch of clips of the plan's length.

    Args:
        step: will train on the batch.
        work: the task.
        make: makes waveforms `[sample]` and features `[frame, feature]`.
    """
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


def learning_rates(work: TaskWork) -> dict[str, float]:
    """Learning rates of the first epoch by parameter group."""
    return {HEAD: work.recipe.head_rate, BACKBONE: work.recipe.backbone_rate}
