"""Runs the batches of an update: at once on a CPU, without waiting on a GPU."""

from collections.abc import Callable
from typing import Protocol

import torch

from ssl_core.training.step_inputs import BatchInputs, Compute, Controls, Stage
from ssl_core.training.step_report import Counts, StepReport, make_report


class Runner(Protocol):
    """Runs batches on a device."""

    def run(self, inputs: BatchInputs, stage: Stage) -> None:
        """Run a batch.

        Args:
            inputs: on the host.
            stage: the batch's place in its update.
        """

    def totals(self) -> Callable[[], list[float]]:
        """What reads the totals of the update whose last batch has just been run."""


class Taken:
    """An update that was taken, or is still being computed by a GPU."""

    def __init__(self, counts: Counts, read: Callable[[], list[float]]) -> None:
        """`counts`: what the host knows; `read`: waits for the device and returns its totals."""
        self.counts, self._read = counts, read

    def report(self) -> StepReport:
        """The report; waits for the device."""
        return make_report(self.counts, self._read())


class DirectRunner:
    """Computes each batch at once, where the host and the device are one."""

    def __init__(self, compute: Compute, device: torch.device, resident: bool) -> None:
        """`resident`: whether controls are tensors on the device."""
        self._compute, self._device, self._resident = compute, device, resident
        self._totals = torch.zeros(0)

    def run(self, inputs: BatchInputs, stage: Stage) -> None:
        """See `Runner.run`."""
        if self._resident:
            inputs = on_device(inputs, self._device)
        self._totals = self._compute(inputs, stage)

    def totals(self) -> Callable[[], list[float]]:
        """See `Runner.totals`."""
        totals = self._totals.clone()
        return lambda: [float(value) for value in totals.unbind()]


def on_device(inputs: BatchInputs, device: torch.device) -> BatchInputs:
    """A copy of the inputs on a device, also where that is the host: a trace counts it."""
    numbers = torch.tensor([float(value) for value in inputs.controls]).to(device)
    return BatchInputs(
        inputs.waveforms.to(device, copy=True),
        inputs.masked.to(device),
        inputs.seeds.to(device),
        Controls(*numbers.unbind()),
    )


def make_runner(
    compute: Compute,
    device: torch.device,
    resident: bool,
    graph: bool,
    begin: Callable[[bool], None],
) -> Runner:
    """The runner for a device.

    Args:
        compute: computes a batch.
        device: of the step.
        resident: whether all of an update stays on the device.
        graph: whether a GPU replays its kernels from a CUDA graph.
        begin: called before a GPU is given kernels one by one (False) or captures them (True).
    """
    if device.type == "cuda":
        from ssl_core.training.cuda_runner import CudaRunner

        return CudaRunner(compute, device, graph, begin)
    return DirectRunner(compute, device, resident)
