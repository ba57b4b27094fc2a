"""Fine-tuning against SpeechBrain: the same task, clips, batches and backbone weights.

`python -m benchmarks.finetune --data EMODB` takes, in turn, epochs with a frozen backbone and steps
with an unfrozen one (its convolutions frozen, as in the recipe), each library in a process of its
own, and prints one JSON object as its last line. `unfrozen_speedup_vs_speechbrain` is of all epochs
of the recipe as `ssl_core.finetune` takes them, from steps of the first and of later epochs.

SpeechBrain is its `Wav2Vec2` in its `Brain`, put together as in its recipe
`IEMOCAP/emotion_recognition/train_with_wav2vec2.py`. It finds its waveforms decoded in memory;
ours reads files. Both take the clips in the same order.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from ssl_core.downstream.loading import ClipLoader
from torch import Tensor

from common import command
from common.errors import ShortwaveError
from common.process_environment import tuned
from partitions.audio import read_piece
from ssl_core.downstream.clips import TaskData
from ssl_core.downstream.learning_rates import Rates
from ssl_core.downstream.task_model import TaskModel, load_upstream
from ssl_core.downstream.task_recipe import TaskRecipe, recipe_of
from ssl_core.downstream.task_step import TaskStep
from ssl_core.downstream.tasks import emotion
from ssl_core.planning.process_memory import peak_bytes, reset_peak
from ssl_core.planning.step_plan import Plan
from ssl_core.training import hf_checkpoint as hf
from ssl_core.training import randomness
from ssl_core.wav2vec2.config import preset
from ssl_core.wav2vec2.model import PretrainingModel

ROOT = Path(__file__).parents[1]
OURS, PEER = "shortwave", "speechbrain"
TASK = "emotion"


class Work(NamedTuple):
    """What a worker does."""

    name: str
    checkpoint: str
    data: str
    unfrozen: bool
    clips: int
    precision: str
    keep_extracted: bool
    micro_batch: int


def read(work: Work) -> TaskData:
    """The first clips of a fold, in a seeded order."""
    data = emotion.read(Path(work.data), 1)
    order = randomness.generator(0, "benchmark").permutation(len(data.train))
    chosen = tuple(data.train[int(place)] for place in order[: work.clips])
    return TaskData(data.root, chosen, data.valid, data.test, data.labels)


Epoch = Callable[[int], tuple[float, list[float]]]
"""Takes an epoch: its mean loss, and the seconds of each update."""


def ours(work: Work, data: TaskData, recipe: TaskRecipe) -> Epoch:
    """Our epochs, as `ssl_core.finetune` takes them."""
    model = TaskModel.new(load_upstream(work.checkpoint, "base", 0), recipe, len(data.labels), 0)
    plan = Plan(
        batch=recipe.batch,
        micro_batch=work.micro_batch,
        precision="bf16" if work.precision == "bf16" else "fp32",
    )
    step = TaskStep(model, plan, unfrozen=work.unfrozen, seed=0)
    keep = not work.unfrozen or work.keep_extracted
    loader = ClipLoader(data.root, data.labels, step, 2**34 if keep else 0)
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


def speechbrain(work: Work, data: TaskData, recipe: TaskRecipe) -> Epoch:
    """SpeechBrain's epochs on the same batches.

    Raises:
        ImportError: it is not installed.
    """
    from speechbrain.core import Brain, Stage
    from speechbrain.integrations.huggingface.wav2vec2 import Wav2Vec2
    from speechbrain.nnet.linear import Linear
    from speechbrain.nnet.losses import nll_loss
    from speechbrain.nnet.pooling import StatisticsPooling

    folder = Path(work.checkpoint)
    backbone = Wav2Vec2(
        str(folder),
        str(folder / "speechbrain"),
        freeze=not work.unfrozen,
        freeze_feature_extractor=True,
    )
    classes = len(data.labels)
    head = Linear(input_size=preset("base").hidden_size, n_neurons=classes, bias=True)

    class Emotion(Brain):
        """As `EmoIdBrain` of the recipe."""

        def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
            """Log probabilities `[clip, class]`."""
            waveforms, lengths, _ = batch
            outputs = self.modules.wav2vec2(waveforms, lengths)
            outputs = self.hparams.avg_pool(outputs, lengths)
            outputs = outputs.view(outputs.shape[0], -1)
            return self.hparams.log_softmax(self.modules.output_mlp(outputs))

        def compute_objectives(self, predictions: Tensor, batch: Any, stage: Stage) -> Tensor:
            """Mean negative log-likelihood."""
            return nll_loss(predictions[:, None], batch[2][:, None])

        def init_optimizers(self) -> None:
            """Two of them, as in the recipe."""
            self.optimizer = self.hparams.opt_class(self.hparams.model.parameters())
            self.optimizers_dict = {"model_optimizer": self.optimizer}
            if work.unfrozen:
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
        run_opts={"device": "cpu", "precision": work.precision},
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
    """A worker: an epoch for every number on a line of stdin."""
    work = Work(**json.loads(text))
    os.environ["HF_HUB_OFFLINE"] = "1"
    recipe, data = recipe_of(TASK), read(work)
    epoch = (ours if work.name == OURS else speechbrain)(work, data, recipe)
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


class Worker:
    """A process that takes epochs when it is asked to."""

    def __init__(self, work: Work, cache: Path) -> None:
        """Start it, with a cache of features of its own."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.finetune", "--worker", json.dumps(work._asdict())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=(tuned(os.environ) if work.name == OURS else os.environ)
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
        """Take an epoch."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{number}\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def workers(works: Sequence[Work], folder: Path) -> Iterator[list[Worker]]:
    """Workers one after the other, ended in any case."""
    started: list[Worker] = []
    try:
        for number, work in enumerate(works):
            started.append(Worker(work, folder / f"cache-{number}-{work.unfrozen}"))
        yield started
    finally:
        for worker in started:
            worker.close()


def alternately(works: Sequence[Work], epochs: int, folder: Path) -> list[list[dict[str, Any]]]:
    """Rows of each worker's epochs, taken in turn."""
    console = Console(stderr=True)
    rows: list[list[dict[str, Any]]] = [[] for _ in works]
    with workers(works, folder) as started:
        for number in range(epochs):
            for own, worker, work in zip(rows, started, works, strict=True):
                own.append(worker.epoch(number))
                console.print(
                    f"{'unfrozen' if work.unfrozen else 'frozen'}, epoch {number + 1}, "
                    f"{work.name}: {own[-1]['seconds']:.2f} s, loss {own[-1]['loss']:.4f}",
                    highlight=False,
                )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare; returns the exit code."""
    parser = command.Parser(prog="python -m benchmarks.finetune", description=__doc__)
    parser.add_argument("--data", type=Path, help="EmoDB with labels.csv")
    parser.add_argument("--clips", type=int, default=48, help="training clips")
    parser.add_argument("--epochs", type=int, default=10, help="frozen epochs")
    parser.add_argument("--unfrozen-epochs", type=int, default=2, help="unfrozen epochs")
    parser.add_argument(
        "--micro-batch", type=int, default=0, help="clips of ours in memory at a time, unfrozen"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--worker", help="for internal use")
    options = parser.parse_args(arguments)
    if options.worker:
        return serve(options.worker)
    if options.data is None:
        parser.error("--data is needed: the folder of EmoDB's labels.csv")
    with tempfile.TemporaryDirectory(prefix="finetune-") as name:
        folder = Path(name)
        checkpoint = folder / "base"
        checkpoint.mkdir()
        _make_base(checkpoint)

        def work(name: str, unfrozen: bool, keep: bool = True) -> Work:
            data = str(options.data.resolve())
            clips, precision = options.clips, options.precision
            split = options.micro_batch if name == OURS and unfrozen else 0
            return Work(name, str(checkpoint), data, unfrozen, clips, precision, keep, split)

        frozen = alternately([work(OURS, False), work(PEER, False)], options.epochs, folder)
        unfrozen = alternately(
            [work(OURS, True), work(PEER, True), work(OURS, True, False)],
            options.unfrozen_epochs,
            folder,
        )
    print(json.dumps(_summary(frozen, unfrozen)))
    return 0


def _make_base(folder: Path) -> None:
    """A backbone of base as it is initialised, in transformers' layout, for both."""
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
    # As `ssl_core.finetune` runs the recipe's epochs: what the convolutions make is computed once,
    # in the first, unless it is told to keep nothing (`--cache 0`).
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
