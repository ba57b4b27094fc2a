"""Reading the clips of a downstream task from its corpus."""

from collections.abc import Sequence
from pathlib import Path

from ssl_core.downstream.clips import TaskData
from ssl_core.downstream.corpora import asr, emotion, kws, slots, speaker
from ssl_core.downstream.task_recipe import TaskRecipe

ALL_FOLDS = "all"
TRAIN, VALID, TEST = ("train-clean-100",), ("dev-clean",), ("test-clean",)
"""Default subsets of LibriSpeech for `asr`."""


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
    """Read the clips of a task's corpus, as distributed.

    Args:
        task: name of the task.
        root: folder of the corpus.
        recipe: of the task; gives the length of training clips.
        seed: of random splits.
        fold: for emotion, fold whose speakers are the test set, from 1.
        split: for speaker, the paper's or the official one.
        train: for asr, subsets to train on.
        valid: for asr, subsets to validate on; if empty, a twentieth of the training utterances.
        test: for asr, subsets to test on.
        progress: whether to show a progress bar on stderr if it is a terminal.

    Raises:
        UsageError: no such subset or fold.
        DataError: another corpus, or an incomplete one.
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
