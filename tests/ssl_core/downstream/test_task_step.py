"""The fine-tuning step: how a batch is split or prepared changes nothing, frozen stays frozen."""

import copy
import dataclasses
from collections.abc import Mapping

import pytest
import torch
from small_models import HEADS, SMALL, backbone_of, noise, small_recipe, task_model
from torch import Tensor

from ssl_core.downstream.heads import BLANK
from ssl_core.downstream.task_model import LogMel, Stage, TaskModel, Upstream
from ssl_core.downstream.task_step import BACKBONE, HEAD, Batch, TaskReport, TaskStep
from ssl_core.planning.step_plan import Plan

SAMPLES = (9_000, 16_000, 4_000, 12_345, 4_000)
PLAN = Plan(batch=len(SAMPLES))
RATES = {HEAD: 0.002, BACKBONE: 0.001}
LARGE = 1.0
"""Adam with so large an epsilon moves weights by their gradients, not by their signs: what is only
rounded differently stays close."""

Weights = dict[str, Tensor]


def batch_of(head: str, samples: tuple[int, ...] = SAMPLES) -> Batch:
    """Clips of several lengths; the texts' lengths follow them."""
    targets = torch.tensor([0, 4, 2, 2, 1])[: len(samples)]
    if head.endswith("ctc"):
        rows = [[1 + (place * 2 + row) % 5 for place in range(n // 3000)] for row, n in
                enumerate(samples)]  # fmt: skip
        longest = max(len(row) for row in rows)
        targets = torch.tensor([row + [BLANK] * (longest - len(row)) for row in rows])
    return Batch([noise(n, row) for row, n in enumerate(samples)], "waveform", samples, targets)


def weights_of(model: TaskModel) -> Weights:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def take(
    model: TaskModel,
    batches: list[Batch],
    *,
    plan: Plan = PLAN,
    unfrozen: bool = False,
    rates: Mapping[str, float] = RATES,
) -> list[TaskReport]:
    step = TaskStep(model, plan, unfrozen=unfrozen, seed=5)
    return [step.update(batch, number, rates) for number, batch in enumerate(batches)]


def gradients(
    model: TaskModel, batch: Batch, *, plan: Plan = PLAN, unfrozen: bool = False
) -> tuple[Weights, TaskReport]:
    """Of a first update: Adam's first moments are then a tenth of them."""
    step = TaskStep(model, plan, unfrozen=unfrozen, seed=5)
    report = step.update(batch, 0, RATES)
    return {n: v for n, v in step.optimizer_state().items() if n.startswith("exp_avg/")}, report


def moved(model: TaskModel, before: Weights) -> set[str]:
    return {name for name, value in model.state_dict().items() if not value.equal(before[name])}


def assert_same_gradients(found: Weights, expected: Weights, most: float = 1e-4) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).norm()
        # A constant added to every key changes nothing but by rounding.
        assert error <= most * value.norm() or name.endswith("k_proj.bias"), name


def assert_same_weights(found: TaskModel, expected: TaskModel, most: float = 1e-6) -> None:
    for name, value in expected.state_dict().items():
        assert torch.allclose(found.state_dict()[name], value, rtol=1e-4, atol=most), name


def tolerances(head: str) -> tuple[float, float]:
    """Of gradients, relative, and of weights: rounding carries units across a leaky ReLU's kink."""
    return (1e-2, 1e-4) if head == "x-vector" else (1e-4, 1e-6)


DROPPING = dataclasses.replace(SMALL, layerdrop=0.3)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("unfrozen", [False, True], ids=["frozen", "unfrozen"])
def test_micro_batches_give_the_whole_batchs_weights(head: str, unfrozen: bool) -> None:
    batch = batch_of(head)
    model = task_model(
        head, config=DROPPING, dropout=0.3, train_extractor=True, clip_norm=0.5, epsilon=LARGE
    )
    whole = copy.deepcopy(model)
    expected, report = gradients(whole, batch, unfrozen=unfrozen)
    assert report.applied
    take(whole, [batch, batch], unfrozen=unfrozen)
    for micro_batch in (1, 2):
        plan = dataclasses.replace(PLAN, micro_batch=micro_batch)
        split = copy.deepcopy(model)
        found, other = gradients(split, batch, plan=plan, unfrozen=unfrozen)
        assert_same_gradients(found, expected, tolerances(head)[0])
        assert other.loss == pytest.approx(report.loss, rel=1e-5)
        assert other.gradient_norm == pytest.approx(report.gradient_norm, rel=1e-4)
        assert (other.correct, other.clips) == (report.correct, 5)
        assert other.seconds == sum(SAMPLES) / 16_000
        take(split, [batch, batch], plan=plan, unfrozen=unfrozen)
        assert_same_weights(split, whole, tolerances(head)[1])
    assert moved(whole, weights_of(model))


@pytest.mark.parametrize("head", HEADS)
def test_a_frozen_backbone_stays_as_it_is(head: str) -> None:
    model = task_model(head)
    before = weights_of(model)
    take(model, [batch_of(head)])
    changed = moved(model, before)
    assert changed == {name for name, _ in model.named_parameters() if name.startswith("head.")}
    assert all(p.requires_grad == n.startswith("head.") for n, p in model.named_parameters())


@pytest.mark.parametrize("extractor", [False, True])
def test_an_unfrozen_backbone_is_trained_and_its_convolutions_if_the_recipe_says_so(
    extractor: bool,
) -> None:
    model = task_model("linear-ctc", train_extractor=extractor)
    before = weights_of(model)
    take(model, [batch_of("linear-ctc"), batch_of("linear-ctc")], unfrozen=True)
    still = before.keys() - moved(model, before)
    expected = {"wav2vec2.masked_spec_embed"}
    if not extractor:
        expected |= {name for name in before if name.startswith("wav2vec2.feature_extractor.")}
        assert len(expected) == 1 + 7 + 2
    assert still - {f"wav2vec2.encoder.layers.{n}.attention.k_proj.bias" for n in range(2)} == (
        expected
    )


@pytest.mark.parametrize("unfrozen", [False, True], ids=["frozen", "unfrozen"])
@pytest.mark.parametrize("micro_batch", [0, 2])
def test_a_gradient_that_is_not_finite_leaves_weights_and_optimizer_state(
    unfrozen: bool, micro_batch: int
) -> None:
    bad = batch_of("mean-linear")
    bad.inputs[1][100] = torch.nan
    good, plan = batch_of("mean-linear"), dataclasses.replace(PLAN, micro_batch=micro_batch)
    model, other = task_model("mean-linear"), task_model("mean-linear")
    before = weights_of(model)
    step = TaskStep(model, plan, unfrozen=unfrozen, seed=5)
    report = step.update(bad, 0, RATES)
    assert not report.applied
    assert not moved(model, before)
    assert step.update(good, 1, RATES).applied
    TaskStep(other, plan, unfrozen=unfrozen, seed=5).update(good, 1, RATES)
    assert not moved(model, weights_of(other))


@pytest.mark.parametrize(
    ("head", "unfrozen", "stages"),
    [
        ("mean-linear", False, ("extracted", "frames", "mean")),
        ("lstm-ctc", False, ("extracted", "frames")),
        ("x-vector", False, ("extracted", "frames")),
        ("linear-ctc", True, ("extracted",)),
    ],
)
def test_training_from_what_was_computed_before_gives_the_same_weights(
    head: str, unfrozen: bool, stages: tuple[Stage, ...]
) -> None:
    batch, model = batch_of(head), task_model(head, dropout=0.3, epsilon=LARGE)
    plain = copy.deepcopy(model)
    expected, _ = gradients(plain, batch, unfrozen=unfrozen)
    take(plain, [batch, batch], unfrozen=unfrozen)
    for stage in stages:
        inputs = []
        for waveform, samples in zip(batch.inputs, batch.samples, strict=True):
            with torch.no_grad():
                x = model.advance(waveform[None], (samples,), "waveform", stage)[0]
            assert x.shape[0] == (1 if stage == "mean" else SMALL.frames(samples))
            assert x.shape[1] == model.width(stage)
            inputs.append(x)
        made = batch._replace(inputs=inputs, stage=stage)
        other = copy.deepcopy(model)
        found, _ = gradients(other, made, unfrozen=unfrozen)
        assert_same_gradients(found, expected, tolerances(head)[0])
        take(other, [made, made], unfrozen=unfrozen)
        assert_same_weights(other, plain, tolerances(head)[1])


@pytest.mark.parametrize(
    ("head", "unfrozen", "extractor", "stage"),
    [
        ("mean-linear", False, False, "mean"),
        ("lstm-ctc", False, False, "frames"),
        ("mean-linear", True, False, "extracted"),
        ("mean-linear", True, True, "waveform"),
    ],
)
def test_the_stage_is_the_last_that_nothing_trained_changes(
    head: str, unfrozen: bool, extractor: bool, stage: Stage
) -> None:
    model = task_model(head, train_extractor=extractor)
    assert TaskStep(model, PLAN, unfrozen=unfrozen, seed=0).stage == stage


def test_each_group_has_its_rate() -> None:
    batch = batch_of("mean-linear")
    before = weights_of(task_model("mean-linear"))
    for still, moving in ((HEAD, BACKBONE), (BACKBONE, HEAD)):
        model = task_model("mean-linear")
        take(model, [batch], unfrozen=True, rates={still: 0.0, moving: 0.01})
        changed = {name.split(".")[0] for name in moved(model, before)}
        assert changed == {"head" if moving == HEAD else "wav2vec2"}
    # Adam's first step is the rate, whatever the gradient.
    model = task_model("mean-linear")
    take(model, [batch], unfrozen=True, rates={HEAD: 0.01, BACKBONE: 0.002})
    for name, rate in (
        ("head.linear.bias", 0.01),
        ("wav2vec2.encoder.layers.1.final_layer_norm.bias", 0.002),
    ):
        steps = (model.state_dict()[name] - before[name]).abs()
        assert torch.allclose(steps, torch.tensor(rate), rtol=1e-3), name


def test_clipping_bounds_the_gradient_of_both_groups_together() -> None:
    batch, moves = batch_of("mean-linear"), []
    for clip in (0.0, 0.01):
        model = task_model("mean-linear", clip_norm=clip, epsilon=1e6, weight_decay=0.0)
        before = weights_of(model)
        report = take(model, [batch], unfrozen=True, rates={HEAD: 1e6, BACKBONE: 1e6})[0]
        changes = [(model.state_dict()[n] - v).flatten() for n, v in before.items()]
        moves.append(float(torch.cat(changes).norm()))
        assert report.gradient_norm > 0.1  # that before clipping
    # With so large an epsilon the change is the gradient itself.
    assert moves[0] == pytest.approx(report.gradient_norm, rel=0.01)
    assert moves[1] == pytest.approx(0.01, rel=0.01)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("unfrozen", [False, True], ids=["frozen", "unfrozen"])
def test_bf16_comes_close_to_fp32(head: str, unfrozen: bool) -> None:
    reports = []
    for precision in ("fp32", "bf16"):
        model = task_model(head)
        plan = dataclasses.replace(PLAN, precision=precision)
        reports.append(take(model, [batch_of(head)], plan=plan, unfrozen=unfrozen)[0])
        for name, value in model.state_dict().items():
            assert value.dtype == torch.float32, name
    assert reports[1].applied
    assert reports[1].loss == pytest.approx(reports[0].loss, rel=0.02)
    assert reports[1].loss != reports[0].loss
    assert reports[1].gradient_norm == pytest.approx(reports[0].gradient_norm, rel=0.2)


@pytest.mark.parametrize(
    "changes",
    [
        {"recompute_features": True},
        {"recompute_layers": True},
        {"keep_attention": True},
        {"keep_freed_memory": False},
        {"apply_in_backward": True},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_every_exact_setting_gives_the_plain_weights(changes: dict[str, bool]) -> None:
    model = task_model("lstm-ctc", train_extractor=True, dropout=0.3, epsilon=LARGE)
    plain, other, batch = copy.deepcopy(model), copy.deepcopy(model), batch_of("lstm-ctc")
    expected, _ = gradients(plain, batch, unfrozen=True)
    plan = dataclasses.replace(PLAN, **changes)  # type: ignore[arg-type]
    found, _ = gradients(other, batch, plan=plan, unfrozen=True)
    assert_same_gradients(found, expected, 1e-5)
    assert_same_weights(other, plain)


def test_an_update_depends_on_seed_update_and_key_alone() -> None:
    def trained(update: int, key: int) -> Tensor:
        model = task_model("lstm-ctc", dropout=0.3)
        torch.rand(3)
        TaskStep(model, PLAN, unfrozen=True, seed=5).update(
            batch_of("lstm-ctc"), update, RATES, key
        )
        return model.state_dict()["head.linear.weight"].clone()

    assert torch.equal(trained(3, 1), trained(3, 1))
    assert not torch.equal(trained(3, 1), trained(3, 2))
    assert not torch.equal(trained(3, 1), trained(4, 1))


@pytest.mark.parametrize("head", HEADS)
def test_a_loss_of_training_falls(head: str) -> None:
    model = task_model(head)
    batch = batch_of(head)
    rate = 0.001 if head == "x-vector" else 0.01
    reports = take(model, [batch] * 20, unfrozen=True, rates={HEAD: rate, BACKBONE: 0.002})
    assert reports[-1].loss < 0.5 * reports[0].loss
    if not head.endswith("ctc"):
        assert reports[-1].correct >= 4


def test_log_mel_frames_train_a_head() -> None:
    tones = [torch.sin(torch.arange(n) * 0.1 * (row + 1)) for row, n in enumerate(SAMPLES)]
    batch = batch_of("mean-linear")._replace(inputs=tones)
    recipe = small_recipe("mean-linear")
    model = TaskModel.new(Upstream(LogMel(), "logmel", False), recipe, 5, 0)
    reports = take(model, [batch] * 30, rates={HEAD: 0.01})
    assert reports[-1].loss < 0.5 * reports[0].loss
    assert reports[-1].correct == 5


def test_heads_begin_by_the_seed_alone() -> None:
    upstream, recipe = Upstream(backbone_of(SMALL), "random", False), small_recipe("lstm-ctc")
    first, again, other = (
        TaskModel.new(upstream, recipe, 5, seed).head.state_dict() for seed in (1, 1, 2)
    )
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert not torch.equal(value, other[name])
