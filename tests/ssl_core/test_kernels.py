"""The custom operators against plain torch: convolutions, attention, dropout."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_core.wav2vec2 import positions as positions_module
from ssl_core.wav2vec2.attention import attention
from ssl_core.wav2vec2.config import ModelConfig, preset
from ssl_core.wav2vec2.cpu import block_attention
from ssl_core.wav2vec2.cpu.block_attention import attention_mask
from ssl_core.wav2vec2.cpu.spectral_convolution import spectral_convolution
from ssl_core.wav2vec2.dropout import Dropout, keep_mask
from ssl_core.wav2vec2.features import ConvolutionLayer, FeatureExtractor
from ssl_core.wav2vec2.feed_forward import FeedForward
from ssl_core.wav2vec2.positions import PositionalConvolution


def plain_features(extractor: FeatureExtractor, waveforms: Tensor) -> Tensor:
    """Features by plain convolutions, norms and GELUs: `[batch, sample]` to `[batch, frame, 8]`."""
    x = waveforms[:, None]
    for layer in extractor.conv_layers:
        assert isinstance(layer, ConvolutionLayer)
        x = F.conv1d(x, layer.conv.weight, layer.conv.bias, stride=layer.conv.stride)
        if isinstance(layer.layer_norm, nn.GroupNorm):
            x = layer.layer_norm(x)
        elif layer.layer_norm is not None:
            x = layer.layer_norm(x.transpose(1, 2)).transpose(1, 2)
        x = F.gelu(x)
    return x.transpose(1, 2)


@pytest.mark.parametrize("samples", [400, 720, 12_345, 16_000, 80_000])
@pytest.mark.parametrize(
    "changes", [{}, {"feat_extract_norm": "layer", "conv_bias": True}], ids=["group", "layer"]
)
def test_the_extractor_and_its_gradient_are_those_of_plain_convolutions(
    samples: int, changes: dict[str, object]
) -> None:
    torch.manual_seed(0)
    config = ModelConfig(conv_dim=(8,) * 7, **changes)  # type: ignore[arg-type]
    extractor = FeatureExtractor(config).double()
    waveforms = torch.randn(3, samples, dtype=torch.float64)
    found, expected = extractor(waveforms), plain_features(extractor, waveforms)
    assert found.shape == (3, config.frames(samples), 8)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    slope = torch.randn_like(found)
    parameters = list(extractor.parameters())
    ours = torch.autograd.grad(found, parameters, slope)
    theirs = torch.autograd.grad(expected, parameters, slope)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11 * float(other.abs().max()))


def test_a_crop_without_high_frequencies_is_normed_like_any_other() -> None:
    """Neighbouring samples are almost equal: the variance is a small difference of large sums."""
    torch.manual_seed(0)
    extractor = FeatureExtractor(ModelConfig(conv_dim=(8,) * 7))
    time = torch.arange(16_000, dtype=torch.float64)
    waveforms = (torch.sin(time / 400) + 0.5)[None]
    exact = plain_features(extractor.double(), waveforms)
    found = extractor.float()(waveforms.float())
    assert (found - exact).norm() / exact.norm() < 1e-4


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("block", [2**21, 700])
@pytest.mark.parametrize(("queries", "frames", "heads"), [(20, 20, 4), (5, 33, 2)])
def test_attention_with_dropout_is_that_of_the_textbook(
    queries: int, frames: int, heads: int, block: int, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_attention, "BLOCK", block)
    torch.manual_seed(0)
    query = torch.randn(3, queries, heads * 8, dtype=torch.float64, requires_grad=True)
    key, value = (
        torch.randn(3, frames, heads * 8, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    seeds = torch.arange(3)

    def by_head(x: Tensor) -> Tensor:
        return x.view(3, -1, heads, 8).transpose(1, 2)

    mask = attention_mask(seeds, 1, heads, 0, heads, (queries, frames), 0.1).double() / 0.9
    weights = torch.softmax(by_head(query) @ by_head(key).transpose(2, 3) / 8**0.5, -1) * mask
    expected = (weights @ by_head(value)).transpose(1, 2).flatten(2)
    found = attention(query, key, value, heads=heads, rate=0.1, seeds=seeds, site=1, keep=keep)
    torch.testing.assert_close(found, expected)
    slope = torch.randn_like(found)
    ours = torch.autograd.grad(found, (query, key, value), slope)
    theirs = torch.autograd.grad(expected, (query, key, value), slope)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5])
def test_the_fraction_dropped_is_the_rate(rate: float) -> None:
    masks = keep_mask(torch.arange(200), 3, (50, 100), rate, ())
    # 200 thresholds in whole 256ths, one million elements.
    assert float(masks.float().mean()) == pytest.approx(1 - rate, abs=1e-3)
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], keep_mask(torch.arange(1), 4, (50, 100), rate, ())[0])


def test_dropout_follows_the_crop_and_its_gradient_the_same_mask() -> None:
    x = torch.randn(4, 6, 10, requires_grad=True)
    seeds = torch.tensor([5, 6, 7, 8])
    drop = Dropout(0.3, 2)
    whole = drop(x, seeds)
    assert torch.equal(whole[2:], drop(x[2:], seeds[2:]))
    mask = keep_mask(seeds, 2, (6, 10), 0.3, ())
    torch.testing.assert_close(whole, x * mask / 0.7)
    (gradient,) = torch.autograd.grad(whole.sum(), x)
    torch.testing.assert_close(gradient, mask / 0.7)
    assert drop(x, None) is x


@pytest.mark.parametrize("taps", [7, 8])
@pytest.mark.parametrize("frames", [1, 3, 4, 5, 20, 61])
def test_positions_and_their_gradient_are_those_of_a_plain_convolution(
    taps: int, frames: int
) -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        hidden_size=12, num_conv_pos_embeddings=taps, num_conv_pos_embedding_groups=3
    )
    positions = PositionalConvolution(config).double()
    x = torch.randn(2, frames, 12, dtype=torch.float64, requires_grad=True)
    expected = F.gelu(positions.conv(x.transpose(1, 2))[:, :, :frames]).transpose(1, 2)
    found = positions(x)
    torch.testing.assert_close(found, expected)
    wanted, slope = [x, *positions.parameters()], torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad(found, wanted, slope),
        torch.autograd.grad(expected, wanted, slope),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11 * float(other.abs().max()))


def test_the_feed_forward_network_is_two_linear_layers_and_a_gelu() -> None:
    torch.manual_seed(0)
    part = FeedForward(ModelConfig(hidden_size=12, intermediate_size=20), 0).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    expected = part.output_dense(F.gelu(part.intermediate_dense(x)))
    found = part(x, None).whole()
    torch.testing.assert_close(found, expected)
    slope = torch.from_numpy(np.random.default_rng(0).standard_normal(found.shape))
    wanted = [x, *part.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(found, wanted, slope), torch.autograd.grad(expected, wanted, slope)
    )


@pytest.mark.parametrize(
    ("frames", "taps", "lengths"),
    [(5, 16, ()), (300, 16, ()), (250, 128, ()), (260, 128, (129, 1, 130)), (129, 200, ())],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spectral_convolution_is_the_direct_one(
    frames: int, taps: int, lengths: tuple[int, ...], dtype: torch.dtype
) -> None:
    groups, before, batch = 3, taps // 2, 1 if lengths else 2
    x = torch.randn(batch, frames, 12, dtype=dtype, requires_grad=True)
    weight = torch.randn(12, 4, taps, dtype=dtype, requires_grad=True)
    crops = x.split(list(lengths), 1) if lengths else x.split(1)
    convolved = [
        F.conv1d(crop.transpose(1, 2), weight, padding=before, groups=groups) for crop in crops
    ]
    alone = [y[:, :, : crop.shape[1]] for y, crop in zip(convolved, crops, strict=True)]
    expected = torch.cat(alone, 2 if lengths else 0).transpose(1, 2)
    found = spectral_convolution(x, weight, before, groups, lengths)
    slope = torch.randn_like(found)
    ours = torch.autograd.grad(found, (x, weight), slope)
    theirs = torch.autograd.grad(expected, (x, weight), slope)
    limit = 1e-6 if dtype == torch.float32 else 1e-14
    for own, other in zip((found, *ours), (expected, *theirs), strict=True):
        error = (own.detach() - other.detach()).norm() / other.detach().norm()
        assert float(error) < limit


@pytest.mark.parametrize(("frames", "lengths"), [(300, ()), (300, (200, 30, 70)), (40, (39, 1))])
def test_positions_are_the_same_by_spectral_and_direct_convolution(
    frames: int, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = PositionalConvolution(preset("tiny"))
    x = torch.randn(1, frames, preset("tiny").hidden_size)
    with torch.no_grad():
        monkeypatch.setattr(positions_module, "SPECTRA_FROM", 1)
        by_spectra = module(x, lengths)
        monkeypatch.setattr(positions_module, "SPECTRA_FROM", frames + 1)
        convolved = module(x, lengths)
    assert (by_spectra - convolved).abs().max() < 1e-5
