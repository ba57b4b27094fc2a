"""The training step: how it is split changes nothing, and nothing depends on values."""

import dataclasses

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from partitions.errors import UsageError
from ssl_core.memory.plan import Plan
from ssl_core.step import TrainingStep, Weights, combine
from ssl_core.wav2vec2.config import ModelConfig, Recipe, preset
from ssl_core.wav2vec2.model import PretrainingModel, draw

TINY = preset("tiny")
WEIGHTS = Weights(diversity=0.3, penalty=10.0, temperature=1.5)
DROPPING = dataclasses.replace(TINY, feat_quantizer_dropout=0.1)


def model_of(config: ModelConfig) -> PretrainingModel:
    torch.manual_seed(3)
    return PretrainingModel(config)


def gradients(
    config: ModelConfig, plan: Plan, batches: list[np.ndarray]
) -> dict[str, torch.Tensor]:
    model = model_of(config)
    step = TrainingStep(model, Recipe(), plan, seed=5, total_updates=10)
    masked = 0
    for number, batch in enumerate(batches):
        draws = draw(config, len(batch), batch.shape[1], np.random.default_rng(number))
        masked = draws.masked.numel() * len(batches)
        step.accumulate(torch.from_numpy(batch), draws, WEIGHTS, masked, number)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def noise(crops: int, samples: int = 16_000, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((crops, samples)).astype(np.float32)


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 5])
@pytest.mark.parametrize("config", [TINY, DROPPING], ids=["no dropout", "feature dropout"])
def test_micro_batches_give_the_whole_batchs_gradient(
    config: ModelConfig, micro_batch: int
) -> None:
    plan = Plan(length=1.0, batch=6)
    whole = gradients(config, plan, [noise(6)])
    split = gradients(config, dataclasses.replace(plan, micro_batch=micro_batch), [noise(6)])
    assert whole.keys() == split.keys() == dict(model_of(config).named_parameters()).keys()
    for name, value in whole.items():
        error = (split[name] - value).norm() / value.norm()
        assert error < 1e-5 or value.norm() < 1e-6, (name, float(error))


def test_accumulated_batches_weigh_the_same() -> None:
    plan = Plan(length=1.0, batch=2)
    a, b = noise(2, seed=1), noise(2, seed=2)
    both = gradients(TINY, dataclasses.replace(plan, accumulation=2), [a, b])

    def alone(batch: np.ndarray, number: int) -> dict[str, torch.Tensor]:
        model = model_of(TINY)
        step = TrainingStep(model, Recipe(), plan, seed=5, total_updates=10)
        draws = draw(TINY, 2, 16_000, np.random.default_rng(number))
        step.accumulate(torch.from_numpy(batch), draws, WEIGHTS, draws.masked.numel(), number)
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    first, second = alone(a, 0), alone(b, 1)
    for name, value in both.items():
        mean = (first[name] + second[name]) / 2
        assert torch.allclose(value, mean, rtol=1e-4, atol=1e-6 * float(mean.norm() + 1e-3)), name


def test_an_update_depends_on_seed_update_and_key_alone() -> None:
    def weights(update: int, key: int) -> torch.Tensor:
        model = model_of(TINY)
        step = TrainingStep(model, Recipe(), Plan(length=1.0, batch=2), seed=5, total_updates=10)
        torch.manual_seed(np.random.randint(1000))
        step.update([noise(2)], update, key)
        return model.project_q.weight.detach().clone()

    assert torch.equal(weights(3, 1), weights(3, 1))
    assert not torch.equal(weights(3, 1), weights(3, 2))
    assert not torch.equal(weights(3, 1), weights(4, 1))


def test_the_step_reports_what_it_did() -> None:
    step = TrainingStep(
        model_of(TINY), Recipe(), Plan(length=1.0, batch=4), seed=0, total_updates=100
    )
    report = step.update([noise(4)], 0)
    assert report.applied
    assert report.crops == 4
    assert report.seconds == 4.0
    assert report.masked_share == pytest.approx(19 / 49)
    assert 12 < report.distinct_negatives <= 18
    assert 4.0 < report.contrastive < 5.5
    assert 2 < report.perplexity <= 128
    assert report.temperature == 2.0
    assert report.learning_rate == pytest.approx(5e-4 / 8)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    model = model_of(TINY)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step = TrainingStep(model, Recipe(), Plan(length=1.0, batch=2), seed=0, total_updates=100)
    batch = noise(2)
    batch[0, 0] = np.nan
    report = step.update([batch], 0)
    assert not report.applied
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_gradient_reaches_the_codebook_and_the_extractor_through_the_targets() -> None:
    model = model_of(TINY)
    draws = draw(TINY, 2, 16_000, np.random.default_rng(0))
    features = model.features(torch.from_numpy(noise(2)))
    for parameter in model.wav2vec2.encoder.parameters():
        parameter.requires_grad_(False)
    model.wav2vec2.masked_spec_embed.requires_grad_(False)
    parts = model.loss_parts(features, draws, 2.0)
    parts.contrastive.backward()
    assert model.quantizer.codevectors.grad is not None
    assert model.quantizer.codevectors.grad.norm() > 0
    assert model.quantizer.weight_proj.weight.grad is not None
    assert model.quantizer.weight_proj.weight.grad.norm() > 0


def test_the_step_runs_on_fake_tensors() -> None:
    """No branch and no shape depends on a value, so the step needs no data."""
    draws = draw(TINY, 2, 16_000, np.random.default_rng(0))
    assert draws.noise is not None
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model = PretrainingModel(TINY)
        fake = draws._replace(
            masked=mode.from_tensor(draws.masked),
            multiplicity=mode.from_tensor(draws.multiplicity),
            noise=mode.from_tensor(draws.noise),
        )
        parts = model.loss_parts(model.features(torch.empty(2, 16_000)), fake, 2.0)
        combine(parts, WEIGHTS, draws.masked.numel()).backward()
        grad = model.wav2vec2.feature_extractor.conv_layers[0].get_parameter("conv.weight").grad
    assert grad is not None
    assert grad.shape == (32, 1, 10)


@pytest.mark.slow
def test_the_step_compiles_without_a_graph_break() -> None:
    config = dataclasses.replace(TINY, num_hidden_layers=1)
    model = model_of(config)
    draws = draw(config, 2, 16_000, np.random.default_rng(0))
    waveforms = torch.from_numpy(noise(2))

    def loss(waveforms: torch.Tensor) -> torch.Tensor:
        parts = model.loss_parts(model.features(waveforms), draws, 2.0)
        return combine(parts, WEIGHTS, draws.masked.numel())

    plain = loss(waveforms)
    plain.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(waveforms)
    compiled.backward()
    assert float(compiled) == pytest.approx(float(plain), rel=1e-5)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        error = (parameter.grad - expected[name]).norm() / expected[name].norm()
        assert error < 1e-4 or expected[name].norm() < 1e-6, name


def test_a_length_too_short_to_mask_and_a_split_batch_pool_are_refused() -> None:
    with pytest.raises(UsageError, match="too short to mask"):
        Plan(length=0.1).validate(TINY, Recipe())
    with pytest.raises(UsageError, match="whole batch"):
        Plan(batch=4, micro_batch=2).validate(TINY, Recipe(negative_pool="batch"))


def flops(name: str) -> int:
    """Floating point operations of a forward pass and its gradient, 5 s x 4."""
    config = preset(name)
    draws = draw(config, 4, 80_000, np.random.default_rng(0))
    counter = FlopCounterMode(display=False)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model = PretrainingModel(config)
        assert draws.noise is not None
        fake = draws._replace(
            masked=mode.from_tensor(draws.masked),
            multiplicity=mode.from_tensor(draws.multiplicity),
            noise=mode.from_tensor(draws.noise),
            feature_keep=None,
            layer_keep=None,
        )
        with counter:
            parts = model.loss_parts(model.features(torch.empty(4, 80_000)), fake, 2.0)
            combine(parts, WEIGHTS, draws.masked.numel()).backward()
    return int(counter.get_total_flops())


def test_a_step_of_tiny_is_at_least_fifty_times_cheaper() -> None:
    base, tiny = flops("base"), flops("tiny")
    assert base == pytest.approx(1.0e12, rel=0.05)
    assert base / tiny >= 50
