"""Settings of `python -m ssl_core.finetune`."""

import dataclasses
from pathlib import Path
from typing import ClassVar, Literal

from common.errors import UsageError
from common.units import Names, Size
from ssl_core.downstream import task_corpus
from ssl_core.downstream.clips import TaskData
from ssl_core.downstream.corpora import emotion
from ssl_core.downstream.corpora.speaker import Split
from ssl_core.downstream.task_model import LOGMEL
from ssl_core.downstream.task_settings import TaskSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneSettings(TaskSettings):
    """Settings of a central run."""

    checkpoint: str = ""
    """Directory of a backbone of this project or of transformers; `random` for initial weights;
    `logmel` for log-mel frames instead of a backbone."""
    model: str = "base"
    """Preset of `--checkpoint random`."""
    backbone: Literal["frozen", "unfrozen"] = "frozen"
    """Whether to train the backbone (also as `--frozen`, `--unfrozen`)."""
    fold: str = "1"
    """For emotion: fold whose speakers are the test set, from 1; `all` runs every fold in turn."""
    split: Split = "paper"
    """For speaker: the paper's (1211 speakers, validation on a tenth) or `iden_split.txt`."""
    train: Names = Names(task_corpus.TRAIN)
    """For asr: subsets to train on, separated by commas."""
    valid: Names = Names(task_corpus.VALID)
    """For asr: subsets to validate on; if empty, a twentieth of the training utterances."""
    test: Names = Names(task_corpus.TEST)
    """For asr: subsets to test on."""
    cache: Size = Size(32 * 2**30)
    """Maximum size of the feature cache on disk; 0 switches it off."""
    beam: int = 0
    """Beam size when decoding the test set; 0 decodes greedily."""
    words: Path | None = None
    """Lexicon of the beam search: a file with one word per line."""
    ngram: Path | None = None
    """Word n-gram model of the beam search, in a format of KenLM."""
    score_train: bool = False
    """Whether to score the training clips too at the end, to see how far they were memorised."""
    keep: int = 2
    """Number of checkpoints to keep, besides the weights of the best epoch."""
    output: Path | None = None
    """Run directory; default: a new one in `runs/`."""
    resume: Path | None = None
    """Run directory to resume, with its own settings."""

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
            raise UsageError(
                f"--beam, --words and --ngram are for transcription; {self.task} has classes"
            )
        if (self.words or self.ngram) and not self.beam:
            raise UsageError("--words and --ngram need a beam search, such as --beam 50")
        if self.task != "emotion" and self.fold != "1":
            raise UsageError("--fold is for emotion")
        if self.fold != task_corpus.ALL_FOLDS and not self.fold.isdigit():
            raise UsageError(f"--fold: '{self.fold}' is neither a number nor `all`")

    def read_data(self, fold: int) -> TaskData:
        """Read the clips of the task's corpus; raises as `read_task`."""
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
        """Folds to run in turn; raises `DataError` if the corpus is missing."""
        if self.fold == task_corpus.ALL_FOLDS and self.task == "emotion":
            return tuple(range(1, emotion.count_folds(self.corpus()) + 1))
        return (1 if self.fold == task_corpus.ALL_FOLDS else int(self.fold),)
