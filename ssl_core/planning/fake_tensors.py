"""Runs a training step on tensors without contents: what torch's FakeTensorMode lacks for it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


def count_parameters(build: Callable[[], nn.Module], trained_only: bool = False) -> int:
    """Parameters of a model, built without contents; with `trained_only` those with a gradient."""
    with FakeTensorMode():
        parameters = build().parameters()
        return sum(p.numel() for p in parameters if p.requires_grad or not trained_only)
