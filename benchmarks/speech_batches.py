"""Batches of speech for a measured pretraining step."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

from partitions.prepared import prepare
from ssl_core.planning.step_plan import Plan
from ssl_core.planning.work import Waveforms
from ssl_core.training.crops import Crops


@dataclasses.dataclass(frozen=True)
class SpeechBatches:
    """Crops of all `train-*` subsets of a corpus; pickled before the corpus is read."""

    data: Path
    """Corpus in LibriSpeech's layout."""
    plan: Plan

    @functools.cached_property
    def _crops(self) -> Crops:
        manifest = prepare(self.data, (), self.plan.length)
        return Crops(manifest, range(len(manifest.sequences)), self.plan.samples, 0)

    def __call__(self, number: int) -> Iterator[Waveforms]:
        """The batches of an update, `[batch, sample]` each."""
        plan = self.plan
        ((_, read),) = self._crops.updates([number], plan.batch, plan.accumulation)
        return (batch.waveforms for batch in read)
