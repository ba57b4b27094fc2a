"""The settings of fine-tuning a task: the same on the command line and in YAML."""

import dataclasses
from pathlib import Path
from typing import Literal

from common.errors import UsageError
from common.settings import from_mapping, to_yaml
from common.units import parse_names, parse_size
from ssl_core.downstream.clips import TaskData
from ssl_core.downstream.task_recipe import TaskRecipe, recipe_of
from ssl_core.downstream.tasks import asr, emotion, kws, slots, speaker
from ssl_core.planning.step_plan import Plan
from ssl_core.training.overrides import scalar, words_of
from ssl_core.training.torch_device import choose_device, choose_precision

ALL_FOLDS = "all"


def change_recipe(recipe: TaskRecipe, assignments: str) -> TaskRecipe:
    """The recipe with `name=value` pairs, separated by spaces, changed.

    Raises:
        UsageError: an unknown name (the nearest is named) or a bad value.
    """
    changes = {}
    for word in words_of(assignments):
        name, equals, text = word.partition("=")
        if not equals:
            raise UsageError(f"--set {word}: write NAME=VALUE, such as head-rate=1e-3")
        changes[name.replace("-", "_")] = scalar(text)
    return from_mapping(TaskRecipe, dataclasses.asdict(recipe) | changes, "--set")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """What task on what corpus, and how."""

    task: str = ""
    """`kws12`, `kws35`, `slots`, `emotion`, `speaker`, `verification` or `asr`."""
    data: str = ""
    """The task's corpus, as distributed."""
    fold: str = "1"
    """Of emotion: which speakers are the test set, from 1; `all` takes every fold in turn."""
    split: Literal["paper", "official"] = "paper"
    """Of speaker: the paper's (1211 speakers, validated on a tenth) or `iden_split.txt`."""
    train: str = "train-clean-100"
    """Of asr: subsets to train on, separated by commas."""
    valid: str = "dev-clean"
    """Of asr: subsets to validate on; empty keeps a twentieth of the training utterances."""
    test: str = "test-clean"
    """Of asr: subsets to test on."""
    recipe: str = ""
    """YAML file in place of the task's own recipe."""
    set: str = ""
    """Single settings of the recipe, as in `head=linear-ctc head-rate=1e-3`."""
    epochs: int = 0
    """Passes over the training clips; 0 is the recipe's."""
    batch: int = 0
    """Clips in an update; 0 is the recipe's."""
    micro_batch: int = 0
    """Clips in memory at a time; 0 is the whole batch. Does not change the result."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """Of the backbone; the head is trained in fp32 on a frozen one."""
    device: str = "auto"
    """Torch device; `auto` is CUDA where there is one, else the CPU."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    seed: int = 0
    """Seeds everything: what a split draws, the head's weights, the order of clips, dropout."""
    cache: str = "32GiB"
    """Disk that features of frozen backbones may take, in the user's cache; 0 keeps none."""

    @property
    def cache_bytes(self) -> int:
        """The cache's limit in bytes."""
        return 0 if self.cache.strip() == "0" else parse_size(self.cache)

    def task_recipe(self) -> TaskRecipe:
        """The task's recipe with what the settings change of it.

        Raises:
            UsageError: no such task, or a bad recipe.
        """
        recipe = recipe_of(self.task, Path(self.recipe) if self.recipe else None)
        if self.set:
            recipe = change_recipe(recipe, self.set)
        changes = {name: getattr(self, name) for name in ("epochs", "batch") if getattr(self, name)}
        changed = from_mapping(TaskRecipe, dataclasses.asdict(recipe) | changes, "options")
        if changed.transcribes != recipe_of(self.task).transcribes:
            made = "writes texts" if changed.transcribes else "chooses classes"
            raise UsageError(f"a head {changed.head} {made}, which is not what {self.task} asks")
        if self.task == "verification" and changed.head != "x-vector":
            raise UsageError(f"verification needs a head x-vector, not {changed.head}")
        if self.task != "verification" and changed.metric == "eer":
            raise UsageError(f"{self.task} has no trials to be scored by eer")
        return changed

    def task_plan(self, recipe: TaskRecipe) -> Plan:
        """How this machine takes a step of the task.

        Raises:
            UsageError: settings that do not fit this machine.
        """
        device = choose_device(self.device)
        plan = Plan(
            length=recipe.length,
            batch=recipe.batch,
            micro_batch=self.micro_batch,
            precision=choose_precision(self.precision, device),
            device=device,
            threads=self.threads,
        )
        plan.validate()
        return plan

    def read_data(self, recipe: TaskRecipe, fold: int = 1, progress: bool = True) -> TaskData:
        """The clips of the task's corpus.

        Raises:
            UsageError: no corpus was named, or a subset that is not there.
            DataError: another corpus, or one that is not whole.
        """
        if not self.data:
            raise UsageError(f"--data: give the corpus of {self.task}")
        root = Path(self.data)
        if self.task in ("kws12", "kws35"):
            return kws.read(root, int(self.task[3:]), self.seed, progress)
        if self.task == "slots":
            return slots.read(root, progress)
        if self.task == "emotion":
            return emotion.read(root, fold, self.seed, progress)
        if self.task == "asr":
            subsets = (parse_names(self.train), parse_names(self.valid), parse_names(self.test))
            return asr.read(root, *subsets, self.seed, progress)
        if self.task == "speaker":
            return speaker.read_identification(root, self.seed, self.split, recipe.chunk, progress)
        return speaker.read_verification(root, self.seed, recipe.chunk, progress)

    def folds(self) -> tuple[int, ...]:
        """The folds to take in turn.

        Raises:
            UsageError: not a number.
            DataError: no such corpus.
        """
        if self.fold == ALL_FOLDS and self.task == "emotion" and self.data:
            return tuple(range(1, emotion.count_folds(Path(self.data)) + 1))
        try:
            return (1 if self.fold == ALL_FOLDS else int(self.fold),)
        except ValueError:
            raise UsageError(f"--fold: '{self.fold}' is not a number, nor `all`") from None

    def as_config(self) -> str:
        """A run's `config.yaml`."""
        return to_yaml(self)
