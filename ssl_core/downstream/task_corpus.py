"""Reads the clips of a downstream task from its corpus."""

from collections.abc import Sequence
from pathlib import Path

from ssl_core.downstream.clips import TaskData
from ssl_core.downstream.task_recipe import TaskRecipe
from ssl_core.downstream.tasks import asr, emotion, kws, slots, speaker

ALL_FOLDS = "all"
TRAIN, VALID, TEST = ("train-clean-100",), ("dev-clean",), ("test-clean",)
"""Subsets of LibriSpeech that `asr` is trained, validated and tested on unless told otherwise."""


def read_task(
    task: str,
    root: Path,
    recipe: TaskRecipe,
    *,
    seed: int,
    fold: int = 1,
    split: speaker.Split = "paper",
    train: Sequence[str] = TRAIN,
    valid: Sequence[str] = VALID,
    test: Sequence[str] = TEST,
    progress: bool = True,
) -> TaskData:
    """The clips of a task's corpus, as distributed.

    Args:
        task: by name.
        root: of the corpus.
        recipe: of the task; says how long training clips are.
        seed: of what a split draws.
        fold: of emotion, which speakers are tested on, from 1.
        split: of speaker, the paper's or the official one.
        train: of asr, subsets to train on.
        valid: of asr, subsets to validate on; none keeps a twentieth of the training utterances.
        test: of asr, subsets to test on.
        progress: show a progress bar on stderr where that is a terminal.

    Raises:
        UsageError: a subset or fold that is not there.
        DataError: another corpus, or one that is not whole.
    """
    if task in ("kws12", "kws35"):
        return kws.read(root, int(task[3:]), seed, progress)
    if task == "slots":
        return slots.read(root, progress)
    if task == "emotion":
        return emotion.read(root, fold, seed, progress)
    if task == "asr":
        return asr.read(root, tuple(train), tuple(valid), tuple(test), seed, progress)
    if task == "speaker":
        return speaker.read_identification(root, seed, split, recipe.chunk, progress)
    return speaker.read_verification(root, seed, recipe.chunk, progress)
