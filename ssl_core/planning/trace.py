"""Traces the memory of a training step by running it on fake tensors.

The real step runs once under torch's FakeTensorMode, which knows shapes and allocates nothing,
while every storage is tracked from allocation to release. The estimate therefore includes all that
the plan keeps, recomputes, casts or applies early, without a second description of the step.
"""

import collections
import dataclasses
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves

from ssl_core.planning.fake_tensors import Scalars
from ssl_core.planning.step_plan import Plan
from ssl_core.planning.work import Work
from ssl_core.wav2vec2.operators import BODIES

PAGE = 4096
_CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)
"""On a CPU these hold copies of input, weights and output (or gradients) in oneDNN's layout."""


class LiveMemory(Scalars):
    """Tracks all storages allocated inside it, also inside the project's own operations."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.peak_parts: dict[str, int] = {}
        self._sizes: dict[int, tuple[int, str]] = {}
        self._parts: collections.Counter[str] = collections.Counter()
        self._label = "activations"
        self._body_bytes: dict[tuple[Any, ...], int] = {}

    def label(self, name: str) -> None:
        """Name the part that tensors created from here on belong to."""
        self._label = name

    def rename(self, tensor: Tensor, part: str) -> None:
        """Count a tracked tensor, of any shape `[...]`, as another part."""
        key = tensor.untyped_storage()._cdata
        size, before = self._sizes[key]
        self._sizes[key] = (size, part)
        self._parts[before] -= size
        self._parts[part] += size

    def follow(self, tensor: Tensor) -> None:
        """Track the storage of a tensor, of any shape `[...]`; each storage counts once."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        size = -(-storage.nbytes() // PAGE) * PAGE
        part = self._part
        self._sizes[key] = (size, part)
        self._parts[part] += size
        self.live += size
        weakref.finalize(storage, self._forget, key)
        if self.live > self.peak:
            self.peak, self.peak_parts = self.live, dict(self._parts)

    @property
    def _part(self) -> str:
        in_backward = torch._C._current_graph_task_id() != -1
        return "made in the backward pass" if in_backward else self._label

    def _run_body(self, func: Any, body: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Run one of the project's operations, and trace its body once for each set of shapes.

        The temporary memory of an operation depends on shapes alone.
        """
        key = (func._name, *(_signature(argument) for argument in args))
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

    def _forget(self, key: int) -> None:
        size, part = self._sizes.pop(key)
        self._parts[part] -= size
        self.live -= size

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation and track the tensors it returns."""
        if func is torch.ops.prim.device.default:  # more than half of all calls
            return args[0].device
        body = BODIES.get(func._name)
        if body is not None and func._name != "shortwave::keep_mask":
            result = self._run_body(func, body, args, kwargs or {})
        else:
            result = super().__torch_dispatch__(func, types, args, kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.follow(leaf)
        if func in _CONVOLUTIONS:
            involved = [x for x in (*args[:3], result) if isinstance(x, Tensor) and x.dim() > 1]
            with self:
                copies = [torch.empty_like(tensor) for tensor in involved]
            del copies
        return result


def _signature(argument: Any) -> Any:
    """A cache key: shape, strides and type of a tensor; any other argument itself."""
    if isinstance(argument, Tensor):
        return tuple(argument.shape), argument.stride(), argument.dtype
    return tuple(argument) if isinstance(argument, list) else argument


def trace(work: Work, plan: Plan) -> LiveMemory:
    """Run one update on fake tensors and track live memory by part.

    All layers run: layerdrop would only need less. Shapes do not depend on the device. For a task
    with cached features, the pass through the frozen part comes first.
    """
    work = without_layerdrop(work)
    plan = dataclasses.replace(plan, device="cpu")
    memory = LiveMemory()
    with FakeTensorMode(allow_non_fake_inputs=True), memory:
        memory.label("parameters")
        started = work.start(plan, label=memory.label, fake=True)
        _name_gradients(started.model, memory)
        started.update(0)
    return memory


def without_layerdrop(work: Work) -> Work:
    """The same work without layerdrop."""
    architecture = dataclasses.replace(work.architecture, layerdrop=0.0)
    changed: Work = dataclasses.replace(work, architecture=architecture)  # type: ignore[type-var]
    return changed


def _name_gradients(model: nn.Module, memory: LiveMemory) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(
                lambda own: memory.rename(own.grad, "gradients")
            )
