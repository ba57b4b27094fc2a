"""Traces what a GPU's memory holds during updates by fused kernels, and what is reserved for it.

The step runs on tensors without data, as in `trace`, with the kernels of a GPU, which launch
nothing there. Its allocations and frees, in their order, are then served by a caching allocator
like torch's: in the first update, and as a CUDA graph captures them into memory of its own.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable

from torch import Tensor

from ssl_core.planning.cuda_allocator import MIB, SMALLEST, CachingAllocator, Piece
from ssl_core.planning.parts import RESERVED, WORKSPACES
from ssl_core.planning.step_plan import Plan
from ssl_core.planning.trace import LiveMemory, TrackedBlock, take_update, without_layerdrop
from ssl_core.planning.triton_stand_in import triton_or_stand_in
from ssl_core.planning.work import Work
from ssl_core.wav2vec2 import device_kernels

WORKSPACE = 32 * MIB
"""Workspace of cuBLAS, for each thread that multiplies: the main one and that of the backward pass.
As of compute capability 9, 10 and 12; 8.1 MiB on older GPUs (parseChosenWorkspaceSize in torch's
aten/src/ATen/cuda/CublasHandlePool.cpp). cuBLASLt shares it; the fused kernels have none."""
UNSPLIT = "rests of blocks"
"""Of free blocks up to 1 MiB larger than what is asked for, which are not split but given whole."""
_UPDATES = "gradients"
_TRACED = 3
"""Micro-batches that are traced of a batch that has more than `_TRACED + 1`."""


class LoggedBlock(TrackedBlock):
    """Memory whose allocation and release are logged."""

    __slots__ = ("number",)

    def __init__(self, memory: "DeviceMemory", size: int, part: str) -> None:
        """Log the allocation of `size` bytes for a part."""
        super().__init__(memory, size, part)
        self.number = memory.log(self.size, part)

    def __del__(self) -> None:
        """Log the release."""
        super().__del__()
        self.memory.events.append(~self.number)  # type: ignore[attr-defined]


class DeviceMemory(LiveMemory):
    """Tracks memory as a GPU's allocator counts it, and logs its allocations and releases."""

    page = SMALLEST

    def __init__(self) -> None:
        """Log nothing yet."""
        super().__init__()
        self.events: list[int] = []
        """Numbers of blocks that are allocated, and `~number` of those that are released."""
        self.sizes: list[int] = []
        self.names: list[str] = []
        self.marks: list[int] = []
        """Events before and after the update."""

    def log(self, size: int, part: str) -> int:
        """Log an allocation of `size` bytes for a part; return its number."""
        self.sizes.append(size)
        self.names.append(part)
        self.events.append(len(self.sizes) - 1)
        return len(self.sizes) - 1

    def take(self, size: int) -> LoggedBlock:
        """Return memory of `size` bytes for a new tensor, and track it."""
        return LoggedBlock(self, size, self._part)

    def label(self, name: str) -> None:
        """Name the part that is made next; the model, once made, is moved to the device whole."""
        if self._label == "parameters":
            self.events = list(_held(self.events))
        super().label(name)

    def mark(self) -> None:
        """Remember where the update begins and ends."""
        self.marks.append(len(self.events))

    def rename(self, tensor: Tensor, part: str) -> None:
        """Count a tensor made inside, of any shape `[...]`, as another part."""
        super().rename(tensor, part)
        self.names[tensor.block.number] = part  # type: ignore[attr-defined]


def _held(events: Iterable[int]) -> dict[int, None]:
    """The blocks that are not released, in the order of their allocation."""
    held: dict[int, None] = {}
    for event in events:
        if event >= 0:
            held[event] = None
        else:
            held.pop(~event, None)
    return held


class _Replay:
    """Serves logged allocations, and remembers the peak of what is allocated."""

    def __init__(self, memory: DeviceMemory) -> None:
        self.memory, self.allocator = memory, CachingAllocator()
        self.peak = 0
        self.peak_parts: dict[str, int] = {}
        self._parts: collections.Counter[str] = collections.Counter()
        self._held: dict[int, Piece] = {}

    def run(self, events: Iterable[int], pool: str = "") -> None:
        for event in events:
            if event < 0:
                piece = self._held.pop(~event)
                self._parts[self.memory.names[~event]] -= self.memory.sizes[~event]
                self.allocator.free(piece)
            else:
                piece = self.allocator.allocate(self.memory.sizes[event], pool)
                self._held[event] = piece
                self._parts[self.memory.names[event]] += self.memory.sizes[event]
                if self.allocator.allocated > self.peak:
                    self.peak, self.peak_parts = self.allocator.allocated, dict(self._parts)


def trace_fused(work: Work, plan: Plan) -> DeviceMemory:
    """Run one update by fused kernels on tensors without data; all layers run."""
    memory = DeviceMemory()
    with triton_or_stand_in(), device_kernels.forced("fused"):
        take_update(memory, without_layerdrop(work), plan)
    return memory


def fused_parts(work: Work, plan: Plan) -> dict[str, int]:
    """Bytes that an update by fused kernels takes of a GPU's memory, by part.

    All parts together are what torch's allocator reserves at its peak; without `RESERVED` they
    are the peak of what it has allocated.
    """
    return of_few_micro_batches(
        plan, lambda smaller: _reserved(trace_fused(work, smaller), work, smaller)
    )


def of_few_micro_batches(plan: Plan, parts_of: Callable[[Plan], dict[str, int]]) -> dict[str, int]:
    """Parts of a plan's peak, from few micro-batches if it has many.

    Each further one adds the same: its features, which are kept, and its share of what is drawn for
    the whole batch.

    Args:
        plan: how a step is taken.
        parts_of: traces a plan, returns bytes by part.
    """
    size = plan.effective_micro_batch
    if plan.batch <= size * (_TRACED + 1):
        return parts_of(plan)
    few, more = (
        parts_of(dataclasses.replace(plan, batch=size * count)) for count in (_TRACED - 1, _TRACED)
    )
    times = (plan.batch - size * _TRACED) / size
    parts = {name: most + (most - few.get(name, 0)) * times for name, most in more.items()}
    # Gaps in segments and blocks do not grow evenly: they get the same fraction of a larger whole.
    gaps = (UNSPLIT, RESERVED)
    grown, before = (
        sum(value for name, value in each.items() if name not in gaps) for each in (parts, more)
    )
    return {
        name: int(more[name] * grown / before if name in gaps else value)
        for name, value in parts.items()
    }


def _reserved(memory: DeviceMemory, work: Work, plan: Plan) -> dict[str, int]:
    """Serve a traced update's allocations; see `fused_parts`."""
    begin, end = memory.marks
    setup, update = memory.events[:begin], memory.events[begin:end]
    staying = _held(update)
    for number in staying:
        memory.names[number] = _UPDATES  # sums of micro-batches' gradients
    inputs = 4 * plan.batch * plan.samples
    static = next((n for n in update if n >= 0 and memory.sizes[n] == _whole(inputs)), None)
    if static is not None:  # a runner keeps it from one update to the next
        memory.names[static] = "input buffers"
        setup.append(static)
        update = [event for event in update if event not in (static, ~static)]
    for _ in range(2):
        setup.append(memory.log(WORKSPACE, WORKSPACES))
    replay = _Replay(memory)
    replay.run(setup)
    replay.run(update)
    reserved = replay.allocator.peak_reserved
    if plan.graph and work.graphed:
        replay.allocator.empty_cache()
        own = {event for event in update if event >= 0} - staying.keys()
        again = [event for event in update if max(event, ~event) in own]
        replay.run(again, "graph")
        if plan.accumulation > 2:
            # The third batch is like the second and captured, the last one is launched after that.
            replay.run(again)
        reserved = replay.allocator.peak_reserved
    parts = {name: size for name, size in replay.peak_parts.items() if size}
    return parts | {
        UNSPLIT: replay.peak - sum(parts.values()),
        RESERVED: reserved - replay.peak,
    }


def _whole(size: int) -> int:
    return -(-size // SMALLEST) * SMALLEST
