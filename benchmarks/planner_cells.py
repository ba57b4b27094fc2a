"""The updates whose peak memory `benchmarks.planner` measures."""

from typing import Literal, NamedTuple

from ssl_core.planning.step_plan import Precision


class Cell(NamedTuple):
    """An update of pretraining, and the rung of the planner's ladder on which it is taken."""

    model: str
    length: float
    """Seconds."""
    batch: int
    precision: Precision
    rung: int
    """From the fastest; negative from the leanest."""


class TaskCell(NamedTuple):
    """An update of a downstream task, on the `base` backbone."""

    task: str
    backbone: Literal["frozen", "unfrozen"]
    precision: Precision
    batch: int
    """0 is the paper's."""
    micro_batch: int
    cached: bool
    """Whether features were computed before."""


CELLS = (
    Cell("base", 1.0, 1, "fp32", 0), Cell("base", 1.0, 12, "fp32", 1),
    Cell("base", 1.0, 4, "bf16", 0), Cell("base", 1.0, 8, "fp32", -1),
    Cell("base", 1.0, 2, "bf16", -2), Cell("base", 5.0, 1, "fp32", 1),
    Cell("base", 5.0, 2, "fp32", 0), Cell("base", 5.0, 4, "fp32", 0),
    Cell("base", 5.0, 4, "bf16", 0), Cell("base", 5.0, 4, "fp32", 2),
    Cell("base", 5.0, 8, "fp32", 3), Cell("base", 5.0, 8, "bf16", 1),
    Cell("base", 5.0, 12, "fp32", -1), Cell("base", 5.0, 12, "bf16", -2),
    Cell("base", 5.0, 4, "fp32", 4), Cell("base", 10.0, 1, "fp32", 0),
    Cell("base", 10.0, 2, "bf16", 0), Cell("base", 10.0, 4, "fp32", 1),
    Cell("base", 10.0, 8, "fp32", 4), Cell("base", 10.0, 4, "bf16", -1),
    Cell("base", 10.0, 2, "fp32", -3), Cell("base", 15.0, 1, "fp32", 1),
    Cell("base", 15.0, 2, "fp32", 2), Cell("base", 15.0, 4, "bf16", 1),
    Cell("base", 15.0, 8, "bf16", -1), Cell("base", 15.0, 4, "fp32", -3),
    Cell("base", 15.0, 2, "bf16", 0), Cell("tiny", 1.0, 1, "fp32", 0),
    Cell("tiny", 1.0, 8, "fp32", 1), Cell("tiny", 1.0, 12, "bf16", 0),
    Cell("tiny", 1.0, 4, "fp32", -1), Cell("tiny", 2.0, 4, "bf16", 2),
    Cell("tiny", 5.0, 1, "bf16", 1), Cell("tiny", 5.0, 4, "fp32", 0),
    Cell("tiny", 5.0, 8, "fp32", 2), Cell("tiny", 5.0, 12, "bf16", 3),
    Cell("tiny", 5.0, 12, "fp32", -2), Cell("tiny", 10.0, 2, "fp32", 1),
    Cell("tiny", 10.0, 4, "bf16", 0), Cell("tiny", 10.0, 8, "fp32", 3),
    Cell("tiny", 10.0, 12, "fp32", 0), Cell("tiny", 15.0, 1, "bf16", -1),
    Cell("tiny", 15.0, 4, "fp32", 1), Cell("tiny", 15.0, 8, "bf16", 4),
    Cell("tiny", 15.0, 12, "fp32", -3), Cell("tiny", 15.0, 12, "bf16", 1),
)  # fmt: skip
"""Chosen before any measurement; they include every rung and the smallest and largest sizes."""
TASK_CELLS = (
    TaskCell("kws12", "frozen", "fp32", 0, 0, False),
    TaskCell("kws12", "unfrozen", "fp32", 0, 0, False),
    TaskCell("slots", "frozen", "fp32", 0, 0, False),
    TaskCell("slots", "unfrozen", "fp32", 0, 0, False),
    TaskCell("emotion", "frozen", "fp32", 0, 0, False),
    TaskCell("emotion", "unfrozen", "fp32", 0, 0, False),
    TaskCell("speaker", "frozen", "fp32", 0, 0, False),
    TaskCell("speaker", "unfrozen", "fp32", 0, 0, False),
    TaskCell("asr", "frozen", "fp32", 0, 0, False),
    TaskCell("asr", "unfrozen", "fp32", 0, 0, False),
    TaskCell("kws12", "frozen", "fp32", 0, 0, True), TaskCell("asr", "frozen", "fp32", 0, 0, True),
    TaskCell("kws12", "frozen", "bf16", 8, 0, False),
    TaskCell("kws12", "unfrozen", "bf16", 8, 0, False),
    TaskCell("kws12", "unfrozen", "fp32", 0, 4, False),
    TaskCell("slots", "frozen", "fp32", 0, 1, False),
    TaskCell("asr", "unfrozen", "fp32", 0, 1, False),
)  # fmt: skip
"""Batches are small in bf16, which is slow on processors that do not multiply in it."""
