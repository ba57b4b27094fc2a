"""Batches of clips without padding: stacked if all lengths are equal, else packed.

A stacked batch is `[clip, frame, feature]`. A packed batch is `[1, frame, feature]`, all clips
concatenated over time, with the `lengths` of the clips beside it. Code that treats frames one by
one need not distinguish the two; code that mixes frames separates the clips by `lengths`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def packed_lengths(lengths: Sequence[int]) -> tuple[int, ...]:
    """The lengths of clips that must be packed; empty if all lengths are equal."""
    return tuple(lengths) if len(set(lengths)) > 1 else ()


def join(clips: Sequence[Tensor]) -> Tensor:
    """Batch clips of `[frame, feature]` as `[clip, frame, feature]`, or packed if need be."""
    if packed_lengths([len(clip) for clip in clips]):
        return torch.cat(list(clips))[None]
    return torch.stack(list(clips))


def split(x: Tensor, lengths: Sequence[int]) -> tuple[Tensor, ...]:
    """The clips of a batch, `[frame, feature]` each; `lengths` has the frames of every clip."""
    return x[0].split(list(lengths)) if packed_lengths(lengths) else x.unbind()


def pad(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """A batch as `[clip, frame, feature]`, each clip padded with zeros at its end."""
    if not packed_lengths(lengths):
        return x
    return torch.nn.utils.rnn.pad_sequence(list(split(x, lengths)), batch_first=True)


def places(lengths: Sequence[int]) -> list[slice]:
    """The slice of frames of each packed clip."""
    ends = [sum(lengths[: number + 1]) for number in range(len(lengths))]
    return [slice(end - own, end) for end, own in zip(ends, lengths, strict=True)]


def frame_mask(lengths: Sequence[int], x: Tensor) -> Tensor:
    """For `x`, `[batch, frame, ...]`, padded: `[batch, frame, 1]`, 1 in frames and 0 in padding."""
    ends = torch.tensor(lengths, device=x.device)
    places = torch.arange(x.shape[1], device=x.device)
    return (places < ends[:, None])[:, :, None].to(x.dtype)
