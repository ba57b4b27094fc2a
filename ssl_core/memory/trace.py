"""Memory of a training step, from the step itself run on tensors without contents.

The real step is taken once under torch's FakeTensorMode, which knows shapes and allocates nothing,
while every storage is followed from its making to its end. What the plan keeps, recomputes, casts
or applies early is therefore in the estimate because it is in the step: there is no second
description of it.
"""

import collections
import dataclasses
import functools
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ssl_core.memory.plan import Plan
from ssl_core.step import TrainingStep
from ssl_core.wav2vec2.config import ModelConfig, Recipe
from ssl_core.wav2vec2.model import PretrainingModel

PAGE = 4096


class _Scalars(TorchDispatchMode):
    """Reads 1 wherever a number is asked of a tensor that has none."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation; a number of a fake tensor is 1."""
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].dtype.is_floating_point else 1
        return func(*args, **(kwargs or {}))


class LiveMemory(_Scalars):
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
                result = body._init_fn(*args, **kwargs)
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
        body = OPDEFS.get(func._name) if func.namespace == "shortwave" else None
        if body is not None and func._name != "shortwave::keep_mask":
            result = self._run_inside(func, body, args, kwargs or {})
        else:
            result = super().__torch_dispatch__(func, types, args, kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.follow(leaf)
        return result


def _likeness(argument: Any) -> Any:
    """Of a tensor, what its memory follows from; anything else itself."""
    if isinstance(argument, Tensor):
        return tuple(argument.shape), argument.stride(), argument.dtype
    return tuple(argument) if isinstance(argument, list) else argument


def trace(config: ModelConfig, recipe: Recipe, plan: Plan) -> LiveMemory:
    """Take one update on fake tensors; what was live at its peak, by part.

    All layers run: layerdrop would only make it less. Shapes are those of any device.
    """
    config = dataclasses.replace(config, layerdrop=0.0)
    plan = dataclasses.replace(plan, device="cpu")
    memory = LiveMemory()
    with FakeTensorMode(allow_non_fake_inputs=True), memory:
        memory.label("parameters")
        model = PretrainingModel(config)
        memory.label("optimizer state")
        step = TrainingStep(model, recipe, plan, seed=0, total_updates=1)
        memory.label("activations")
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda own: memory.rename(own.grad, "gradients")
            )
        batch = np.zeros((plan.batch, plan.samples), dtype=np.float32)
        step.update([batch] * plan.accumulation, 0)
    return memory


def count_operations(config: ModelConfig, recipe: Recipe, plan: Plan) -> int:
    """Floating point operations of matrix products and convolutions in one update.

    Counted by torch's flop counter on fake tensors; what a plan recomputes is in it.
    """
    config = dataclasses.replace(config, layerdrop=0.0)
    plan = dataclasses.replace(plan, device="cpu")
    counter = FlopCounterMode(display=False)
    with FakeTensorMode(allow_non_fake_inputs=True), _Scalars():
        step = TrainingStep(PretrainingModel(config), recipe, plan, seed=0, total_updates=1)
        batch = np.zeros((plan.batch, plan.samples), dtype=np.float32)
        with counter:
            step.update([batch] * plan.accumulation, 0)
    return int(counter.get_total_flops())


@functools.lru_cache(maxsize=16)
def count_parameters(config: ModelConfig) -> int:
    """Parameters of the pretraining model."""
    with FakeTensorMode():
        return sum(parameter.numel() for parameter in PretrainingModel(config).parameters())
