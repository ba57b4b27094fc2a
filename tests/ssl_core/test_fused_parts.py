"""Norms, dropout, feed-forward, draws and AdamW for GPUs against those for CPUs, interpreted."""

from collections.abc import Callable

import pytest
import torch
import triton_interpreter  # noqa: F401 (before the kernels)
from torch import Tensor, nn

from ssl_core.training.adamw import AdamW, Control
from ssl_core.training.fused_adamw import FusedAdamW
from ssl_core.training.pretraining_recipe import Recipe
from ssl_core.wav2vec2 import keyed_bits
from ssl_core.wav2vec2.config import ModelConfig
from ssl_core.wav2vec2.contrastive import sample_negatives
from ssl_core.wav2vec2.device_kernels import forced
from ssl_core.wav2vec2.dropout import Dropout
from ssl_core.wav2vec2.feed_forward import FeedForward
from ssl_core.wav2vec2.keyed_bits import site_keys
from ssl_core.wav2vec2.quantizer import gumbel_noise
from ssl_core.wav2vec2.residual import Biased, added_and_normed, normed, normed_and_dropped

WIDTH = 48
Parts = dict[str, Callable[[], Tensor]]


def assert_alike(compute: Callable[[], Tensor], leaves: list[Tensor]) -> None:
    """Compare a result and its gradients by both kinds of kernels, by relative L2 norm."""
    expected = compute()
    slope = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, leaves, slope, allow_unused=True)
    with forced("fused"):
        found = compute()
        ours = torch.autograd.grad(found, leaves, slope, allow_unused=True)
    for one, other in zip((found, *ours), (expected, *wanted), strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert (one - other).norm().item() <= 1e-6 * other.norm().item()


def sites(lengths: tuple[int, ...]) -> tuple[Parts, list[Tensor]]:
    """All places with a norm or a dropout, and the tensors they depend on."""
    torch.manual_seed(0)
    batch, frames = (1, sum(lengths)) if lengths else (2, 7)
    x, y = (torch.randn(batch, frames, WIDTH, requires_grad=True) for _ in range(2))
    bias = torch.randn(WIDTH, requires_grad=True)
    norm, drop = nn.LayerNorm(WIDTH), Dropout(0.3, 1)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    seeds = torch.randint(2**62, (len(lengths) or batch,))
    product = Biased(y, bias)
    parts: Parts = {
        "added": lambda: added_and_normed(x, product, drop, norm, seeds, lengths)[0],
        "evaluated": lambda: added_and_normed(x, product, drop, norm, None, lengths)[0],
        "dropped after": lambda: normed_and_dropped(x, y, norm, drop, seeds, lengths)[0],
        "normed": lambda: sum(normed(x, norm), torch.zeros(())),
        "dropped": lambda: drop(x * y, seeds, lengths),
    }
    return parts, [x, y, bias, *norm.parameters()]


@pytest.mark.parametrize("lengths", [(), (3, 9, 2)], ids=["stacked", "packed"])
@pytest.mark.parametrize("part", ["added", "evaluated", "dropped after", "normed", "dropped"])
def test_norms_and_dropout_are_those_of_a_cpu(part: str, lengths: tuple[int, ...]) -> None:
    parts, leaves = sites(lengths)
    assert_alike(parts[part], leaves)


def test_the_feed_forward_network_is_that_of_a_cpu() -> None:
    torch.manual_seed(0)
    network = FeedForward(ModelConfig(hidden_size=24, intermediate_size=300), 0)
    x = torch.randn(2, 9, 24, requires_grad=True)
    assert_alike(lambda: network(x, None).whole(), [x, *network.parameters()])


@pytest.mark.parametrize("pools", [3, 1])
def test_negatives_and_noise_are_those_of_a_cpu(pools: int) -> None:
    seeds = torch.randint(2**62, (3,))
    masked = 3 * 7 // pools
    counts = sample_negatives(seeds, 4, pools, masked, 20)
    noise = gumbel_noise(seeds, 3, 1100)
    with forced("fused"):
        assert torch.equal(sample_negatives(seeds, 4, pools, masked, 20), counts)
        torch.testing.assert_close(gumbel_noise(seeds, 3, 1100), noise)


@pytest.mark.parametrize("block", [2**15, 600])
def test_bits_in_torch_are_those_in_numpy(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """A GPU without Triton computes them in torch, a CPU in NumPy, by blocks."""
    monkeypatch.setattr(keyed_bits, "BLOCK", block)
    seeds = torch.tensor([0, 1, 2**62 - 1, 12345678901234567])
    keys = site_keys(seeds, 17)
    in_torch = keyed_bits._keys(seeds.to(torch.int32), (seeds >> 32).to(torch.int32), 17)
    assert all(torch.equal(one, other) for one, other in zip(keys, in_torch, strict=True))
    limits = keyed_bits.thresholds(keys, 0.1)
    for sizes in ([400_003] * 4, [803] * 4, [803, 803, 131, 1]):
        kept = keyed_bits.keep_elements(keys, sizes, 0.1)
        assert torch.equal(kept, keyed_bits._keep_elements_on_a_device(keys, sizes, limits))
    rows = keyed_bits._row_keys(keys.first, 5, 31)[:, 1:4, :, None]
    columns = keyed_bits._column_keys(keys.second, 5, 9)[:, 1:4, None]
    pairs = keyed_bits._keep_pairs_on_a_device(rows, columns, 33, limits)
    assert torch.equal(keyed_bits.keep_pairs(keys, 5, slice(1, 4), (31, 33), 0.1), pairs)
    place = torch.arange(1000, dtype=torch.int32)
    hashed = keyed_bits._hashed(place, keys.first[:, None], keys.second[:, None])
    assert torch.equal(keyed_bits.hashes(keys, 1000), hashed)


def test_masks_are_even_and_unrelated() -> None:
    """Neighbours in any direction, and four corners of a rectangle, agree as often as by chance."""
    keys = site_keys(torch.arange(8), 1)
    kept = keyed_bits.keep_pairs(keys, 12, slice(0, 12), (97, 97), 0.1).float()
    kept += keyed_bits.thresholds(keys, 0.1)[:, None, None, None] / 256 - 1
    corners = kept[..., 1:] * kept[..., :-1]
    others = [
        kept[:, :, 1:] * kept[:, :, :-1],
        corners,
        kept[:, 1:] * kept[:, :-1],
        kept[1:] * kept[:-1],
        kept * kept.transpose(2, 3) * (1 - torch.eye(97)),
        kept[:, :, 1:, 1:]
        * kept[:, :, 1:, :-1]
        * kept[:, :, :-1, 1:]
        * kept[:, :, :-1, :-1]
        / 0.09,
    ]
    assert abs(kept.mean().item()) < 4 * 0.3 / kept.numel() ** 0.5
    for product in others:
        assert abs(product.mean().item()) < 4 * 0.09 / product.numel() ** 0.5


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_adamw_of_all_parameters_at_once_is_that_of_each(kind: str) -> None:
    torch.manual_seed(0)
    shapes = [(700,), (3, 500), (1,), (1040,)]
    theirs = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    ours = [nn.Parameter(one.detach().clone()) for one in theirs]
    names = ["a", "b", "c", "d"]
    copies = {"b": ours[1].detach().half(), "d": ours[3].detach().half()}
    plain = AdamW(zip(names, theirs, strict=True), Recipe(), kind)  # type: ignore[arg-type]
    fused = FusedAdamW(zip(names, ours, strict=True), Recipe(), kind, copies)  # type: ignore[arg-type]
    rate, factor = torch.tensor(1e-2), torch.tensor(0.5)
    for update in range(3):
        # In two micro-batches, the second without a gradient of the first parameter.
        pieces = [[torch.randn(shape) for shape in shapes] for _ in range(2)]
        for one, other, number in zip(*pieces, range(4), strict=True):
            half = other.half() if names[number] in copies else other
            theirs[number].grad = (one + (0 if number == 0 else half.float())) * factor
        plain.apply(1e-2)
        fused.collect(dict(zip(names, pieces[0], strict=True)), True, last=False)
        second = {
            name: piece.half() if name in copies else piece
            for name, piece in zip(names[1:], pieces[1][1:], strict=True)
        }
        fused.collect(second, first=False, last=True)
        for finite in (1, 0):
            fused.apply_on_device(Control(rate, factor, torch.tensor(finite, dtype=torch.int32)))
        fused.drop_gradients()
        assert float(dict(fused.state())["step/a"]) == update + 1
    expected = dict(plain.state())
    for name, value in fused.state():
        torch.testing.assert_close(value.float(), expected[name].float(), rtol=1e-5, atol=1e-6)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    for name, value in copies.items():
        assert torch.equal(value, fused.parameters[name].detach().half())
