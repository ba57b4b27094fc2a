"""The paper's Table 3 from shapes: which tasks a plain step fine-tunes on three devices.

A cell fits where `plain_task_step` on the device's accelerator, with the two constants that were
calibrated on Table 2 and no other, takes no more than the device's `training_bytes`. What a head
takes is that of this project's, traced.
"""

import csv
import dataclasses
import functools
from importlib import resources
from typing import Literal

import torch
from torch._subclasses import FakeTensorMode

from ssl_core.downstream.task_work import (
    TaskWork,
    learning_rates,
    make_batch,
    make_model,
    make_step,
    task_work,
)
from ssl_core.paper.plain_step import Accelerator, plain_task_step
from ssl_core.planning.step_plan import Plan
from ssl_core.planning.trace import LiveMemory
from ssl_core.wav2vec2.config import preset

DEVICES = ("rpi4", "jetson-xavier-nx", "jetson-xavier-agx")
"""In the order of the table."""
TASKS = {"kws": "kws12", "sf": "slots", "er": "emotion", "sid_asv": "speaker", "asr": "asr"}
"""The paper's names of tasks, and this project's."""
Backbone = Literal["frozen", "unfrozen"]


@dataclasses.dataclass(frozen=True)
class TaskCell:
    """One entry of the table."""

    task: str
    """By this project's name."""
    batch: int
    device: str
    backbone: Backbone
    outcome: Literal["fits", "oom"]
    seconds: float | None
    """A batch, where it fits."""

    @property
    def unfrozen(self) -> bool:
        """Whether the backbone is trained."""
        return self.backbone == "unfrozen"

    @property
    def work(self) -> TaskWork:
        """The task; nothing is computed before."""
        return task_work(self.task, preset("base"), unfrozen=self.unfrozen)

    @property
    def length(self) -> float:
        """Seconds of a clip: the corpus' mean (the paper's Figure 1), or of SpeechBrain's pieces.

        Speakers' clips, of 8.3 s in the mean, are cut into 3 s; so must the paper's have been: its
        batch of 8 takes less time than one of emotion recognition, 4 clips of 4.55 s.
        """
        return self.work.length


@functools.cache
def paper_task_cells() -> tuple[TaskCell, ...]:
    """The 30 entries of the table, from `table3.csv`."""
    text = (resources.files(__package__) / "table3.csv").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return tuple(
        TaskCell(
            task=TASKS[row["task"]],
            batch=int(row["batch"]),
            device=row["device"],
            backbone="unfrozen" if row["backbone"] == "unfrozen" else "frozen",
            outcome="oom" if row["outcome"] == "oom" else "fits",
            seconds=float(row["seconds_per_batch"]) if row["seconds_per_batch"] else None,
        )
        for row in csv.DictReader(lines)
    )


def task_need(cell: TaskCell, accelerator: Accelerator) -> int:
    """Bytes of a plain step of `base`, above imports and CUDA context."""
    return _need(cell.task, cell.batch, cell.unfrozen, accelerator)


@functools.cache
def _need(task: str, batch: int, unfrozen: bool, accelerator: Accelerator) -> int:
    config = preset("base")
    work = task_work(task, config, unfrozen=False, cached=True)
    length = work.length
    head = trace_head(work, Plan(length=length, batch=batch))
    return plain_task_step(config, length, batch, accelerator, head, unfrozen=unfrozen).total


def trace_head(work: TaskWork, plan: Plan) -> dict[str, int]:
    """Bytes of a head alone, trained on frames: parameters, optimizer state and the rest."""
    memory, work = LiveMemory(), dataclasses.replace(work, share="none", cached=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = make_model(work)
        with memory:
            memory.label("parameters")
            for parameter in model.head.parameters():
                memory.follow(parameter)
            memory.label("optimizer state")
            step = make_step(model, work, plan)
            memory.label("activations")
            step.update(make_batch(step, work, torch.zeros), 0, learning_rates(work))
    parts = memory.peak_parts
    fixed = {name: parts.get(name, 0) for name in ("parameters", "optimizer state")}
    return fixed | {"activations": memory.peak - sum(fixed.values())}
