"""The training step: how it is split changes nothing, and nothing depends on values."""

import dataclasses
from typing import Literal

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from common.errors import UsageError
from ssl_core.planning import operation_count
from ssl_core.planning.step_plan import Plan, StepOptions
from ssl_core.training.adamw import AdamW
from ssl_core.training.pretraining_loss import Weights, combine
from ssl_core.training.pretraining_recipe import Recipe
from ssl_core.training.pretraining_settings import PretrainingSettings
from ssl_core.training.pretraining_step import PretrainingStep
from ssl_core.wav2vec2.chance import draw
from ssl_core.wav2vec2.config import ModelConfig, preset
from ssl_core.wav2vec2.model import PretrainingModel

TINY = preset("tiny")
WEIGHTS = Weights(diversity=0.3, penalty=10.0, temperature=1.5)
DROPPING = dataclasses.replace(
    TINY,
    feat_quantizer_dropout=0.1,
    feat_proj_dropout=0.1,
    hidden_dropout=0.1,
    attention_dropout=0.1,
    activation_dropout=0.1,
)


def model_of(config: ModelConfig) -> PretrainingModel:
    torch.manual_seed(3)
    return PretrainingModel(config)


def gradients(
    config: ModelConfig, plan: Plan, batches: list[np.ndarray]
) -> dict[str, torch.Tensor]:
    model = model_of(config)
    step = PretrainingStep(model, Recipe(), plan, seed=5, total_updates=10)
    masked = 0
    for number, batch in enumerate(batches):
        draws = draw(config, len(batch), batch.shape[1], np.random.default_rng(number))
        masked = draws.masked.numel() * len(batches)
        step.accumulate(torch.from_numpy(batch), draws, WEIGHTS, masked)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def noise(crops: int, samples: int = 16_000, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((crops, samples)).astype(np.float32)


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 5])
@pytest.mark.parametrize("config", [TINY, DROPPING], ids=["no dropout", "dropout"])
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


@pytest.mark.parametrize(
    "changes",
    [
        {"recompute_features": True},
        {"recompute_layers": True},
        {"keep_attention": True},
        {"keep_freed_memory": False},
        pytest.param({"compile": True}, marks=pytest.mark.slow),
        {"recompute_features": True, "recompute_layers": True, "micro_batch": 1},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_every_exact_setting_gives_the_plain_gradient(changes: dict[str, object]) -> None:
    plan = Plan(length=1.0, batch=3)
    plain = gradients(DROPPING, plan, [noise(3)])
    other = gradients(DROPPING, dataclasses.replace(plan, **changes), [noise(3)])  # type: ignore[arg-type]
    assert other.keys() == plain.keys()
    for name, value in plain.items():
        error = (other[name] - value).norm() / value.norm()
        assert error < 1e-5 or value.norm() < 1e-6, (name, float(error))


def updated(plan: Plan, updates: int = 3) -> dict[str, torch.Tensor]:
    """Weights after some updates."""
    model = model_of(DROPPING)
    step = PretrainingStep(model, Recipe(), plan, seed=5, total_updates=10)
    for number in range(updates):
        assert step.update([noise(2, seed=number)], number).applied
    return model.state_dict()


def test_gradients_applied_as_they_are_made_give_the_same_weights() -> None:
    plan = Plan(length=1.0, batch=2)
    usual = updated(plan)
    for name, value in updated(dataclasses.replace(plan, apply_in_backward=True)).items():
        assert torch.equal(value, usual[name]), name


@pytest.mark.parametrize(
    ("kernel", "stride"), [((16, 16), (16, 16)), ((10, 8, 8), (5, 8, 8))], ids=["two", "three"]
)
def test_an_extractor_of_few_convolutions_is_trained(
    kernel: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    widths = (32,) * (len(kernel) - 1) + TINY.conv_dim[-1:]
    config = dataclasses.replace(TINY, conv_dim=widths, conv_kernel=kernel, conv_stride=stride)
    step = PretrainingStep(
        model_of(config), Recipe(), Plan(length=1.0, batch=2), seed=0, total_updates=2
    )
    assert step.update([noise(2)], 0).applied


def test_applying_in_backward_stops_at_a_loss_that_is_not_finite() -> None:
    model = model_of(TINY)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = Plan(length=1.0, batch=2, apply_in_backward=True)
    step = PretrainingStep(model, Recipe(), plan, seed=0, total_updates=100)
    batch = noise(2)
    batch[0, 0] = np.nan
    assert not step.update([batch], 0).applied
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_optimizer_state_in_fp32_is_that_of_torchs_adamw() -> None:
    recipe, model = Recipe(), torch.nn.Linear(40, 30)
    other = torch.nn.Linear(40, 30)
    other.load_state_dict(model.state_dict())
    ours = AdamW(model.named_parameters(), recipe, "fp32")
    theirs = torch.optim.AdamW(
        other.parameters(),
        betas=(recipe.beta1, recipe.beta2),
        eps=recipe.epsilon,
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    for rate in (1e-3, 2e-3, 5e-4):
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            one.grad = torch.randn_like(one)
            two.grad = one.grad.clone()
        theirs.param_groups[0]["lr"] = rate
        theirs.step()
        ours.apply(rate)
    assert torch.equal(model.weight, other.weight)
    assert torch.equal(model.bias, other.bias)


@pytest.mark.parametrize(("state", "most"), [("bf16", 0.02), ("int8", 0.25)])
def test_rounded_optimizer_state_moves_weights_nearly_as_far(
    state: Literal["bf16", "int8"], most: float
) -> None:
    start = model_of(DROPPING).state_dict()
    plan = Plan(length=1.0, batch=2)
    exact, rounded = updated(plan), updated(dataclasses.replace(plan, optimizer_state=state))
    moved = torch.cat([(exact[n] - start[n]).flatten() for n in exact])
    error = torch.cat([(rounded[n] - exact[n]).flatten() for n in exact])
    assert 0 < error.norm() / moved.norm() < most


@pytest.mark.parametrize("state", ["fp32", "bf16", "int8"])
def test_optimizer_state_comes_back_from_a_checkpoint(
    state: Literal["fp32", "bf16", "int8"],
) -> None:
    plan = Plan(length=1.0, batch=2, optimizer_state=state)

    def trained(resume: bool) -> dict[str, torch.Tensor]:
        model = model_of(TINY)
        step = PretrainingStep(model, Recipe(), plan, seed=5, total_updates=10)
        for number in range(4):
            if resume and number == 2:
                state = {name: value.clone() for name, value in step.optimizer_state().items()}
                step = PretrainingStep(model, Recipe(), plan, seed=5, total_updates=10)
                step.load_optimizer_state(state)
            step.update([noise(2, seed=number)], number)
        return model.state_dict()

    straight = trained(resume=False)
    for name, value in trained(resume=True).items():
        assert torch.equal(value, straight[name]), name


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_scaled_loss_is_halved_until_fp16_can_hold_its_gradient(in_backward: bool) -> None:
    model = model_of(TINY)
    plan = Plan(length=1.0, batch=2, precision="fp16", apply_in_backward=in_backward)
    step = PretrainingStep(model, Recipe(), plan, seed=0, total_updates=100)
    step.loss_scale = 2.0**40
    first = step.update([noise(2)], 0)
    assert not first.applied
    assert step.loss_scale == 2.0**39
    step.loss_scale = 2.0**10
    report = step.update([noise(2)], 0)
    assert report.applied
    plain = PretrainingStep(
        model_of(TINY), Recipe(), Plan(length=1.0, batch=2), seed=0, total_updates=100
    )
    assert report.gradient_norm == pytest.approx(
        plain.update([noise(2)], 0).gradient_norm, rel=0.05
    )


def test_accumulated_batches_weigh_the_same() -> None:
    plan = Plan(length=1.0, batch=2)
    a, b = noise(2, seed=1), noise(2, seed=2)
    both = gradients(TINY, dataclasses.replace(plan, accumulation=2), [a, b])

    def alone(batch: np.ndarray, number: int) -> dict[str, torch.Tensor]:
        model = model_of(TINY)
        step = PretrainingStep(model, Recipe(), plan, seed=5, total_updates=10)
        draws = draw(TINY, 2, 16_000, np.random.default_rng(number))
        step.accumulate(torch.from_numpy(batch), draws, WEIGHTS, draws.masked.numel())
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    first, second = alone(a, 0), alone(b, 1)
    for name, value in both.items():
        mean = (first[name] + second[name]) / 2
        assert torch.allclose(value, mean, rtol=1e-4, atol=1e-6 * float(mean.norm() + 1e-3)), name


def test_an_update_depends_on_seed_update_and_key_alone() -> None:
    def weights(update: int, key: int) -> torch.Tensor:
        model = model_of(TINY)
        step = PretrainingStep(model, Recipe(), Plan(length=1.0, batch=2), seed=5, total_updates=10)
        torch.manual_seed(np.random.randint(1000))
        step.update([noise(2)], update, key)
        return model.project_q.weight.detach().clone()

    assert torch.equal(weights(3, 1), weights(3, 1))
    assert not torch.equal(weights(3, 1), weights(3, 2))
    assert not torch.equal(weights(3, 1), weights(4, 1))


def test_the_step_reports_what_it_did() -> None:
    step = PretrainingStep(
        model_of(TINY), Recipe(), Plan(length=1.0, batch=4), seed=0, total_updates=100
    )
    report = step.update([noise(4)], 0)
    assert report.applied
    assert report.crops == 4
    assert report.seconds == 4.0
    assert report.masked_fraction == pytest.approx(19 / 49)
    assert 12 < report.distinct_negatives <= 18
    assert 4.0 < report.contrastive < 5.5
    assert 2 < report.perplexity <= 128
    assert report.temperature == 2.0
    assert report.learning_rate == pytest.approx(5e-4 / 8)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    model = model_of(TINY)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step = PretrainingStep(model, Recipe(), Plan(length=1.0, batch=2), seed=0, total_updates=100)
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


def test_applying_in_backward_refuses_what_needs_all_gradients() -> None:
    for plan in (Plan(batch=4, accumulation=2), Plan(batch=4, micro_batch=1)):
        with pytest.raises(UsageError, match="apply-in-backward"):
            Recipe().validate_plan(TINY, dataclasses.replace(plan, apply_in_backward=True))
    with pytest.raises(UsageError, match="clip"):
        Recipe(clip_norm=1.0).validate_plan(TINY, Plan(apply_in_backward=True))
    with pytest.raises(UsageError, match="optimizer-state 'fp8' is not one of fp32, bf16, int8"):
        Recipe().validate_plan(TINY, Plan(optimizer_state="fp8"))  # type: ignore[arg-type]


def test_a_runs_config_says_what_is_not_exact() -> None:
    exact = PretrainingSettings(plan=StepOptions(recompute_layers=True))
    assert "not exact" not in exact.as_config()
    rounding = PretrainingSettings(
        precision="bf16", plan=StepOptions(optimizer_state="int8")
    ).as_config()
    assert rounding.startswith("# not exact: precision bf16, optimizer-state int8\n")


def test_a_length_too_short_to_mask_and_a_split_batch_pool_are_refused() -> None:
    with pytest.raises(UsageError, match="too short to mask"):
        Recipe().validate_plan(TINY, Plan(length=0.1))
    with pytest.raises(UsageError, match="whole batch"):
        Recipe(negative_pool="batch").validate_plan(TINY, Plan(batch=4, micro_batch=2))


def flops(name: str) -> int:
    """Floating point operations of a forward pass and its gradient, 5 s x 4."""
    config = preset(name)
    draws = draw(config, 4, 80_000, np.random.default_rng(0))
    counter = operation_count.counter()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model = PretrainingModel(config)
        assert draws.noise is not None
        fake = draws._replace(
            masked=mode.from_tensor(draws.masked),
            multiplicity=mode.from_tensor(draws.multiplicity),
            noise=mode.from_tensor(draws.noise),
            seeds=None,
            layer_keep=None,
        )
        with counter:
            parts = model.loss_parts(model.features(torch.empty(4, 80_000)), fake, 2.0)
            combine(parts, WEIGHTS, draws.masked.numel()).backward()
    return int(counter.get_total_flops())


def test_a_step_of_tiny_is_at_least_fifty_times_cheaper() -> None:
    base, tiny = flops("base"), flops("tiny")
    assert base == pytest.approx(8.2e11, rel=0.01)
    assert base / tiny >= 50
