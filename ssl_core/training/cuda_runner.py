"""Runs updates on a GPU without waiting for it, from CUDA graphs where shapes repeat.

A batch is copied to pinned memory, from there to where the graphs read it. The kernels of the first
update are launched one by one, which also compiles them; after that a batch is captured when one of
its kind first comes, and from then on replayed. A kind is the shape of a batch, its place in the
update and the layers that run: with layerdrop there are several, whose graphs share their memory.
Batches that differ only in the layers that run have the same kernels: none is launched outside of
graphs once there are graphs, since it would need its activations' memory beside theirs.
Everything runs on one stream of its own, so that kernels launched and replayed do the same.
"""

import collections
import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssl_core.training.step_inputs import BatchInputs, Compute, Controls, Stage

log = logging.getLogger("shortwave.device")
SLOTS = 2
"""Batches that may be under way to the device at a time."""
GRAPHS = 512
"""Graphs that are kept; the one that was not used for longest goes first."""


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all updates on a device: cuBLAS keeps a workspace for each stream."""
    return torch.cuda.Stream(device)


class _Kind(NamedTuple):
    """What a graph is made for."""

    waveforms: torch.Size
    masked: torch.Size
    stage: Stage


def _kernels(kind: _Kind) -> _Kind:
    """What decides which kernels a batch has: not the layers that run, nor how many frames."""
    return kind._replace(stage=kind.stage._replace(masked=0, keep=()))


class _Slot:
    """Pinned memory for one batch, and the event after which it may be written again."""

    def __init__(self) -> None:
        self.tensors: tuple[Tensor, ...] = ()
        self.event = torch.cuda.Event()

    def fill(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Copy tensors into pinned memory, once the copy before has left it."""
        self.event.synchronize()
        if [x.shape for x in self.tensors] != [x.shape for x in tensors]:
            self.tensors = tuple(torch.empty_like(x, pin_memory=True) for x in tensors)
        for own, given in zip(self.tensors, tensors, strict=True):
            own.copy_(given)
        return self.tensors


class CudaRunner:
    """Runs batches on a GPU; see `step_runner.Runner`."""

    def __init__(
        self, compute: Compute, device: torch.device, graph: bool, begin: Callable[[bool], None]
    ) -> None:
        """Make the stream on which all updates run.

        Args:
            compute: computes a batch on the device.
            device: of the step.
            graph: whether to capture graphs.
            begin: called before kernels are launched one by one (False) or captured (True).
        """
        self._compute, self._graph, self._begin = compute, graph, begin
        self._device = device
        self._stream = _stream(device)
        self._slots = collections.deque(_Slot() for _ in range(SLOTS))
        self._static: dict[tuple[torch.Size, ...], tuple[Tensor, ...]] = {}
        self._launched: set[_Kind] = set()
        self._failed: set[_Kind] = set()
        self._whole = False
        self._graphs: collections.OrderedDict[_Kind, torch.cuda.CUDAGraph] = (
            collections.OrderedDict()
        )
        self._pool: Any = None
        self._totals: Tensor | None = None

    def run(self, inputs: BatchInputs, stage: Stage) -> None:
        """See `Runner.run`."""
        numbers = torch.tensor([float(value) for value in inputs.controls])
        given = (inputs.waveforms, inputs.masked, inputs.seeds, numbers)
        slot = self._slots[0]
        self._slots.rotate(-1)
        pinned = slot.fill(given)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            static = self._place(pinned)
            for own, source in zip(static, pinned, strict=True):
                own.copy_(source, non_blocking=True)
            slot.event.record(self._stream)
            waveforms, masked, seeds, numbers = static
            on_device = BatchInputs(waveforms, masked, seeds, Controls(*numbers.unbind()))
            kind = _Kind(inputs.waveforms.shape, inputs.masked.shape, stage)
            if kind in self._graphs:
                self._graphs.move_to_end(kind)
                self._graphs[kind].replay()
            elif self._may_capture(kind):
                self._capture_and_replay(kind, on_device)
            else:
                self._launch(kind, on_device)
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def _place(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The memory on the device from which batches of these shapes are computed."""
        key = tuple(x.shape for x in tensors)
        if key not in self._static:
            self._static[key] = tuple(torch.empty_like(x, device=self._device) for x in tensors)
        return self._static[key]

    def _may_capture(self, kind: _Kind) -> bool:
        known = self._whole and _kernels(kind) in self._launched
        return self._graph and known and _kernels(kind) not in self._failed

    def _launch(self, kind: _Kind, inputs: BatchInputs) -> None:
        """Launch the kernels of a batch one by one."""
        self._begin(False)
        self._totals = self._compute(inputs, kind.stage)
        self._launched.add(_kernels(kind))
        self._whole |= kind.stage.last

    def _capture_and_replay(self, kind: _Kind, inputs: BatchInputs) -> None:
        """Capture the kernels of a batch, which does not run them, and replay them."""
        try:
            graph = self._capture(kind, inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            log.warning("no CUDA graph: %s; kernels are launched one by one", error)
            self._failed.add(_kernels(kind))
            self._launch(kind, inputs)
            return
        graph.replay()

    def _capture(self, kind: _Kind, inputs: BatchInputs) -> torch.cuda.CUDAGraph:
        """Capture the kernels of a batch, which does not run them."""
        self._begin(True)
        torch.cuda.empty_cache()  # a graph's memory is its own
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile, as the loader does to pin memory.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            self._totals = self._compute(inputs, kind.stage)
        self._graphs[kind] = graph
        if len(self._graphs) > GRAPHS:
            self._graphs.popitem(last=False)
        return graph

    def totals(self) -> Callable[[], list[float]]:
        """See `Runner.totals`."""
        assert self._totals is not None
        values = torch.empty(self._totals.shape, dtype=self._totals.dtype, pin_memory=True)
        done = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            values.copy_(self._totals, non_blocking=True)
            done.record(self._stream)

        def read() -> list[float]:
            done.synchronize()
            found: list[float] = values.tolist()
            return found

        return read
