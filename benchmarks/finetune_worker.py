"""Takes the epochs to be measured, in a process of its own.

The parent, `benchmarks.finetune`, runs `python -m benchmarks.finetune_worker JOB`; they exchange
lines of JSON.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from partitions.audio import read_piece
from ssl_core.downstream.clip_loader import ClipLoader
from ssl_core.downstream.clips import TaskData
from ssl_core.downstream.corpora import emotion
from ssl_core.downstream.frozen_part import FrozenPart
from ssl_core.downstream.learning_rates import Rates
from ssl_core.downstream.task_model import TaskModel, load_upstream
from ssl_core.downstream.task_recipe import TaskRecipe, recipe_of
from ssl_core.downstream.task_step import TaskStep
from ssl_core.planning.process_memory import peak_bytes, reset_peak
from ssl_core.planning.step_plan import Plan
from ssl_core.training import randomness
from ssl_core.wav2vec2.config import preset

OURS, PEER = "shortwave", "speechbrain"
TASK = "emotion"


class Job(NamedTuple):
    """What a worker does."""

    name: str
    """Whose epochs: `OURS` or `PEER`."""
    checkpoint: str
    """Directory of the backbone."""
    data: str
    """Folder of EmoDB."""
    unfrozen: bool
    clips: int
    """Training clips."""
    precision: Literal["fp32", "bf16"]
    keep_extracted: bool
    """Whether the output of frozen convolutions is cached, for ours."""
    micro_batch: int
    """Clips in memory at a time, for ours; 0 is the whole batch."""


def read(job: Job) -> TaskData:
    """The first clips of the first fold, in a seeded order."""
    data = emotion.read(Path(job.data), 1)
    order = randomness.generator(0, "benchmark").permutation(len(data.train))
    chosen = tuple(data.train[int(place)] for place in order[: job.clips])
    return TaskData(data.root, chosen, data.valid, data.test, data.labels)


Epoch = Callable[[int], tuple[float, list[float]]]
"""Takes an epoch by number; returns its mean loss and the seconds of each update."""


def ours(job: Job, data: TaskData, recipe: TaskRecipe) -> Epoch:
    """Our epochs, as `ssl_core.finetune` takes them.

    Args:
        job: what to train.
        data: clips.
        recipe: of the task.
    """
    model = TaskModel.new(load_upstream(job.checkpoint, "base", 0), recipe, len(data.labels), 0)
    plan = Plan(batch=recipe.batch, micro_batch=job.micro_batch, precision=job.precision)
    step = TaskStep(model, plan, unfrozen=job.unfrozen, seed=0)
    keep = not job.unfrozen or job.keep_extracted
    limit = 2**34 if keep else 0
    loader = ClipLoader(data.root, data.labels, recipe, FrozenPart(step), limit)
    rates, batches = Rates(recipe), -(-len(data.train) // recipe.batch)

    def epoch(number: int) -> tuple[float, list[float]]:
        loader.prepare(data.train, show=False)
        losses, seconds = [], []
        start = time.perf_counter()
        for place, batch in loader.epoch(data.train, recipe.batch, 0, number):
            update = number * batches + place
            losses.append(step.update(batch, update, rates.at(number)).loss)
            seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
        return statistics.mean(losses), seconds

    return epoch


def speechbrain(job: Job, data: TaskData, recipe: TaskRecipe) -> Epoch:
    """SpeechBrain's epochs on the same batches.

    Args:
        job: what to train.
        data: clips.
        recipe: of the task.

    Raises:
        ImportError: it is not installed.
    """
    from speechbrain.core import Brain, Stage
    from speechbrain.integrations.huggingface.wav2vec2 import Wav2Vec2
    from speechbrain.nnet.linear import Linear
    from speechbrain.nnet.losses import nll_loss
    from speechbrain.nnet.pooling import StatisticsPooling

    folder = Path(job.checkpoint)
    backbone = Wav2Vec2(
        str(folder),
        str(folder / "speechbrain"),
        freeze=not job.unfrozen,
        freeze_feature_extractor=True,
    )
    classes = len(data.labels)
    head = Linear(input_size=preset("base").hidden_size, n_neurons=classes, bias=True)

    class Emotion(Brain):
        """Like the recipe's `EmoIdBrain`."""

        def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
            """Log probabilities `[clip, class]` of waveforms `[clip, sample]`."""
            waveforms, lengths, _ = batch
            outputs = self.modules.wav2vec2(waveforms, lengths)
            outputs = self.hparams.avg_pool(outputs, lengths)
            outputs = outputs.view(outputs.shape[0], -1)
            return self.hparams.log_softmax(self.modules.output_mlp(outputs))

        def compute_objectives(self, predictions: Tensor, batch: Any, stage: Stage) -> Tensor:
            """Mean negative log-likelihood, a scalar, of log probabilities `[clip, class]`."""
            return nll_loss(predictions[:, None], batch[2][:, None])

        def init_optimizers(self) -> None:
            """Make two optimizers, as in the recipe."""
            self.optimizer = self.hparams.opt_class(self.hparams.model.parameters())
            self.optimizers_dict = {"model_optimizer": self.optimizer}
            if job.unfrozen:
                slow = self.hparams.wav2vec2_opt_class(self.modules.wav2vec2.parameters())
                self.optimizers_dict["wav2vec2_optimizer"] = slow

    brain = Emotion(
        modules={"wav2vec2": backbone, "output_mlp": head},
        hparams={
            "avg_pool": StatisticsPooling(return_std=False),
            "log_softmax": torch.nn.LogSoftmax(dim=-1),
            "model": torch.nn.ModuleList([head]),
            "opt_class": lambda p: torch.optim.Adam(p, lr=recipe.head_rate),
            "wav2vec2_opt_class": lambda p: torch.optim.Adam(p, lr=recipe.backbone_rate),
        },
        run_opts={"device": "cpu", "precision": job.precision},
    )
    brain.on_fit_start()
    brain.modules.train()
    audio = {clip: torch.from_numpy(read_piece(data.root, clip.piece)) for clip in data.train}
    places = {label: place for place, label in enumerate(data.labels)}

    def epoch(number: int) -> tuple[float, list[float]]:
        losses, seconds = [], []
        clips = ClipLoader.order(data.train, 0, 0, number)
        for first in range(0, len(clips), recipe.batch):
            start = time.perf_counter()
            chosen = clips[first : first + recipe.batch]
            waves = [audio[clip] for clip in chosen]
            padded = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)
            lengths = torch.tensor([len(wave) for wave in waves]) / padded.shape[1]
            targets = torch.tensor([places[clip.label] for clip in chosen])
            losses.append(float(brain.fit_batch((padded, lengths, targets))))
            seconds.append(time.perf_counter() - start)
        return statistics.mean(losses), seconds

    return epoch


def serve(text: str) -> int:
    """Take an epoch for every line on stdin, which is its number; returns the exit code."""
    job = Job(**json.loads(text))
    os.environ["HF_HUB_OFFLINE"] = "1"
    recipe, data = recipe_of(TASK), read(job)
    epoch = (ours if job.name == OURS else speechbrain)(job, data, recipe)
    reset_peak()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        loss, updates = epoch(int(line))
        row = {
            "seconds": time.perf_counter() - start,
            "updates": updates,
            "loss": loss,
            "peak": peak_bytes(),
        }
        print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1]))
