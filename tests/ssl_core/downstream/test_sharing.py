"""Shared and personal parameters of a task's model, and LoRA adapters of its attention."""

import copy
import dataclasses
from typing import get_args

import pytest
import torch
from small_models import LAYER_NORM, SMALL, noise, small_recipe, task_model
from torch import Tensor, nn

from common.errors import UsageError
from ssl_core.downstream.lora import SCALE, LoraLinear, add_lora, merge_lora
from ssl_core.downstream.sharing import Parts, divide
from ssl_core.downstream.task_model import LogMel, TaskModel, Upstream
from ssl_core.downstream.task_recipe import Method, Share
from ssl_core.downstream.task_step import BACKBONE, HEAD, Batch, TaskStep
from ssl_core.planning.step_plan import Plan
from ssl_core.wav2vec2.config import ModelConfig
from ssl_core.wav2vec2.cpu.products import Linear
from ssl_core.wav2vec2.model import Backbone

METHODS: tuple[Method, ...] = get_args(Method)
SHARES: tuple[Share, ...] = get_args(Share)
SAMPLES = (9_000, 16_000, 4_000)
NAMES = frozenset({"head.linear.weight", "head.linear.bias"})
"""Parameters of the head."""
LORA = {
    f"wav2vec2.encoder.layers.{layer}.attention.{name}.lora_{side}"
    for layer in (0, 1)
    for name in ("q_proj", "v_proj")
    for side in "ab"
}


def split(model: TaskModel, method: Method, share: Share, layers: int = 1, rank: int = 4) -> Parts:
    return divide(model, method, share, layers=layers, rank=rank, seed=3)


def expected_body(model: TaskModel, share: Share) -> set[str]:
    """Names of the backbone parameters, of a model without adapters, that `share` trains."""
    if share == "lora":
        return LORA
    untrained = ("head.", "wav2vec2.feature_extractor.", "wav2vec2.masked_spec_embed")
    whole = {name for name, _ in model.named_parameters() if not name.startswith(untrained)}
    if share == "layers":
        return {name for name in whole if ".encoder.layers.1." in name}
    return whole if share == "backbone" else set()


@pytest.mark.parametrize("config", [SMALL, LAYER_NORM], ids=["base", "stable"])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_shared_and_what_is_personal(
    method: Method, share: Share, config: ModelConfig
) -> None:
    model = task_model("mean-linear", config=config)
    body = frozenset(expected_body(model, share))
    assert bool(body) == (share != "none")
    if share == "none" and method in ("fedper", "fedrep"):
        with pytest.raises(UsageError, match=f"{method} keeps the head on the device.*share none"):
            split(model, method, share)
        return
    parts = split(model, method, share)
    names = {name for name, _ in model.named_parameters()}
    if method == "local":
        assert parts == Parts(frozenset(), NAMES | body)
    elif method == "fedavg":
        assert parts == Parts(NAMES | body, frozenset())
    else:
        assert parts == Parts(body, NAMES)
    assert parts.trained == NAMES | body <= names


def test_the_convolutions_are_shared_where_the_recipe_trains_them() -> None:
    plain = split(task_model("mean-linear"), "fedper", "backbone").shared
    model = task_model("mean-linear", train_extractor=True)
    convolutions = {n for n, _ in model.named_parameters() if ".feature_extractor." in n}
    assert len(convolutions) == 9
    assert split(model, "fedper", "backbone").shared == plain | convolutions


def test_the_last_layers_are_the_last() -> None:
    deep = dataclasses.replace(SMALL, num_hidden_layers=12)
    for layers in (1, 2, 12):
        shared = split(task_model("mean-linear", config=deep), "fedper", "layers", layers).shared
        found = {int(name.split(".")[3]) for name in shared}
        assert found == set(range(12 - layers, 12))
        assert len(shared) == 16 * layers


def test_a_model_without_a_backbone_shares_its_head_or_nothing() -> None:
    upstream = Upstream(LogMel(), "logmel", False)
    model = TaskModel.new(upstream, small_recipe("mean-linear"), 5, 0)
    for share in ("backbone", "layers", "lora"):
        with pytest.raises(UsageError, match="logmel has no backbone to train: set share to none"):
            split(model, "fedavg", share)
    assert split(model, "fedavg", "none") == Parts(NAMES, frozenset())
    assert split(model, "local", "none") == Parts(frozenset(), NAMES)


@pytest.mark.parametrize("layers", [0, 3])
def test_there_are_only_so_many_layers(layers: int) -> None:
    with pytest.raises(UsageError, match=f"shared-layers must be from 1 to 2, not {layers}"):
        split(task_model("mean-linear"), "fedper", "layers", layers)


@pytest.mark.parametrize("rank", [0, 32])
def test_a_rank_must_be_low(rank: int) -> None:
    with pytest.raises(UsageError, match=f"lora-rank must be from 1 to 31, not {rank}"):
        split(task_model("mean-linear"), "fedper", "lora", rank=rank)


def batch_of(samples: tuple[int, ...] = SAMPLES) -> Batch:
    clips = [noise(count, row) for row, count in enumerate(samples)]
    return Batch(clips, "waveform", samples, torch.arange(len(samples)))


def logits_of(model: TaskModel) -> Tensor:
    """Without dropout."""
    model.eval()
    with torch.no_grad():
        batch = batch_of()
        logits = model.predict(batch.on(torch.device("cpu")), batch.samples, "waveform").logits
    model.train()
    return logits


def backbone_of(model: TaskModel) -> Backbone:
    assert model.wav2vec2 is not None
    return model.wav2vec2


def test_low_rank_changes_are_nothing_at_first_and_follow_from_the_seed() -> None:
    model = task_model("mean-linear")
    before = logits_of(model)
    torch.manual_seed(99)
    chance = torch.get_rng_state()
    add_lora(backbone_of(model), 4, seed=3)
    assert torch.equal(torch.get_rng_state(), chance)  # the global generator is untouched
    assert torch.equal(logits_of(model), before)
    again, other = task_model("mean-linear"), task_model("mean-linear")
    torch.manual_seed(5)
    add_lora(backbone_of(again), 4, seed=3)
    add_lora(backbone_of(other), 4, seed=4)
    for name in sorted(LORA):
        value = model.get_parameter(name)
        assert value.shape == ((4, 32) if name.endswith("a") else (32, 4))
        assert torch.equal(again.get_parameter(name), value)
        if name.endswith("a"):
            assert not torch.equal(other.get_parameter(name), value)
            # As in peft: uniform up to 1 / sqrt(width) (Kaiming with a = sqrt(5)).
            assert 0.1 < value.abs().max() <= 32**-0.5
        else:
            assert not value.any()


def trained_with_lora(head: str = "mean-linear") -> tuple[TaskModel, dict[str, Tensor]]:
    """A model after some updates of its adapters and head, and the weights before."""
    model = task_model(head)
    parts = split(model, "fedper", "lora")
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    step = TaskStep(model, Plan(batch=3), unfrozen=False, seed=1, trained=parts.trained)
    for update in range(4):
        assert step.update(batch_of(), update, {HEAD: 0.01, BACKBONE: 0.01}).applied
    return model, before


def test_training_changes_the_low_rank_changes_and_the_head_alone() -> None:
    model, before = trained_with_lora()
    moved = {name for name, value in model.named_parameters() if not value.equal(before[name])}
    assert moved == LORA | NAMES


def test_merging_keeps_what_the_model_says_and_makes_it_plain() -> None:
    model, _ = trained_with_lora()
    plain = task_model("mean-linear")
    expected, untrained = logits_of(model), logits_of(plain)
    assert (expected - untrained).abs().max() > 0.1
    merged = copy.deepcopy(model)
    merge_lora(backbone_of(merged))
    assert (logits_of(merged) - expected).abs().max() < 1e-5
    assert {n: v.shape for n, v in merged.state_dict().items()} == {
        n: v.shape for n, v in plain.state_dict().items()
    }
    attention = backbone_of(merged).encoder.layers[0].attention
    assert type(attention.q_proj) is type(attention.v_proj) is Linear  # type: ignore[union-attr]
    kept = {name: value.clone() for name, value in merged.state_dict().items()}
    merge_lora(backbone_of(merged))
    assert all(value.equal(kept[name]) for name, value in merged.state_dict().items())


@pytest.mark.parametrize("bias", [True, False])
def test_a_change_is_twice_the_product_of_its_factors(bias: bool) -> None:
    base = nn.Linear(2, 3, bias=bias)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
        if bias:
            base.bias.copy_(torch.tensor([0.5, 0.0, -0.5]))
    layer = LoraLinear(base, 1)
    x, offset = torch.tensor([[[3.0, 4.0]]]), torch.tensor([0.5, 0.0, -0.5]) * bias
    assert layer(x).tolist() == [[(torch.tensor([3.0, 4.0, 7.0]) + offset).tolist()]]
    with torch.no_grad():
        layer.lora_a.copy_(torch.tensor([[1.0, -1.0]]))
        layer.lora_b.copy_(torch.tensor([[1.0], [0.0], [4.0]]))
    # The adapter projects to 3 - 4 = -1, so 2 * -1 * (1, 0, 4) is added.
    assert SCALE == 2.0
    assert layer(x).tolist() == [[(torch.tensor([1.0, 4.0, -1.0]) + offset).tolist()]]
    assert layer.weight is base.weight
    assert layer.bias is base.bias
