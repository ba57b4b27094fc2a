"""Masks, negatives, codebook and contrastive loss against numbers computed by other means."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import DataError, UsageError
from common.options import settings_parser
from common.settings import from_mapping, parse
from ssl_core.training.central import CentralSettings
from ssl_core.training.collapse import CollapseAlarm
from ssl_core.training.pretraining_recipe import RECIPES, Recipe
from ssl_core.training.schedule import diversity_weight, gumbel_temperature, learning_rate
from ssl_core.wav2vec2.config import ModelConfig, preset
from ssl_core.wav2vec2.contrastive import contrastive_loss, sample_negatives
from ssl_core.wav2vec2.masking import masked_count, minimum_frames, sample_masks
from ssl_core.wav2vec2.positions import PositionalConvolution
from ssl_core.wav2vec2.precision import autocast
from ssl_core.wav2vec2.quantizer import diversity_loss, perplexity

BASE = preset("base")


@pytest.mark.parametrize(("seconds", "frames"), [(1, 49), (5, 249), (10, 499), (15, 749)])
def test_frames_of_the_papers_lengths(seconds: int, frames: int) -> None:
    assert BASE.frames(seconds * 16_000) == frames


@settings(deadline=None, max_examples=25)
@given(frames=st.integers(13, 400), seed=st.integers(0, 2**32 - 1))
def test_every_crop_has_the_same_number_of_masked_frames(frames: int, seed: int) -> None:
    rows = sample_masks(BASE, 5, frames, np.random.default_rng(seed))
    assert rows.shape == (5, masked_count(BASE, frames))
    assert (np.diff(rows, axis=1) > 0).all()
    assert rows.min() >= 0
    assert rows.max() < frames


def test_masks_are_spans_and_cover_the_documented_fraction() -> None:
    fractions = {s: masked_count(BASE, BASE.frames(s * 16_000)) / BASE.frames(s * 16_000)
                 for s in (1, 5, 10, 15)}  # fmt: skip
    assert {s: round(fraction, 2) for s, fraction in fractions.items()} == {
        1: 0.39,
        5: 0.44,
        10: 0.45,
        15: 0.46,
    }
    rows = sample_masks(BASE, 50, 249, np.random.default_rng(0))
    neighbours = (np.diff(rows, axis=1) == 1).mean()
    assert neighbours > 0.75
    every = np.bincount(rows.ravel(), minlength=249) / 50
    assert every[20:-20].min() > 0.2


def test_too_few_frames_to_mask_are_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        sample_masks(BASE, 1, minimum_frames(BASE) - 1, np.random.default_rng(0))


def test_negatives_are_other_frames_of_the_pool_and_evenly_drawn() -> None:
    counts = sample_negatives(torch.arange(3), 0, 3, 20, 100)
    assert counts.shape == (3, 20, 20)
    assert (counts.sum(-1) == 100).all()
    assert (counts.diagonal(dim1=1, dim2=2) == 0).all()
    many = sample_negatives(torch.arange(1), 0, 1, 5, 100_000)[0]
    off_diagonal = many[~torch.eye(5, dtype=torch.bool)]
    assert off_diagonal.tolist() == pytest.approx([25_000] * 20, rel=0.03)


def test_contrastive_loss_is_the_gathered_sum_and_skips_equal_codes() -> None:
    torch.manual_seed(0)
    predictions, vectors = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    codes = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 0, 1, 1, 2, 2]])
    vectors[1] = vectors[1][[0, 0, 2, 2, 4, 4]]
    counts = sample_negatives(torch.arange(2), 0, 2, 6, 10)
    found = contrastive_loss(predictions, vectors, codes, counts, 0.1)
    loss, correct = 0.0, 0
    for pool in range(2):
        for frame in range(6):
            own = torch.cosine_similarity(predictions[pool, frame], vectors[pool, frame], dim=0)
            logits = [own / 0.1]
            for other in range(6):
                if codes[pool, other] == codes[pool, frame]:
                    continue
                similar = torch.cosine_similarity(
                    predictions[pool, frame], vectors[pool, other], dim=0
                )
                logits += [similar / 0.1] * int(counts[pool, frame, other])
            stacked = torch.stack(logits)
            loss += float(torch.logsumexp(stacked, 0) - stacked[0])
            correct += bool(stacked[0] > stacked[1:].max())
    assert float(found.loss) == pytest.approx(loss, rel=1e-5)
    assert int(found.correct) == correct


def test_perplexity_and_diversity_on_exact_distributions() -> None:
    even = torch.full((2, 4), 0.25)
    assert float(perplexity(even)) == pytest.approx(8.0)
    assert float(diversity_loss(even)) == pytest.approx(0.0, abs=1e-6)
    one = torch.eye(4)[:2]
    assert float(perplexity(one)) == pytest.approx(2.0)
    assert float(diversity_loss(one)) == pytest.approx(0.75)
    unused = torch.tensor([[1000.0, 0.0, -1000.0]], requires_grad=True)
    diversity_loss(torch.softmax(unused, -1)).backward()
    assert unused.grad is not None
    assert torch.isfinite(unused.grad).all()


def test_rate_and_temperature_follow_the_global_update() -> None:
    recipe = Recipe(learning_rate=1.0, warmup=0.1)
    rates = [learning_rate(recipe, update, 100) for update in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == 0.0
    assert gumbel_temperature(recipe, 0) == 2.0
    assert gumbel_temperature(recipe, 100_000) == pytest.approx(2 * 0.999995**100_000)
    assert gumbel_temperature(recipe, 10**7) == 0.5
    assert diversity_weight(BASE, recipe, 99, 100) == BASE.diversity_loss_weight
    falling = Recipe(diversity_end=0.2)
    weights = [diversity_weight(BASE, falling, update, 100) for update in (0, 50, 100)]
    assert weights == pytest.approx([0.1, 0.06, 0.02])


def test_settings_change_presets_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    def central(*words: str) -> CentralSettings:
        parser = settings_parser(CentralSettings, prog="train")
        return parse(CentralSettings, parser, ["--model", "tiny", *words])[0]

    found = central("--recipe.learning-rate", "5e-4", "--architecture.layerdrop", "0.2")
    assert found.recipe == dataclasses.replace(RECIPES["tiny"], learning_rate=5e-4)
    assert found.architecture == dataclasses.replace(preset("tiny"), layerdrop=0.2)
    with pytest.raises(SystemExit) as stopped:
        central("--recipe.learnin-rate", "1")
    assert stopped.value.code == 2
    assert (
        "unknown setting 'recipe.learnin-rate'; did you mean 'recipe.learning-rate'?"
        in capsys.readouterr().err
    )
    with pytest.raises(UsageError, match="learning-rate must be above zero"):
        central("--recipe.learning-rate", "-1")
    with pytest.raises(SystemExit) as stopped:
        central("--architecture.layerdrop", "often")
    assert stopped.value.code == 2
    assert "--architecture.layerdrop: 'often' is not a number" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"unknown setting .* did you mean 'recipe.learning-rate'"):
        from_mapping(CentralSettings, {"recipe": {"learnin-rate": 1}}, "here")


def test_a_config_of_another_model_is_refused() -> None:
    with pytest.raises(DataError, match="not wav2vec2"):
        ModelConfig.from_hf({"model_type": "hubert"}, "here")
    with pytest.raises(DataError, match="adapters"):
        ModelConfig.from_hf({"model_type": "wav2vec2", "add_adapter": True}, "here")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"contrastive": 3.0, "accuracy": 0.5, "perplexity": 2.5}, "codebook has collapsed"),
        ({"contrastive": 0.1, "accuracy": 0.999, "perplexity": 99.0}, "trivial"),
        ({"contrastive": math.log(101), "accuracy": 0.01, "perplexity": 99.0}, "nothing is learnt"),
        ({"contrastive": math.nan, "accuracy": 0.0, "perplexity": 99.0}, "not finite"),
    ],
)
def test_collapse_is_named_once_with_what_to_do(values: dict[str, float], words: str) -> None:
    alarm = CollapseAlarm(BASE)
    warning = alarm.check(1000, **values)
    assert warning is not None
    assert words in warning
    assert alarm.check(1001, **values) is None
    healthy = CollapseAlarm(BASE)
    assert healthy.check(1000, contrastive=3.0, accuracy=0.3, perplexity=200.0) is None


@pytest.mark.parametrize("groups", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("frames", [49, 300])
def test_positions_in_bf16_are_near_those_in_fp32(groups: int, frames: int) -> None:
    """Of 2 to 32 channels in a group: oneDNN with AMX is wrong below 16 channels."""
    torch.manual_seed(0)
    config = dataclasses.replace(
        preset("tiny"),
        hidden_size=32,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=groups,
    )
    layer, x = PositionalConvolution(config), torch.randn(2, frames, 32)
    expected = layer(x)
    with autocast(torch.device("cpu"), "bf16"):
        found = layer(x).float()
    assert (found - expected).norm() < 0.02 * expected.norm()
