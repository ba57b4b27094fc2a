"""Traces the memory of a training step by running it on tensors without data.

The real step runs once on shapes alone, while the memory of each tensor is tracked from allocation
to release. The estimate therefore includes all that
the plan keeps, recomputes, casts or applies early, without a second description of the step.
"""

import collections
import dataclasses
from typing import Any

import torch
from torch import Tensor

from ssl_core.planning.parts import COPIES
from ssl_core.planning.shape_tensors import Block, Shapes, arguments_key, uncompiled
from ssl_core.planning.step_plan import Plan
from ssl_core.planning.work import Work
from ssl_core.wav2vec2.operators import BODIES

PAGE = 4096
"""Bytes to whose multiples a CPU's memory is rounded."""
_CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)
"""On a CPU these hold copies of input, weights and output (or gradients) in oneDNN's layout."""


_MASKS = tuple(
    f"shortwave::{name}" for name in ("keep_mask", "attention_mask", "packed_mask", "unpacked_mask")
)
"""Their bodies read values, and need little memory beside the result."""


class TrackedBlock(Block):
    """Memory that counts in `LiveMemory` until the last tensor that uses it is gone."""

    __slots__ = ("memory", "part")

    def __init__(self, memory: "LiveMemory", size: int, part: str) -> None:
        """Add `size` bytes, in whole pages, to the part."""
        super().__init__(-(-size // memory.page) * memory.page)
        self.memory, self.part = memory, part
        memory.add(self.size, part)

    def __del__(self) -> None:
        """Release the memory."""
        self.memory.subtract(self.size, self.part)


class LiveMemory(Shapes):
    """Tracks all memory allocated inside it, also inside the project's own operations."""

    page = PAGE

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.peak_parts: dict[str, int] = {}
        self._parts: collections.Counter[str] = collections.Counter()
        self._label = "activations"
        self._body_bytes: dict[tuple[Any, ...], int] = {}

    def label(self, name: str) -> None:
        """Name the part that tensors created from here on belong to."""
        self._label = name

    def mark(self) -> None:
        """Called right before and after the update."""

    def rename(self, tensor: Tensor, part: str) -> None:
        """Count a tensor made inside, of any shape `[...]`, as another part."""
        block: TrackedBlock = tensor.block  # type: ignore[attr-defined]
        self._parts[block.part] -= block.size
        self._parts[part] += block.size
        block.part = part

    def take(self, size: int) -> TrackedBlock:
        """Return memory of `size` bytes for a new tensor, and track it."""
        return TrackedBlock(self, size, self._part)

    def add(self, size: int, part: str) -> None:
        """Count `size` bytes more in a part."""
        self._parts[part] += size
        self.live += size
        if self.live > self.peak:
            self.peak, self.peak_parts = self.live, dict(self._parts)

    def subtract(self, size: int, part: str) -> None:
        """Count `size` bytes less in a part."""
        self._parts[part] -= size
        self.live -= size

    @property
    def _part(self) -> str:
        in_backward = torch._C._current_graph_task_id() != -1
        return "made in the backward pass" if in_backward else self._label

    def _run_body(self, func: Any, body: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Run one of the project's operations, and trace its body once for each set of shapes.

        The temporary memory of an operation depends on shapes alone: not on the site of a dropout.
        """
        names = (argument.name for argument in func._schema.arguments)
        shaping = [value for name, value in zip(names, args, strict=False) if name != "site"]
        key = (func, *arguments_key(shaping, []))
        entry = self.live
        if key not in self._body_bytes:
            peak, parts = self.peak, self.peak_parts
            self.peak = entry
            with self:
                result = body(*args, **kwargs)
            self._body_bytes[key] = self.peak - entry
            if peak >= self.peak:
                self.peak, self.peak_parts = peak, parts
            return result
        taken = self._body_bytes[key]
        if entry + taken > self.peak:
            self.peak, self.peak_parts = entry + taken, dict(self._parts)
            self.peak_parts[self._part] = self.peak_parts.get(self._part, 0) + taken
        return super().__torch_dispatch__(func, (), args, kwargs)

    @uncompiled
    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation on shapes, with the memory that it holds while it runs."""
        body = BODIES.get(func._name)
        if body is not None and func._name not in _MASKS:
            return self._run_body(func, body, args, kwargs or {})
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func in _CONVOLUTIONS:
            involved = [x for x in (*args[:3], result) if isinstance(x, Tensor) and x.dim() > 1]
            with self:
                copies = [torch.empty_like(tensor) for tensor in involved]
            del copies
        return result


def trace(work: Work, plan: Plan) -> LiveMemory:
    """Run one update on tensors without data and track live memory by part, as on a CPU.

    All layers run: layerdrop would only need less. For a task with cached features, the pass
    through the frozen part comes first. `cuda_trace` does the same for a GPU's kernels.
    """
    memory = LiveMemory()
    take_update(memory, without_layerdrop(work), plan)
    return memory


def take_update(memory: LiveMemory, work: Work, plan: Plan) -> None:
    """Start training inside `memory`, and take one update.

    Args:
        memory: tracks it.
        work: what is trained.
        plan: how a step is taken; its device is ignored.
    """
    with memory:
        memory.label("parameters")
        started = work.start(on_cpu(plan), label=memory.label, fake=True)
        for copy in started.copies:
            memory.rename(copy, COPIES)
        for leaf in (*started.model.parameters(), *started.copies):
            if leaf.requires_grad:
                leaf.register_post_accumulate_grad_hook(
                    lambda own: memory.rename(own.grad, "gradients")
                )
        memory.mark()
        started.update(0)
        memory.mark()


def on_cpu(plan: Plan) -> Plan:
    """The plan for tensors without data, which say that they are on a CPU.

    What a GPU does with tf32, a rounding inside products, is left out: it takes no memory.
    """
    precision = "fp32" if plan.precision == "tf32" else plan.precision
    return dataclasses.replace(plan, device="cpu", precision=precision)


def without_layerdrop(work: Work) -> Work:
    """The same work without layerdrop."""
    architecture = dataclasses.replace(work.architecture, layerdrop=0.0)
    changed: Work = dataclasses.replace(work, architecture=architecture)  # type: ignore[type-var]
    return changed
