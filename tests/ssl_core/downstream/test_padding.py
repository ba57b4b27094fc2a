"""A clip gives the same result in a batch as alone, and the same as in transformers."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from small_models import (
    HEADS,
    LAYER_NORM,
    SMALL,
    backbone_of,
    noise,
    padded,
    save_backbone,
    small_recipe,
)
from torch import Tensor
from transformers import Wav2Vec2Model

from ssl_core.downstream.heads import BLANK, XVector, make_head, mean_over_frames
from ssl_core.downstream.task_model import LogMel
from ssl_core.wav2vec2 import packing
from ssl_core.wav2vec2.config import ModelConfig
from ssl_core.wav2vec2.model import Backbone

SAMPLES = (9_000, 16_000, 16_000, 400, 12_345)
"""Two adjacent clips are equally long; the shortest has one frame."""
SEEDS = torch.tensor([11, 22, 33, 44, 55])
FRAMES = (7, 19, 19, 1, 12)
CLIPS = [noise(samples, row) for row, samples in enumerate(SAMPLES)]
BOTH = pytest.mark.parametrize("config", [SMALL, LAYER_NORM], ids=["group norm", "layer norm"])
CHANCE = pytest.mark.parametrize("seeds", [None, SEEDS], ids=["evaluation", "dropout"])


def states(
    backbone: Backbone,
    clips: Sequence[Tensor],
    seeds: Tensor | None,
    keep: Sequence[bool] | None = None,
) -> tuple[Tensor, ...]:
    """Hidden states of clips of `[sample]`: `[frame, hidden]` each."""
    lengths = [backbone.config.frames(len(clip)) for clip in clips]
    packed = packing.packed_lengths(lengths)
    hidden = backbone.contextualise(backbone.extract(clips), packed, seeds, keep)
    assert hidden.shape[0] == (1 if packed else len(clips))
    return packing.split(hidden, lengths)


@BOTH
@CHANCE
@pytest.mark.parametrize("keep", [None, (False, True)], ids=["all layers", "one layer"])
def test_a_clip_gives_in_a_batch_what_it_gives_alone(
    config: ModelConfig, seeds: Tensor | None, keep: tuple[bool, ...] | None
) -> None:
    backbone, clips = backbone_of(config), CLIPS
    with torch.no_grad():
        batch = states(backbone, clips, seeds, keep)
        for row, (found, clip) in enumerate(zip(batch, clips, strict=True)):
            own = None if seeds is None else seeds[row : row + 1]
            (alone,) = states(backbone, [clip], own, keep)
            assert len(found) == len(alone) == config.frames(len(clip))
            assert (found - alone).abs().max() < 1e-5, len(clip)
        if seeds is None and keep is None:
            crops = torch.stack(clips[1:3])  # as pretraining sees them
            assert (torch.stack(batch[1:3]) - backbone(crops)).abs().max() < 1e-5


@BOTH
@CHANCE
@pytest.mark.parametrize("setting", ["plain", "keep attention", "recompute layers"])
def test_gradients_of_a_batch_are_the_sums_of_the_clips_alone(
    config: ModelConfig, seeds: Tensor | None, setting: str
) -> None:
    clips = CLIPS
    generator = torch.Generator().manual_seed(3)
    directions = [
        torch.randn(config.frames(n), config.hidden_size, generator=generator) for n in SAMPLES
    ]
    batch, alone = backbone_of(config), backbone_of(config)
    for backbone in (batch, alone):
        backbone.encoder.recompute = setting == "recompute layers"
        for layer in backbone.encoder.layers:
            layer.attention.keep_weights = setting == "keep attention"  # type: ignore[union-attr]
    pairs = zip(states(batch, clips, seeds), directions, strict=True)
    torch.stack([(found * d).sum() for found, d in pairs]).sum().backward()
    for row, (clip, direction) in enumerate(zip(clips, directions, strict=True)):
        own = None if seeds is None else seeds[row : row + 1]
        (states(alone, [clip], own)[0] * direction).sum().backward()
    expected = {n: p.grad for n, p in alone.named_parameters() if p.grad is not None}
    assert expected.keys() == dict(alone.named_parameters()).keys() - {"masked_spec_embed"}
    for name, parameter in batch.named_parameters():
        if name == "masked_spec_embed":
            continue
        assert parameter.grad is not None
        error = (parameter.grad - expected[name]).norm()
        # A constant added to all keys has no effect.
        assert error < 1e-4 * expected[name].norm() or name.endswith("k_proj.bias"), name
        assert torch.isfinite(parameter.grad).all(), name


@BOTH
def test_unpadded_clips_agree_with_transformers(config: ModelConfig, tmp_path: Path) -> None:
    theirs = Wav2Vec2Model.from_pretrained(save_backbone(tmp_path / "model", config)).eval()
    ours = backbone_of(config)
    for samples in SAMPLES:
        with torch.no_grad():
            expected = theirs(noise(samples)[None]).last_hidden_state
            assert (ours(noise(samples)[None]) - expected).abs().max() < 1e-5


def test_padded_clips_agree_with_transformers_under_its_mask(tmp_path: Path) -> None:
    """Only with layer norm: transformers' group norm includes padding in its mean."""
    theirs = Wav2Vec2Model.from_pretrained(save_backbone(tmp_path / "model", LAYER_NORM)).eval()
    waveforms = padded(CLIPS)
    mask = torch.arange(max(SAMPLES)) < torch.tensor(SAMPLES)[:, None]
    with torch.no_grad():
        expected = theirs(waveforms, attention_mask=mask.long()).last_hidden_state
        found = states(backbone_of(LAYER_NORM), CLIPS, None)
    for own, theirs_own in zip(found, expected, strict=True):
        assert (own - theirs_own[: len(own)]).abs().max() < 1e-5


@pytest.mark.parametrize("head", HEADS)
@CHANCE
def test_a_head_makes_in_a_batch_what_it_makes_alone(head: str, seeds: Tensor | None) -> None:
    torch.manual_seed(0)
    module = make_head(small_recipe(head, dropout=0.3), 16, 5)
    clips = [torch.randn(frames, 16) for frames in FRAMES]
    if head.endswith("ctc"):
        targets = torch.tensor([[1, 2, 2], [5, 0, 0], [2, 4, 0], [3, 0, 0], [4, 1, 0]])
    else:
        targets = torch.tensor([0, 4, 1, 2, 2])
    batch = padded(clips).requires_grad_()
    prediction = module(batch, FRAMES, seeds)
    losses = module.losses(prediction, FRAMES, targets)
    for row, clip in enumerate(clips):
        own = None if seeds is None else seeds[row : row + 1]
        alone = module(clip[None], (len(clip),), own)
        logits = prediction.logits[row]
        if head.endswith("ctc"):
            logits = logits[: len(clip)]
        assert (logits - alone.logits[0]).abs().max() < 1e-5
        if alone.embedding is not None:
            assert prediction.embedding is not None
            assert (prediction.embedding[row] - alone.embedding[0]).abs().max() < 1e-5
        target = targets[row : row + 1]
        if head.endswith("ctc"):
            target = target[:, : int((target != BLANK).sum())]
        loss = module.losses(alone, (len(clip),), target)
        assert float(losses[row].detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
    losses.sum().backward()
    assert batch.grad is not None
    for row, frames in enumerate(FRAMES):
        assert batch.grad[row, :frames].abs().sum() > 0
        assert batch.grad[row, frames:].abs().sum() == 0


def test_dropout_of_the_lstm_follows_the_seed() -> None:
    torch.manual_seed(0)
    module = make_head(small_recipe("lstm-ctc", dropout=0.3), 16, 5)
    x = torch.randn(2, 9, 16)
    plain, first, again, other = (
        module(x, (9, 9), seeds).logits for seeds in (None, SEEDS[:2], SEEDS[:2], SEEDS[2:4])
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, plain)
    assert not torch.allclose(first, other)


def test_the_loss_of_a_text_is_nats_a_symbol() -> None:
    """The probability of a text is the sum over all paths that decode to it."""
    torch.manual_seed(0)
    module, x = make_head(small_recipe("linear-ctc"), 16, 2), torch.randn(1, 4, 16)
    probabilities = module(x, (4,)).logits[0].softmax(-1).detach()
    for text in ("A", "AB", "AA", "BAB"):
        found = 0.0
        for path in itertools.product(range(3), repeat=4):
            joined = [symbol for symbol, _ in itertools.groupby(path) if symbol]
            if "".join("AB"[symbol - 1] for symbol in joined) == text:
                steps = [probabilities[n, s] for n, s in enumerate(path)]
                found += float(torch.stack(steps).prod())
        targets = torch.tensor([["AB".index(symbol) + 1 for symbol in text]])
        loss = float(module.losses(module(x, (4,)), (4,), targets).detach())
        assert loss == pytest.approx(-math.log(found) / len(text), rel=1e-5)


def test_a_text_longer_than_its_clip_teaches_nothing() -> None:
    torch.manual_seed(0)
    module = make_head(small_recipe("linear-ctc"), 16, 5)
    x = torch.randn(2, 3, 16, requires_grad=True)
    targets = torch.tensor([[1, 1, 2], [1, 2, 0]])  # two equal symbols need a blank between them
    losses = module.losses(module(x, (3, 3)), (3, 3), targets)
    losses.sum().backward()
    assert losses[0] == 0
    assert losses[1] > 0
    assert x.grad is not None
    assert x.grad[0].abs().sum() == 0
    assert x.grad[1].abs().sum() > 0


def test_log_mel_frames_are_those_of_the_clip_alone() -> None:
    mel, clips = LogMel(), [noise(samples) for samples in SAMPLES]
    batch = mel(padded(clips))
    for row, clip in enumerate(clips):
        alone = mel(clip[None])[0]
        assert len(alone) == mel.frames(len(clip)) > 0
        assert (batch[row, : len(alone)] - alone).abs().max() < 1e-4


def test_means_of_log_mel_frames_tell_clips_apart() -> None:
    """A head that pools sees nothing else."""
    mel = LogMel()
    tone = 0.5 * torch.sin(torch.arange(16_000) * 0.3)
    first, second = (
        mean_over_frames(mel(x[None]), (mel.frames(16_000),)) for x in (tone, noise(16_000))
    )
    assert (first - second).abs().max() > 0.1


def test_the_embedding_of_speakers_is_that_of_the_original_width() -> None:
    module = make_head(small_recipe("x-vector"), 16, 5)
    assert isinstance(module, XVector)
    with torch.no_grad():
        prediction = module(torch.randn(2, 30, 16), (30, 12))
    assert prediction.logits.shape == (2, 5)
    assert prediction.embedding is not None
    assert prediction.embedding.shape == (2, 512)


def test_batches_are_packed_only_if_lengths_differ() -> None:
    same, other = [torch.randn(3, 4) for _ in range(2)], torch.randn(5, 4)
    assert packing.join(same).shape == (2, 3, 4)
    joined = packing.join([*same, other])
    assert joined.shape == (1, 11, 4)
    parts = packing.split(joined, (3, 3, 5))
    assert all(torch.equal(found, own) for found, own in zip(parts, [*same, other], strict=True))
    padded_batch = packing.pad(joined, (3, 3, 5))
    assert padded_batch.shape == (3, 5, 4)
    assert torch.equal(padded_batch[1, :3], same[1])
    assert padded_batch[:2, 3:].abs().sum() == 0
    assert packing.places((3, 3, 5)) == [slice(0, 3), slice(3, 6), slice(6, 11)]
