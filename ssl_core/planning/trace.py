"""Memory of a training step, from the step itself run on tensors without contents.

The real step is taken once under torch's FakeTensorMode, which knows shapes and allocates nothing,
while every storage is followed from allocation to release. What the plan keeps, recomputes, casts
or applies early is therefore in the estimate because it is in the step: there is no second
description of it.
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
"""On a CPU these have input, weights and output, or their gradients, in oneDNN's layout as well."""


class LiveMemory(Scalars):
    """Follows all storages made inside it, those inside the project's own operations too."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.peak_parts: dict[str, int] = {}
        self._sizes: dict[int, tuple[int, str]] = {}
        self._parts: collections.Counter[str] = collections.Counter()
        self._label = "activations"
        self._inside: dict[tuple[Any, ...], int] = {}

    def label(self, name: str) -> None:
        """Name what is made from here on."""
        self._label = name

    def rename(self, tensor: Tensor, part: str) -> None:
        """Count a tensor that is followed already as another part."""
        key = tensor.untyped_storage()._cdata
        size, before = self._sizes[key]
        self._sizes[key] = (size, part)
        self._parts[before] -= size
        self._parts[part] += size

    def follow(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once."""
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

    def _run_inside(self, func: Any, body: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Run one of the project's operations; its inside the first time for arguments like these.

        What an operation takes beside its result depends on shapes alone.
        """
        key = (func._name, *(_likeness(argument) for argument in args))
        entry = self.live
        if key not in self._inside:
            peak, parts = self.peak, self.peak_parts
            self.peak = entry
            with self:
                result = body(*args, **kwargs)
            self._inside[key] = self.peak - entry
            if peak >= self.peak:
                self.peak, self.peak_parts = peak, parts
            return result
        taken = self._inside[key]
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
        """Run an operation, and follow what it returns."""
        body = BODIES.get(func._name)
        if body is not None and func._name != "shortwave::keep_mask":
            result = self._run_inside(func, body, args, kwargs or {})
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


def _likeness(argument: Any) -> Any:
    """Of a tensor, what its memory follows from; anything else itself."""
    if isinstance(argument, Tensor):
        return tuple(argument.shape), argument.stride(), argument.dtype
    return tuple(argument) if isinstance(argument, list) else argument


def trace(work: Work, plan: Plan) -> LiveMemory:
    """Take one update on fake tensors and follow what is live, by part.

    All layers run: layerdrop would only make it less. Shapes do not depend on the device. Of a task
    whose features are cached, the pass through the frozen part comes first.

    Args:
        work: what is trained.
        plan: how the step is taken.
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
    """The same work with every layer in every update."""
    architecture = dataclasses.replace(work.architecture, layerdrop=0.0)
    changed: Work = dataclasses.replace(work, architecture=architecture)  # type: ignore[type-var]
    return changed


def _name_gradients(model: nn.Module, memory: LiveMemory) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(
                lambda own: memory.rename(own.grad, "gradients")
            )
