"""Settings of `python -m ssl_core.finetune`."""

import dataclasses
from pathlib import Path
from typing import ClassVar, Literal

from common.errors import UsageError
from common.units import Names, Size
from ssl_core.downstream import task_corpus
from ssl_core.downstream.clips import TaskData
from ssl_core.downstream.task_model import LOGMEL
from ssl_core.downstream.task_settings import TaskSettings
from ssl_core.downstream.tasks import emotion
from ssl_core.downstream.tasks.speaker import Split


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneSettings(TaskSettings):
    """Settings of a centralised run."""

    checkpoint: str = ""
    """Directory of a backbone, this project's or transformers'; `random`, one with initial weights;
    `logmel`, none."""
    model: str = "base"
    """Preset of `--checkpoint random`."""
    backbone: Literal["frozen", "unfrozen"] = "frozen"
    """Whether the backbone is trained too (also as `--frozen`, `--unfrozen`)."""
    fold: str = "1"
    """Of emotion: which speakers are the test set, from 1; `all` takes every fold in turn."""
    split: Split = "paper"
    """Of speaker: the paper's (1211 speakers, validated on a tenth) or `iden_split.txt`."""
    train: Names = Names(task_corpus.TRAIN)
    """Of asr: subsets to train on, separated by commas."""
    valid: Names = Names(task_corpus.VALID)
    """Of asr: subsets to validate on; none keeps a twentieth of the training utterances."""
    test: Names = Names(task_corpus.TEST)
    """Of asr: subsets to test on."""
    cache: Size = Size(32 * 2**30)
    """Disk that features of frozen backbones may take, in the user's cache; 0 keeps none."""
    beam: int = 0
    """Hypotheses of a beam search over the test set's texts; 0 decodes greedily."""
    words: Path | None = None
    """File with a word a line that a beam search chooses from."""
    ngram: Path | None = None
    """N-gram model of words that a beam search weighs, as KenLM reads it."""
    score_train: bool = False
    """Whether the training clips are scored at the end too: how far they were memorised."""
    keep: int = 2
    """Checkpoints to keep, beside the best epoch's weights."""
    output: Path | None = None
    """Run directory; without it one is made under `runs/`."""
    resume: Path | None = None
    """Run directory to go on with (its own settings are used)."""

    SHORT: ClassVar[dict[str, str]] = {"batch": "recipe.batch", "epochs": "recipe.epochs"}

    def validate(self) -> None:
        """Check values and that they fit together.

        Raises:
            UsageError: what is wrong.
        """
        super().validate()
        if not self.checkpoint:
            raise UsageError("--checkpoint: give a directory, or one of random, logmel")
        if self.checkpoint == LOGMEL and self.backbone == "unfrozen":
            raise UsageError("--checkpoint logmel has no backbone to unfreeze")
        self.require_at_least(0, "beam")
        self.require_at_least(1, "keep")
        if (self.beam or self.words or self.ngram) and not self.recipe.transcribes:
            raise UsageError(f"--beam, --words and --ngram are for texts; {self.task} has classes")
        if (self.words or self.ngram) and not self.beam:
            raise UsageError("--words and --ngram need a beam search, such as --beam 50")
        if self.task != "emotion" and self.fold != "1":
            raise UsageError("--fold is for emotion")
        if self.fold != task_corpus.ALL_FOLDS and not self.fold.isdigit():
            raise UsageError(f"--fold: '{self.fold}' is not a number, nor `all`")

    def read_data(self, fold: int) -> TaskData:
        """The clips of the task's corpus; raises as `read_task`."""
        return task_corpus.read_task(
            self.task,
            self.corpus(),
            self.recipe,
            seed=self.seed,
            fold=fold,
            split=self.split,
            train=self.train,
            valid=self.valid,
            test=self.test,
        )

    def folds(self) -> tuple[int, ...]:
        """The folds to take in turn; raises `DataError` where there is no such corpus."""
        if self.fold == task_corpus.ALL_FOLDS and self.task == "emotion":
            return tuple(range(1, emotion.count_folds(self.corpus()) + 1))
        return (1 if self.fold == task_corpus.ALL_FOLDS else int(self.fold),)
