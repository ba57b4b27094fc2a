"""Predicts the paper's Table 3 from shapes: which tasks a plain step fits on three devices.

A cell fits if `plain_task_step` on the device's accelerator needs at most the device's
`training_bytes`. The only constants are the two calibrated on Table 2. The memory of a head is that
of this project's head, traced.
"""

import csv
import dataclasses
import functools
from importlib import resources
from typing import Literal

import torch

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
"""Devices in the order of the table."""
TASKS = {"kws": "kws12", "sf": "slots", "er": "emotion", "sid_asv": "speaker", "asr": "asr"}
"""Task names of the paper, mapped to this project's."""
Backbone = Literal["frozen", "unfrozen"]


@dataclasses.dataclass(frozen=True)
class TaskCell:
    """One entry of the table."""

    task: str
    """This project's name of the task."""
    batch: int
    device: str
    backbone: Backbone
    outcome: Literal["fits", "oom"]
    seconds: float | None
    """Seconds of a batch; None if it does not fit."""

    @property
    def unfrozen(self) -> bool:
        """Whether the backbone is trained."""
        return self.backbone == "unfrozen"

    @property
    def work(self) -> TaskWork:
        """The task, without cached features."""
        return task_work(self.task, preset("base"), unfrozen=self.unfrozen)

    @property
    def length(self) -> float:
        """Seconds of a clip: the corpus' mean (the paper's Figure 1), or SpeechBrain's segments.

        Clips for speaker tasks, 8.3 s on average, are cut to 3 s. The paper must have cut them too:
        its batch of 8 takes less time than a batch of emotion recognition, 4 clips of 4.55 s.
        """
        return self.work.length


@functools.cache
def paper_task_cells() -> tuple[TaskCell, ...]:
    """Read the 30 entries of the table from `table3.csv`."""
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
    """Bytes of a plain step of `base` above imports and CUDA context."""
    return _need(cell.task, cell.batch, cell.unfrozen, accelerator)


@functools.cache
def _need(task: str, batch: int, unfrozen: bool, accelerator: Accelerator) -> int:
    config = preset("base")
    work = task_work(task, config, unfrozen=False, cached=True)
    length = work.length
    head = trace_head(work, Plan(length=length, batch=batch))
    return plain_task_step(config, length, batch, accelerator, head, unfrozen=unfrozen).total


def trace_head(work: TaskWork, plan: Plan) -> dict[str, int]:
    """Trace the bytes of a head trained on cached features, by part."""
    memory, work = LiveMemory(), dataclasses.replace(work, share="none", cached=True)
    with memory:
        memory.label("backbone")
        model = make_model(work)
        for parameter in model.head.parameters():
            memory.rename(parameter, "parameters")
        memory.peak = 0
        memory.label("optimizer state")
        step = make_step(model, work, plan)
        memory.label("activations")
        step.update(make_batch(step, work, torch.zeros), 0, learning_rates(work))
    parts = memory.peak_parts
    fixed = {name: parts.get(name, 0) for name in ("parameters", "optimizer state")}
    others = memory.peak - parts["backbone"] - sum(fixed.values())
    return fixed | {"activations": others}
