"""Batches of clips without padding: of one length side by side, of several one behind the other.

`[clip, frame, feature]` is a batch whose clips have as many frames each. Others are packed:
`[1, frame, feature]`, the clips' frames in turn, with their `lengths` beside it. Whatever works on
single frames need not know; what looks from frame to frame takes the clips by `lengths`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def packed_lengths(lengths: Sequence[int]) -> tuple[int, ...]:
    """Frames of each clip if they have to be packed; none if all are as long."""
    return tuple(lengths) if len(set(lengths)) > 1 else ()


def join(clips: Sequence[Tensor]) -> Tensor:
    """Clips of `[frame, feature]` to a batch, packed if need be."""
    if packed_lengths([len(clip) for clip in clips]):
        return torch.cat(list(clips))[None]
    return torch.stack(list(clips))


def split(x: Tensor, lengths: Sequence[int]) -> tuple[Tensor, ...]:
    """The clips of a batch, `[frame, feature]` each; `lengths` of all of them."""
    return x[0].split(list(lengths)) if packed_lengths(lengths) else x.unbind()


def pad(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """A batch as `[clip, frame, feature]`, zeros behind the frames of each clip."""
    if not packed_lengths(lengths):
        return x
    return torch.nn.utils.rnn.pad_sequence(list(split(x, lengths)), batch_first=True)


def places(lengths: Sequence[int]) -> list[slice]:
    """Where the frames of each packed clip stand."""
    ends = [sum(lengths[: number + 1]) for number in range(len(lengths))]
    return [slice(end - own, end) for end, own in zip(ends, lengths, strict=True)]


def frame_mask(lengths: Sequence[int], x: Tensor) -> Tensor:
    """`[batch, frame, 1]` for `x` `[batch, frame, ...]`: 1 in frames that are not padding."""
    ends = torch.tensor(lengths, device=x.device)
    places = torch.arange(x.shape[1], device=x.device)
    return (places < ends[:, None])[:, :, None].to(x.dtype)
