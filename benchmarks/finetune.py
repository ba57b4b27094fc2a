"""Fine-tuning here and in SpeechBrain: the same task, clips, batches and backbone weights.

`python -m benchmarks.finetune --data EMODB` takes epochs with a frozen backbone, then epochs with
an unfrozen one (its convolutions stay frozen, as in the recipe), alternating between the two
libraries, each in a process of its own. The last line is one JSON object.
`unfrozen_speedup_vs_speechbrain` is for all epochs of the recipe as `ssl_core.finetune` takes them,
computed from the first epoch and the steps of later ones.

SpeechBrain is its `Wav2Vec2` in its `Brain`, as in its recipe
`IEMOCAP/emotion_recognition/train_with_wav2vec2.py`. Its waveforms are already decoded in memory;
ours are read from files. Both take the clips in the same order.
"""

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import PositiveInt
from rich.console import Console

from benchmarks.finetune_worker import OURS, PEER, TASK, Job
from common import command, strict_json
from common.errors import ShortwaveError, UsageError
from common.options import settings_parser
from common.process_environment import tuned
from common.settings import parse
from ssl_core.downstream.task_recipe import recipe_of
from ssl_core.training import hf_checkpoint as hf
from ssl_core.training import randomness
from ssl_core.wav2vec2.config import preset
from ssl_core.wav2vec2.model import PretrainingModel

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpochSettings:
    """What to train on, and for how long."""

    data: Path
    """EmoDB with labels.csv."""
    clips: PositiveInt = PositiveInt(48)
    """Training clips."""
    epochs: PositiveInt = PositiveInt(10)
    """Epochs with a frozen backbone, at least 2."""
    unfrozen_epochs: PositiveInt = PositiveInt(2)
    """Epochs with an unfrozen backbone, at least 2."""
    micro_batch: int = 0
    """Clips of ours in memory at a time with an unfrozen backbone; 0 is the whole batch."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of products."""

    def validate(self) -> None:
        """Check values; raises `UsageError`."""
        for name in ("epochs", "unfrozen_epochs"):
            if getattr(self, name) < 2:
                option = "--" + name.replace("_", "-")
                raise UsageError(f"{option} must be at least 2: the first epoch is not like others")


class Worker:
    """A child process that takes epochs on request."""

    def __init__(self, job: Job, cache: Path) -> None:
        """Start the process, with a feature cache of its own in `cache`."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.finetune_worker", json.dumps(job._asdict())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=(tuned(os.environ) if job.name == OURS else os.environ)
            | {"XDG_CACHE_HOME": str(cache)},
        )
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):
                found = json.loads(line)
                if isinstance(found, dict):
                    return found
        raise ShortwaveError(f"a worker ended with {self._process.wait()}")

    def epoch(self, number: int) -> dict[str, Any]:
        """Take an epoch; its row of seconds, loss and peak."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{number}\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def workers(jobs: Sequence[Job], folder: Path) -> Iterator[list[Worker]]:
    """Start a worker for each job, with caches in `folder`; all are ended at exit."""
    started: list[Worker] = []
    try:
        for number, job in enumerate(jobs):
            started.append(Worker(job, folder / f"cache-{number}-{job.unfrozen}"))
        yield started
    finally:
        for worker in started:
            worker.close()


def alternately(jobs: Sequence[Job], epochs: int, folder: Path) -> list[list[dict[str, Any]]]:
    """Let a worker for each job take an epoch in turn; rows of epochs for each worker.

    Args:
        jobs: one for each worker.
        epochs: of each worker.
        folder: for the workers' caches.
    """
    console = Console(stderr=True)
    rows: list[list[dict[str, Any]]] = [[] for _ in jobs]
    with workers(jobs, folder) as started:
        for number in range(epochs):
            for own, worker, job in zip(rows, started, jobs, strict=True):
                own.append(worker.epoch(number))
                console.print(
                    f"{'unfrozen' if job.unfrozen else 'frozen'}, epoch {number + 1}, "
                    f"{job.name}: {own[-1]['seconds']:.2f} s, loss {own[-1]['loss']:.4f}",
                    highlight=False,
                )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare; returns the exit code."""
    parser = settings_parser(
        EpochSettings, prog="python -m benchmarks.finetune", description=__doc__
    )
    settings, _ = parse(EpochSettings, parser, arguments)
    with tempfile.TemporaryDirectory(prefix="finetune-") as name:
        folder = Path(name)
        checkpoint = folder / "base"
        checkpoint.mkdir()
        make_base(checkpoint)

        def job(name: str, unfrozen: bool, keep: bool = True) -> Job:
            return Job(
                name=name,
                checkpoint=str(checkpoint),
                data=str(settings.data.resolve()),
                unfrozen=unfrozen,
                clips=settings.clips,
                precision=settings.precision,
                keep_extracted=keep,
                micro_batch=settings.micro_batch if name == OURS and unfrozen else 0,
            )

        frozen = alternately([job(OURS, False), job(PEER, False)], settings.epochs, folder)
        unfrozen = alternately(
            [job(OURS, True), job(PEER, True), job(OURS, True, keep=False)],
            settings.unfrozen_epochs,
            folder,
        )
    print(strict_json.dumps(_summary(frozen, unfrozen)))
    return 0


def make_base(folder: Path) -> None:
    """Write a `base` backbone with initial weights in transformers' layout, for both libraries."""
    with randomness.torch_seed(torch.device("cpu"), 0, "weights"):
        model = PretrainingModel(preset("base"))
    hf.save_model(folder, model.config, model.state_dict())
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "feature_extractor_type": "Wav2Vec2FeatureExtractor",
                "do_normalize": False,
                "feature_size": 1,
                "padding_value": 0.0,
                "return_attention_mask": True,
                "sampling_rate": 16000,
            }
        )
    )


def _summary(
    frozen: list[list[dict[str, Any]]], unfrozen: list[list[dict[str, Any]]]
) -> dict[str, float]:
    own, peer = ([row["seconds"] for row in rows] for rows in frozen)
    later = [[s for row in rows[1:] for s in row["updates"]] for rows in unfrozen]
    cached, theirs, plain = (statistics.median(seconds) for seconds in later)
    peaks = [max(row["peak"] for row in rows) for rows in unfrozen]
    # `ssl_core.finetune` computes the output of the convolutions once, in the recipe's first epoch,
    # unless it is told to keep nothing (`--cache 0`).
    epochs, steps = recipe_of(TASK).epochs, len(unfrozen[0][0]["updates"])
    whole = unfrozen[0][0]["seconds"] + (epochs - 1) * steps * cached
    result = {
        "cached_epoch_speedup": own[0] / statistics.median(own[1:]),
        "frozen_speedup_vs_speechbrain": sum(peer) / sum(own),
        "frozen_later_epoch_speedup": statistics.median(peer[1:]) / statistics.median(own[1:]),
        "unfrozen_speedup_vs_speechbrain": epochs * steps * theirs / whole,
        "unfrozen_speedup_from_the_second_epoch": theirs / cached,
        "unfrozen_speedup_nothing_kept": theirs / plain,
        "unfrozen_peak_ratio": peaks[0] / peaks[1],
        "unfrozen_peak_ratio_nothing_kept": peaks[2] / peaks[1],
        "ours_frozen_seconds": sum(own),
        "speechbrain_frozen_seconds": sum(peer),
        "ours_step_seconds": cached,
        "ours_step_seconds_nothing_kept": plain,
        "speechbrain_step_seconds": theirs,
        "ours_peak_mib": peaks[0] / 2**20,
        "speechbrain_peak_mib": peaks[1] / 2**20,
        "ours_last_loss": frozen[0][-1]["loss"],
        "speechbrain_last_loss": frozen[1][-1]["loss"],
    }
    return {key: round(value, 4) for key, value in result.items()}


if __name__ == "__main__":
    command.run(main)
