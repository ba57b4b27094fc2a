"""The kernels for GPUs against plain torch, in Triton's interpreter."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton_interpreter  # noqa: F401 (before the kernels)
from torch import Tensor

from ssl_core.wav2vec2 import keyed_bits, packing
from ssl_core.wav2vec2.cpu import strided_convolution
from ssl_core.wav2vec2.cuda import extractor
from ssl_core.wav2vec2.cuda.extractor import activated_convolution, first_convolutions
from ssl_core.wav2vec2.cuda.fused_attention import (
    fused_attention,
    fused_cross_attention,
    fused_self_attention,
)
from ssl_core.wav2vec2.cuda.grouped_convolution import grouped_convolution

Tensors = Sequence[Tensor]


def assert_same(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], inputs: Tensors, bound: float = 1e-5
) -> None:
    """Compare results and all gradients with those of a function in fp64, by relative L2 norm."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    found, expected = ours(*leaves), theirs(*wide)
    assert found.shape == expected.shape
    slope = torch.randn(found.shape)
    pairs = [(found, expected)]
    gradients = torch.autograd.grad(found, leaves, slope)
    pairs += zip(gradients, torch.autograd.grad(expected, wide, slope.double()), strict=True)
    for one, other in pairs:
        assert one.shape == other.shape
        assert (one - other).norm().item() <= bound * other.norm().item()


def plain_attention(inputs: Tensors, heads: int, rate: float, seeds: Tensor | None) -> Tensor:
    """Attention by its definition; dropout at site 1."""
    query, key, _ = inputs
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in inputs)
    weights = torch.softmax(q @ k.transpose(2, 3) * q.shape[-1] ** -0.5, -1)
    if seeds is not None and rate:
        keys = keyed_bits.site_keys(seeds, 1)
        sides = (query.shape[1], key.shape[1])
        weights = weights * keyed_bits.keep_pairs(keys, heads, slice(0, heads), sides, rate)
        weights = weights / (1 - rate)
    return (weights @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("heads", "width", "queries", "frames", "rate"),
    [(2, 48, 37, 37, 0.1), (1, 64, 13, 70, 0.3), (1, 16, 33, 65, 0.0)],
)
def test_attention_and_its_gradients(
    heads: int, width: int, queries: int, frames: int, rate: float
) -> None:
    torch.manual_seed(0)
    seeds = torch.tensor([2**62 + 12345, -7])
    q = torch.randn(2, queries, heads * width)
    k, v = torch.randn(2, 2, frames, heads * width)
    assert_same(
        lambda *x: fused_attention(*x, heads=heads, rate=rate, seeds=seeds, site=1),
        lambda *x: plain_attention(x, heads, rate, seeds),
        (q, k, v),
    )


def test_attention_of_one_product_has_one_gradient() -> None:
    torch.manual_seed(0)
    seeds = torch.tensor([3])
    assert_same(
        lambda x: fused_self_attention(x, heads=2, rate=0.1, seeds=seeds, site=1),
        lambda x: plain_attention(x.chunk(3, 2), 2, 0.1, seeds),
        [torch.randn(1, 21, 3 * 32)],
    )
    assert_same(
        lambda q, x: fused_cross_attention(q, x, heads=2, rate=0.1, seeds=seeds, site=1),
        lambda q, x: plain_attention((q, *x.chunk(2, 2)), 2, 0.1, seeds),
        [torch.randn(1, 5, 32), torch.randn(1, 21, 2 * 32)],
    )


def test_attention_without_seeds_drops_nothing() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 9, 16)
    found = fused_attention(q, k, v, heads=1, rate=0.5, seeds=None, site=1)
    torch.testing.assert_close(found, plain_attention((q, k, v), 1, 0.5, None))


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_attention_of_packed_clips_is_that_of_each(rate: float) -> None:
    torch.manual_seed(0)
    lengths, seeds = (19, 34, 1), torch.tensor([5, 6, 7])

    def alone(*inputs: Tensor) -> Tensor:
        clips = enumerate(packing.places(lengths))
        return torch.cat(
            [
                plain_attention([x[:, own] for x in inputs], 2, rate, seeds[clip : clip + 1])
                for clip, own in clips
            ],
            1,
        )

    given = {"heads": 2, "rate": rate, "seeds": seeds, "site": 1, "lengths": lengths}
    inputs = torch.randn(3, 1, 54, 32).unbind()
    assert_same(lambda *x: fused_attention(*x, **given), alone, inputs)  # type: ignore[arg-type]


def test_masks_of_attention_are_those_of_the_hash() -> None:
    """With equal scores, and a value that is one in a channel of its own, each weight shows."""
    heads, frames, rate, seeds = 2, 64, 0.37, torch.tensor([-(2**40), 99])
    q = torch.zeros(2, frames, heads * 64)
    v = torch.eye(frames).repeat(2, 1, heads)
    found = fused_attention(q, q, v, heads=heads, rate=rate, seeds=seeds, site=1)
    found = found.unflatten(2, (heads, -1)).transpose(1, 2) != 0
    keys = keyed_bits.site_keys(seeds, 1)
    assert found.equal(keyed_bits.keep_pairs(keys, heads, slice(0, heads), (frames, frames), rate))


@pytest.mark.parametrize(
    ("groups", "channels", "taps", "frames"), [(2, 12, 8, 37), (1, 20, 5, 6), (2, 4, 8, 3)]
)
def test_the_grouped_convolution_and_its_gradients(
    groups: int, channels: int, taps: int, frames: int
) -> None:
    torch.manual_seed(0)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        out = F.conv1d(x.transpose(1, 2), weight, padding=taps // 2, groups=groups)
        return out[:, :, :frames].transpose(1, 2)

    width = groups * channels
    inputs = torch.randn(2, frames, width), torch.randn(width, channels, taps)
    assert_same(lambda x, weight: grouped_convolution(x, weight, groups), plain, inputs)


def spare_rows_without_slope(x: Tensor, spare: int) -> Tensor:
    """`x`, `[batch, row, channel]`, with zeros in spare rows, which nothing reads."""
    return torch.cat([x[:, : x.shape[1] - spare], torch.zeros_like(x[:, x.shape[1] - spare :])], 1)


@pytest.mark.parametrize(("taps", "stride"), [(3, 2), (2, 2), (4, 2)])
def test_the_activated_convolution_and_its_gradients(taps: int, stride: int) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(2, 12, 5), torch.randn(4, 5, taps)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        x = F.pad(F.gelu(x).transpose(1, 2), (0, taps - stride))
        return spare_rows_without_slope(F.conv1d(x, weight, stride=stride).transpose(1, 2), 1)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return spare_rows_without_slope(activated_convolution(x, weight, stride), 1)

    assert_same(ours, plain, inputs)


def test_the_first_convolutions_and_their_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extractor, "_ROWS_SUMMED", 128)
    torch.manual_seed(0)
    windows = torch.randn(2, 150, 16)
    windows[:, -2:] = 0
    inputs = torch.randn(2, 16, 24), torch.randn(6, 24, 3)

    def plain(kernels: Tensor, weight: Tensor) -> Tensor:
        x = F.pad(F.gelu(windows.double() @ kernels).transpose(1, 2), (0, 1))
        return spare_rows_without_slope(F.conv1d(x, weight, stride=2).transpose(1, 2), 1)

    def ours(kernels: Tensor, weight: Tensor) -> Tensor:
        out = first_convolutions(windows, kernels, weight, 2)
        return spare_rows_without_slope(out, 1)

    assert_same(ours, plain, inputs)


def test_convolutions_of_a_batch_are_those_of_its_crops_on_a_cpu() -> None:
    """Spare rows, which reach into the next crop, change neither results nor gradients."""
    torch.manual_seed(0)
    windows = F.pad(torch.randn(3, 61, 16), (0, 0, 0, 3))
    inputs = [torch.randn(3, 16, 6), *(torch.randn(6, 6, taps) / 4 for taps in (3, 3, 2))]

    def features(of: Any, *inputs: Tensor) -> Tensor:
        kernels, first, *others = inputs
        x = of.first_convolutions(windows.to(first.dtype), kernels, first, 2)
        for weight in others:
            x = of.activated_convolution(x, weight, 2)
        return F.gelu(x[:, :7])

    ours, theirs = partial(features, extractor), partial(features, strided_convolution)
    assert_same(ours, theirs, inputs)
