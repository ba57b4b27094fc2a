"""The positional convolution on a GPU: grouped, of many taps, as products on tensor cores.

With the channels of a group next to each other, the window of an output frame is one run of
`taps * channels` numbers in memory, and the next frame's starts `channels` further on. Tiles of
windows are thus read from one padded copy of the input, without a copy of each window. The input's
gradient is the same convolution of the output's gradient with time reversed in both.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssl_core.wav2vec2.cuda.launching import blocks, launch

_ROWS = 32
"""Frames, or taps, that a program copies."""
_NUMBERS = ["frames", "rows", "before", "taps", "crops"]
"""Arguments of which Triton would compile a kernel for 1 and one for multiples of 16."""


@triton.jit(do_not_specialize=_NUMBERS)
def pad_groups(
    X, OUT, frames, rows, groups, before, CHANNELS: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, REVERSED: tl.constexpr,
):  # fmt: skip
    """`[batch, frame, group * channel]` to `[batch, group, row, channel]`, zeros around."""
    group, crop = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, PADDED)[None, :]
    frame = row - before
    valid = (frame >= 0) & (frame < frames)
    if REVERSED:
        frame = frames - 1 - frame
    at = crop * frames * groups * CHANNELS + group * CHANNELS
    at += frame[:, None] * (groups * CHANNELS) + channel
    x = tl.load(X + at, mask=valid[:, None] & (channel < CHANNELS), other=0.0)
    at = (crop * groups + group) * rows * CHANNELS + row[:, None] * CHANNELS + channel
    tl.store(
        OUT + at, x.to(OUT.dtype.element_ty), mask=(row < rows)[:, None] & (channel < CHANNELS)
    )


@triton.jit(do_not_specialize=_NUMBERS)
def relay_taps(
    X, OUT, taps, x_group, x_middle, x_channel, x_tap, out_group, out_middle, out_channel, out_tap,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """Copy `[group, channel, channel, tap]` to another order and dtype."""
    middle, group = tl.program_id(1), tl.program_id(2)
    tap = tl.program_id(0) * TAPS + tl.arange(0, TAPS)[None, :]
    channel = tl.arange(0, PADDED)[:, None]
    valid = (channel < CHANNELS) & (tap < taps)
    at = group * x_group + middle * x_middle + channel * x_channel + tap * x_tap
    x = tl.load(X + at, mask=valid, other=0.0)
    at = group * out_group + middle * out_middle + channel * out_channel + tap * out_tap
    tl.store(OUT + at, x.to(OUT.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=_NUMBERS)
def convolve_groups(
    X, WEIGHT, OUT, frames, rows, groups, depth, CHANNELS: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, REVERSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Windows times weights of a group: `ROWS` frames of a crop; `depth` is taps times channels."""
    group, crop = tl.program_id(1), tl.program_id(2).to(tl.int64)
    frame = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inner = tl.arange(0, DEPTH)
    channel = tl.arange(0, PADDED)
    valid = (frame < frames)[:, None]
    exist = (channel < CHANNELS)[None, :]
    windows = X + (crop * groups + group) * rows * CHANNELS
    windows += frame[:, None] * CHANNELS + inner[None, :]
    weights = WEIGHT + group * depth * CHANNELS + inner[:, None] * CHANNELS + channel[None, :]
    out = tl.zeros([ROWS, PADDED], tl.float32)
    for done in range(0, depth, DEPTH):
        left = inner < depth - done
        window = tl.load(windows + done, mask=valid & left[None, :], other=0.0)
        weight = tl.load(weights + done * CHANNELS, mask=exist & left[:, None], other=0.0)
        out = tl.dot(window, weight, out, input_precision=PRECISION)
    if REVERSED:
        frame = frames - 1 - frame
    at = crop * frames * groups * CHANNELS + group * CHANNELS
    at += frame[:, None] * (groups * CHANNELS) + channel[None, :]
    tl.store(OUT + at, out.to(OUT.dtype.element_ty), mask=valid & exist)


@triton.jit(do_not_specialize=_NUMBERS)
def grouped_weight_gradient(
    X, GRAD, OUT, crops, frames, rows, groups, depth, CHANNELS: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Windows, transposed, times gradients: `DEPTH` rows of a group's weights, over all frames."""
    group = tl.program_id(1)
    inner = tl.program_id(0) * DEPTH + tl.arange(0, DEPTH)
    channel = tl.arange(0, PADDED)
    exist = (channel < CHANNELS)[None, :]
    tiles = tl.cdiv(frames, ROWS)
    out = tl.zeros([DEPTH, PADDED], tl.float32)
    for number in range(0, crops * tiles):
        crop = (number // tiles).to(tl.int64)
        frame = (number % tiles) * ROWS + tl.arange(0, ROWS)
        valid = frame < frames
        at = (crop * groups + group) * rows * CHANNELS
        at += frame[None, :] * CHANNELS + inner[:, None]
        mask = valid[None, :] & (inner < depth)[:, None]
        window = tl.load(X + at, mask=mask, other=0.0)
        at = crop * frames * groups * CHANNELS + group * CHANNELS
        at += frame[:, None] * (groups * CHANNELS) + channel[None, :]
        grad = tl.load(GRAD + at, mask=valid[:, None] & exist, other=0.0)
        out = tl.dot(window, grad, out, input_precision=PRECISION)
    at = group * depth * CHANNELS + inner[:, None] * CHANNELS + channel[None, :]
    tl.store(OUT + at, out, mask=(inner < depth)[:, None] & exist)


def _padded(channels: int) -> int:
    """Columns of a tile with all channels of a group; tensor cores take at least 16."""
    return max(16, 1 << (channels - 1).bit_length())


def _sizes(x: Tensor, channels: int) -> dict[str, Any]:
    """What all products are compiled for; fp32 has smaller tiles."""
    wide = x.dtype == torch.float32
    return {
        "CHANNELS": channels,
        "PADDED": _padded(channels),
        "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        "num_warps": 4,
        "ROWS": 32 if wide else 128,
        "DEPTH": 32 if wide else 64,
        "num_stages": 2 if wide else 4,
    }


def _pad(x: Tensor, groups: int, before: int, taps: int, reverse: bool) -> Tensor:
    """`[batch, frame, channel]` to `[batch, group, frame + taps - 1, channel of the group]`."""
    crops, frames, width = x.shape
    channels, rows = width // groups, frames + taps - 1
    out = x.new_empty(crops, groups, rows, channels)
    launch(
        pad_groups,
        (blocks(rows, _ROWS), groups, crops),
        *(x, out, frames, rows, groups, before),
        CHANNELS=channels, PADDED=_padded(channels), ROWS=_ROWS, REVERSED=reverse, num_warps=4,
    )  # fmt: skip
    return out


def _relay(x: Tensor, out: Tensor) -> Tensor:
    """Copy `x`, `[group, channel, channel, tap]`, to the view `out` of the same shape."""
    groups, middle, channels, taps = x.shape
    launch(
        relay_taps,
        (blocks(taps, _ROWS), middle, groups),
        *(x, out, taps, *x.stride(), *out.stride()),
        CHANNELS=channels, PADDED=_padded(channels), TAPS=_ROWS, num_warps=4,
    )  # fmt: skip
    return out


def _convolve(padded: Tensor, weight: Tensor, frames: int, reverse: bool) -> Tensor:
    """Products of all windows with `weight`, `[group, tap, channel, out_channel]`."""
    crops, groups, rows, channels = padded.shape
    out = padded.new_empty(crops, frames, groups * channels)
    sizes = _sizes(padded, channels)
    launch(
        convolve_groups,
        (blocks(frames, sizes["ROWS"]), groups, crops),
        *(padded, weight, out, frames, rows, groups, weight.shape[1] * channels),
        REVERSED=reverse,
        **sizes,
    )
    return out


def _weight_gradient(padded: Tensor, grad: Tensor, taps: int) -> Tensor:
    """`[group, tap, channel, out_channel]` fp32."""
    crops, groups, rows, channels = padded.shape
    out = padded.new_empty(groups, taps, channels, channels, dtype=torch.float32)
    sizes = _sizes(padded, channels)
    if padded.dtype != torch.float32:
        sizes.update(ROWS=64, DEPTH=128, num_stages=3)
    launch(
        grouped_weight_gradient,
        (blocks(taps * channels, sizes["DEPTH"]), groups),
        *(padded, grad, out, crops, grad.shape[1], rows, groups, taps * channels),
        **sizes,
    )
    return out


def _by_group(weight: Tensor, groups: int) -> Tensor:
    """`[out_channel, channel, tap]` as `[group, out_channel, channel, tap]`."""
    return weight.unflatten(0, (groups, -1))


class _GroupedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        x = x.contiguous()
        frames, taps = x.shape[1], weight.shape[2]
        # Other taps connect no two of the frames.
        first, last = max(0, taps // 2 - frames + 1), min(taps, taps // 2 + frames)
        reach = _by_group(weight[:, :, first:last], groups)
        channels, used = weight.shape[1], last - first
        relaid = x.new_empty(groups, used, channels, channels)
        _relay(reach.transpose(1, 2), relaid.permute(0, 2, 3, 1))
        padded = _pad(x, groups, taps // 2 - first, used, reverse=False)
        ctx.first = first
        ctx.save_for_backward(padded, weight)
        return _convolve(padded, relaid, frames, reverse=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        padded, weight = ctx.saved_tensors
        grad = grad.contiguous()
        groups, channels, frames = padded.shape[1], padded.shape[3], grad.shape[1]
        first, used = ctx.first, padded.shape[2] - frames + 1
        whole = used == weight.shape[2]
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            relaid = grad.new_empty(groups, used, channels, channels)
            reach = _by_group(weight[:, :, first : first + used], groups)
            _relay(reach, relaid.permute(0, 2, 3, 1))
            flipped = _pad(grad, groups, weight.shape[2] // 2 - first, used, reverse=True)
            grad_x = _convolve(flipped, relaid, frames, reverse=True)
        if ctx.needs_input_grad[1]:
            taps = _weight_gradient(padded, grad, used).permute(0, 2, 3, 1)
            grad_weight = (
                weight.new_empty(weight.shape) if whole else weight.new_zeros(weight.shape)
            )
            reach = _by_group(grad_weight[:, :, first : first + used], groups)
            _relay(taps, reach.transpose(1, 2))
        return grad_x, grad_weight, None


def grouped_convolution(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Convolve each group of channels over time, padded so that as many frames come out.

    Args:
        x: `[batch, frame, channel]` fp32, bf16 or fp16.
        weight: `[channel, channel of the group, tap]`, as in `nn.Conv1d`, of any of these dtypes;
            its gradient has the same.
        groups: number of groups, a divisor of the channels.

    Returns:
        `[batch, frame, channel]` in the dtype of `x`: with `tap // 2` zeros before the first frame.
    """
    return _GroupedConvolution.apply(x, weight, groups)
