"""Settings common to central pretraining, devices and simulations."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.settings import to_yaml
from common.units import Names, Seconds
from ssl_core.planning.step_plan import Plan
from ssl_core.training.compute_settings import ComputeSettings
from ssl_core.training.model_settings import ModelSettings
from ssl_core.training.stored_settings import stored_settings

if TYPE_CHECKING:  # settings are read without PyTorch
    from ssl_core.wav2vec2.model import PretrainingModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainingSettings(ComputeSettings, ModelSettings):
    """Data, model and training settings of pretraining."""

    data: Path | None = None
    """Corpus in LibriSpeech's layout; the built-in demo corpus if not given."""
    subset: Names = Names()
    """Subsets of the corpus, separated by commas; all `train-*` if not given."""
    length: Seconds = Seconds(5.0)
    """Length of every crop."""
    checkpoint: Path | None = None
    """Checkpoint to start from, this project's or transformers', whose architecture is then the
    default; random weights if not given."""
    batch: int = 4
    """Crops in a batch, over which one loss is computed."""
    accumulation: int = 1
    """Batches in an update; the effective batch is batch x accumulation x length."""
    held_out: float = 0.05
    """Fraction of speakers held out for evaluation."""
    eval_crops: int = 32
    """Held-out crops to evaluate on; 0 does not evaluate."""
    keep: int = 2
    """Number of newest checkpoints to keep."""
    output: Path | None = None
    """Run directory; a new one under `runs/` if not given."""
    resume: Path | None = None
    """Run directory to resume (with its own settings)."""

    @classmethod
    def defaults(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of the resumed run, or recipe of the preset and architecture of the checkpoint.

        Without a checkpoint on this machine, the architecture too is the preset's: a device takes
        that which the server sends.

        Raises:
            UsageError: no such run or preset.
            DataError: a checkpoint of another architecture than wav2vec 2.0.
        """
        if given.get("resume"):
            return vars(stored_settings(cls, Path(given["resume"])))
        found, checkpoint = super().defaults(given), given.get("checkpoint")
        if checkpoint:
            from ssl_core.training import hf_checkpoint

            if (Path(checkpoint) / hf_checkpoint.CONFIG).exists():
                found["architecture"] = hf_checkpoint.load_config(Path(checkpoint))
        return found

    def validate(self) -> None:
        """Check ranges and combinations of settings.

        Raises:
            UsageError: what is wrong.
        """
        self.require_at_least(1, "keep")
        self.require_at_least(0, "eval_crops", "seed")
        self.architecture.validate()
        self.recipe.validate()
        self.step_plan(to_check=True)

    def step_plan(self, to_check: bool = False) -> Plan:
        """The plan of a step on this machine; `to_check` as in `plan_for`.

        Raises:
            UsageError: settings that do not fit together or this machine.
        """
        plan = self.plan_for(
            length=self.length,
            batch=self.batch,
            accumulation=self.accumulation,
            to_check=to_check,
        )
        self.recipe.validate_plan(self.architecture, plan)
        return plan

    def load_checkpoint(self, model: "PretrainingModel") -> list[str]:
        """Load the weights of `checkpoint` into a model; does nothing if none was given.

        Returns:
            Lines that say what was taken from it and what was not.

        Raises:
            DataError: it cannot be used, or the settings ask for another architecture.
        """
        if self.checkpoint is None:
            return []
        from ssl_core.training import hf_checkpoint

        unused = hf_checkpoint.load_pretrained(model, self.checkpoint)
        lines, differences = [f"weights of {self.checkpoint}"], self.differences()
        if differences:
            lines.append(
                f"architecture (in brackets, that of {self.model}): {', '.join(differences)}; "
                f"the recipe is that of {self.model}"
            )
        if unused:
            lines.append(f"not used: {', '.join(unused)}")
        return lines

    def as_config(self) -> str:
        """The text of a run's `config.yaml`, with a note on settings that are not exact."""
        inexact = self.step_plan().inexact
        note = f"# not exact: {', '.join(inexact)}\n" if inexact else ""
        return note + to_yaml(self)
