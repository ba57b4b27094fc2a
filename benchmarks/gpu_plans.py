"""What the planner says of the cells of `benchmarks.gpu`, found out while the GPU is measured.

It needs no GPU and takes a minute or two, on one core of the parent process.
"""

import threading
from typing import Any

from benchmarks.gpu_jobs import GIB, Cell, GpuJob
from ssl_core.planning.decision import Decision
from ssl_core.planning.estimate import estimate
from ssl_core.planning.operation_count import count_operations


class Plans:
    """Operations of an update and predicted peaks of each cell, as far as they are known."""

    def __init__(self, job: GpuJob) -> None:
        """Start; `job` has all cells."""
        self.job = job
        self.found: dict[str, dict[str, Any]] = {cell.name: {} for cell in job.cells}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Wait for the rest, at most so long; whether all is there."""
        self._thread.join(max(0.0, seconds))
        return not self._thread.is_alive()

    def _run(self) -> None:
        for part in (self._default, self._leanest):
            for cell in self.job.cells:
                try:
                    part(cell)
                except Exception as error:
                    self.found[cell.name]["failure"] = f"{type(error).__name__}: {error}"[:300]

    def _default(self, cell: Cell) -> None:
        """Operations in 10^9 and the peak in GiB, by the default plan."""
        work, plan = self.job.work(), self.job.plan(cell)
        own = self.found[cell.name]
        own["gflop"] = count_operations(work, plan) / 1e9
        own["predicted_gib"] = estimate(work, plan, runtime=0).total / GIB

    def _leanest(self, cell: Cell) -> None:
        decision = Decision(self.job.work(), self.job.plan(cell), available=0, runtime=0)
        self.found[cell.name]["leanest_gib"] = decision.leanest.estimate.total / GIB
