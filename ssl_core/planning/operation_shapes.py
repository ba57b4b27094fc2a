"""Outputs and temporary memory of operations for which torch has no meta kernel."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ssl_core.wav2vec2.cpu import onednn

LSTM_KEPT, LSTM_GATES = 5.05, 4
"""Memory of oneDNN's LSTM relative to its output: the workspace in use after the forward pass
(measured with AVX-512; 4.2 with AVX2), and the gates of all frames while it runs."""


def _lstm(x: Tensor, weight: Tensor, recurrent: Tensor, *others: Any) -> tuple[Tensor, ...]:
    """Outputs of `mkldnn_rnn_layer`, with the part of its workspace that stays in use.

    While it runs it also holds packed weights and the gates of all frames.
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
    """Outputs of `mkldnn_rnn_layer_backward`; while it runs all of its workspace is in use.

    It also holds packed copies of the weights and their gradients (measured). The workspace has the
    size that torch 2.11 allocates: 15 values a frame and unit, 6 of which are a frame and input
    feature if the input is wider.
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


def _linear(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    """Output of oneDNN's linear layer; meanwhile it holds the weight in a layout of its own."""
    held = [torch.empty_like(weight)]
    if not x.is_contiguous():
        held.append(x.new_empty(x.shape))
    out = x.new_empty(*x.shape[:-1], len(weight))
    held.clear()
    return out


def _ctc_loss(logits: Tensor, targets: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Outputs of `_ctc_loss`: losses, and probabilities `[clip, frame, place in the text]`."""
    clips, places = targets.shape[0], 2 * targets.shape[1] + 1
    return logits.new_empty(clips), logits.new_empty(clips, logits.shape[0], places)


def _ctc_loss_backward(
    grad: Tensor, logits: Tensor, targets: Tensor, lengths: Any, counts: Any, losses: Tensor,
    forward: Tensor, *_: Any,
) -> Tensor:  # fmt: skip
    """Output of `_ctc_loss_backward`; while it runs it holds a tensor as large as `forward`."""
    torch.empty_like(forward)
    return torch.empty_like(logits)


def _weight_norm_backward(
    grad: Tensor, direction: Tensor, gain: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    """Outputs of `_weight_norm_interface_backward`: gradients of `direction` and `gain`."""
    return torch.empty_like(direction), torch.empty_like(gain)


def _layer_norm_backward(
    grad: Tensor, x: Tensor, shape: Any, mean: Tensor, rstd: Tensor, weight: Tensor | None,
    bias: Tensor | None, needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Outputs of `native_layer_norm_backward`, where they are needed."""
    inputs = (x, weight, bias)
    return tuple(
        torch.empty_like(each, memory_format=torch.contiguous_format)
        if each is not None and wanted
        else None
        for each, wanted in zip(inputs, needed, strict=True)
    )


SHAPES: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.mkldnn_rnn_layer.default: _lstm,
    torch.ops.aten.mkldnn_rnn_layer_backward.default: _lstm_backward,
    onednn.LINEAR: _linear,
    torch.ops.aten._ctc_loss.Tensor: _ctc_loss,
    torch.ops.aten._ctc_loss_backward.Tensor: _ctc_loss_backward,
    # torch 2.9 lacks this kernel, and gives gradients of weights the type of activations here
    torch.ops.aten._weight_norm_interface_backward.default: _weight_norm_backward,
    torch.ops.aten.native_layer_norm_backward.default: _layer_norm_backward,
}
"""Outputs of operations for which torch has no meta kernel, or a wrong one."""
