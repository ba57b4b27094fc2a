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
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ssl_core.downstream.task_work import (
    TaskWork,
    Work,
    compute_features,
    make_batch,
    make_model,
    make_step,
    rates,
)
from ssl_core.planning.step_plan import Plan
from ssl_core.training.pretraining_step import TrainingStep
from ssl_core.wav2vec2.config import ModelConfig
from ssl_core.wav2vec2.model import PretrainingModel
from ssl_core.wav2vec2.operators import BODIES

PAGE = 4096
_CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)
"""On a CPU these have input, weights and output, or their gradients, in oneDNN's layout as well."""
LSTM_KEPT, LSTM_GATES = 5.05, 4
"""Of oneDNN's LSTM, in units of its output: what of its workspace is in use after the forward pass,
as measured (4.2 with AVX2), and the gates of all frames while it runs; with AVX-512."""


class Scalars(TorchDispatchMode):
    """Reads 1 wherever a number is asked of a tensor that has none.

    Whole numbers, which say how long things are, stay real as far as they follow from real ones.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation; a number of a fake tensor is 1."""
        kwargs = kwargs or {}
        if _is_about_whole_numbers(func, args, kwargs):
            with no_dispatch():
                return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].dtype.is_floating_point else 1
        if func in _SHAPES:
            with self:
                return _SHAPES[func](*args)
        return func(*args, **kwargs)


def _is_about_whole_numbers(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether real integers are all that an operation takes, or integers all that it makes."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if not tensors:
        return (
            func.overloadpacket is torch.ops.aten.arange or kwargs.get("dtype") is torch.int64
        ) and torch.device(kwargs.get("device") or "cpu").type == "cpu"
    return not any(isinstance(x, FakeTensor) or x.dtype.is_floating_point for x in tensors)


def _lstm(x: Tensor, weight: Tensor, recurrent: Tensor, *others: Any) -> tuple[Tensor, ...]:
    """What `mkldnn_rnn_layer` returns; of its workspace what is in use when it does.

    While it runs, it has a copy of the weights in a layout of its own, and the gates of all frames.
    """
    steps, clips, units = x.shape[0], x.shape[1], recurrent.shape[1]
    training = others[-1]
    used = x.new_empty(int(LSTM_KEPT * steps * clips * units) if training else 0)
    out = x.new_empty(steps, clips, units)
    packed = (torch.empty_like(weight), torch.empty_like(recurrent))
    gates = x.new_empty(LSTM_GATES * steps * clips * units)
    del packed, gates
    return out, x.new_empty(clips, units), x.new_empty(clips, units), used


def _lstm_backward(x: Tensor, *weights: Any) -> tuple[Tensor, ...]:
    """What `mkldnn_rnn_layer_backward` returns; before that all of its workspace is in use.

    Weights and their gradients are there in a layout of its own as well, as measured. The size of
    the workspace is what torch 2.11 was seen to ask for: 15 numbers a frame for each unit, of which
    6 are as many as the input's where that is wider.
    """
    steps, clips, width = x.shape
    own, recurrent = weights[:2]
    units = recurrent.shape[1]
    rows = (steps + 1) * clips
    whole = rows * (6 * (max(width, units) + 16) + 9 * units + 32)
    workspace = x.new_empty(max(0, whole - int(LSTM_KEPT * steps * clips * units)))
    packed = [torch.empty_like(weight) for weight in (own, recurrent) for _ in range(2)]
    bias = own.new_empty(len(own))
    state = x.new_empty(clips, units)
    made = (torch.empty_like(x), torch.empty_like(own), torch.empty_like(recurrent))
    del workspace, packed
    return *made, bias, torch.empty_like(bias), state, torch.empty_like(state)


def _ctc_loss(logits: Tensor, targets: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """What `_ctc_loss` returns: losses, and probabilities by frame and place in the text."""
    clips, places = targets.shape[0], 2 * targets.shape[1] + 1
    return logits.new_empty(clips), logits.new_empty(clips, logits.shape[0], places)


def _ctc_loss_backward(
    grad: Tensor, logits: Tensor, targets: Tensor, lengths: Any, counts: Any, losses: Tensor,
    forward: Tensor, *_: Any,
) -> Tensor:  # fmt: skip
    """What `_ctc_loss_backward` returns; what it takes beside that is as large as `forward`."""
    torch.empty_like(forward)
    return torch.empty_like(logits)


_SHAPES: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.mkldnn_rnn_layer.default: _lstm,
    torch.ops.aten.mkldnn_rnn_layer_backward.default: _lstm_backward,
    torch.ops.aten._ctc_loss.Tensor: _ctc_loss,
    torch.ops.aten._ctc_loss_backward.Tensor: _ctc_loss_backward,
}
"""Operations that torch cannot run on tensors without contents, and what they make."""


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


def trace(config: ModelConfig, work: Work, plan: Plan) -> LiveMemory:
    """Take one update on fake tensors; what was live at its peak, by part.

    All layers run: layerdrop would only make it less. Shapes are those of any device. Of a task
    whose features are cached, the clips that are taken through the frozen part come first.
    """
    config = dataclasses.replace(config, layerdrop=0.0)
    plan = dataclasses.replace(plan, device="cpu")
    memory = LiveMemory()
    with FakeTensorMode(allow_non_fake_inputs=True), memory:
        memory.label("parameters")
        if isinstance(work, TaskWork):
            _trace_task(config, work, plan, memory)
            return memory
        model = PretrainingModel(config)
        memory.label("optimizer state")
        step = TrainingStep(model, work, plan, seed=0, total_updates=1)
        memory.label("activations")
        _name_gradients(model, memory)
        batch = np.zeros((plan.batch, plan.samples), dtype=np.float32)
        step.update([batch] * plan.accumulation, 0)
    return memory


def _trace_task(config: ModelConfig, work: TaskWork, plan: Plan, memory: LiveMemory) -> None:
    model = make_model(config, work)
    memory.label("optimizer state")
    step = make_step(model, work, plan)
    if work.cached:
        memory.label("computing features")
        compute_features(step, torch.zeros)
    memory.label("activations")
    _name_gradients(model, memory)
    batch = make_batch(step, work, torch.zeros)
    # The second micro-batch, beside the gradients of the first, is like all that follow.
    step.update(batch.rows(range(min(plan.batch, 2 * plan.chunk))), 0, rates(work))


def trace_head(config: ModelConfig, work: TaskWork, plan: Plan) -> dict[str, int]:
    """Bytes of a head alone, trained on frames: parameters, optimiser state and the rest."""
    memory, work = LiveMemory(), dataclasses.replace(work, share="none", cached=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = make_model(config, work)
        with memory:
            memory.label("parameters")
            for parameter in model.head.parameters():
                memory.follow(parameter)
            memory.label("optimizer state")
            step = make_step(model, work, plan)
            memory.label("activations")
            step.update(make_batch(step, work, torch.zeros), 0, rates(work))
    parts = memory.peak_parts
    fixed = {name: parts.get(name, 0) for name in ("parameters", "optimizer state")}
    return fixed | {"activations": memory.peak - sum(fixed.values())}


def _name_gradients(model: nn.Module, memory: LiveMemory) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(
                lambda own: memory.rename(own.grad, "gradients")
            )


@functools.lru_cache(maxsize=16)
def count_parameters(config: ModelConfig) -> int:
    """Parameters of the pretraining model."""
    with FakeTensorMode():
        return sum(parameter.numel() for parameter in PretrainingModel(config).parameters())


@functools.lru_cache(maxsize=64)
def count_trained(config: ModelConfig, work: TaskWork) -> int:
    """Parameters that fine-tuning a task trains."""
    with FakeTensorMode():
        step = make_step(make_model(config, work), work, Plan())
        return sum(p.numel() for p in step.model.parameters() if p.requires_grad)
